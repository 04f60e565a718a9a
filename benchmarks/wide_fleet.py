"""One fleet of a thousand tenants with few rows, 384 wide: `auto` beside AdamW with its defaults."""

# N rows · I in_features · C classes
from pathlib import Path
from typing import Any

import numpy as np

from app.settings import Settings
from benchmarks.jobs import arrow_stream, columns_of, peak_bytes, seconds_of, serving_layer, train_fleet, upload
from benchmarks.plan import Plan
from benchmarks.progress import say
from benchmarks.tenants import name_of
from benchmarks.worlds import FEWEST_ROWS, MOST_ROWS, labels_of

I, C = 384, 20
ADAMW = {"method": "adamw", "loss": "cross_entropy"}
_DISTANCE = 3.0
"""Of the centre of a class from 0, where the rows of a class have the standard deviation 1 in every direction."""


def measure_wide_fleet(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return seconds of both in rounds, the peak memory, and whether a second run gives the same digests."""
    generator = np.random.default_rng(23)
    weight_CI = generator.standard_normal((C, I), dtype=np.float32) / I**0.5
    rounds, digests = [], []
    with serving_layer(folder, weight_CI, np.zeros(C, np.float32), labels_of(C)) as server:
        upload(server, "rows", _table(generator, weight_CI, plan.fleet_groups))
        columns = columns_of("rows", group_by="tenant")
        before = peak_bytes(server)
        for number in range(max(2, plan.fit_rounds)):
            adamw, _ = train_fleet(server, {"name": f"adamw-{number}-{{tenant}}", "data": columns, "training": ADAMW})
            auto, adapters = train_fleet(server, {"name": f"auto-{number}-{{tenant}}", "data": columns})
            digests.append([adapter["digest"] for adapter in adapters])
            rounds.append({"adamw_seconds": seconds_of(adamw), "auto_seconds": seconds_of(auto)})
            say("quality: fleet of {:,}: AdamW {:.1f} s, auto {:.1f} s".format(plan.fleet_groups, *rounds[-1].values()))
        peak = peak_bytes(server)
    return {
        "layer": f"{I}×{C}",
        "groups": plan.fleet_groups,
        "rounds": rounds,
        "different_digests": sum(len(set(several)) > 1 for several in zip(*digests, strict=True)),
        "summary": auto["summary"],
        "idle_bytes": before,
        "peak_bytes": peak,
        "limit_bytes": Settings.model_fields["trainer_memory_bytes"].default,
    }


def _table(generator: np.random.Generator, weight_CI: Any, tenants: int) -> memoryview:
    """Return rows around a centre for each class; each tenant renames three classes."""
    sizes = generator.integers(FEWEST_ROWS, MOST_ROWS + 1, tenants)
    classes_N = generator.integers(0, C, sizes.sum())
    inputs_NI = _DISTANCE * weight_CI[classes_N] + generator.standard_normal((len(classes_N), I), dtype=np.float32)
    names, renamed = labels_of(C), []
    for own_K in np.split(classes_N, sizes.cumsum()[:-1]):
        labels_C, moved = np.arange(C), generator.permutation(C)[:3]
        labels_C[moved] = np.roll(moved, 1)
        renamed += [names[number] for number in labels_C[own_K]]
    tenants_N = [name_of(tenant) for tenant, size in enumerate(sizes) for _ in range(size)]
    return arrow_stream(x=inputs_NI, y=renamed, tenant=tenants_N)
