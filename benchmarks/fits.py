"""Fleets through the service beside the same fits one after another in plain torch; and the exact minimum."""

# K rows of one tenant · I in_features · O out_features
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.settings import Settings
from benchmarks.exact import measure_exact
from benchmarks.failures import BenchFailed
from benchmarks.fleet_table import Table, make_table
from benchmarks.jobs import Published, columns_of, peak_bytes, seconds_of, train, upload
from benchmarks.plain_torch import train_alone
from benchmarks.plan import SMALL, Plan
from benchmarks.processes import Server, get, start_service
from benchmarks.progress import say
from benchmarks.stores import base_name, load_base
from benchmarks.tenants import name_of

SHAPE = SMALL
ROWS, STEPS, RANK = 100, 50, 4
_TRAINING = {"method": "adamw", "epochs": STEPS, "batch_size": None, "learning_rate": 0.01}
_ALIKE = 1e-3
"""Plain torch and the service round otherwise, and AdamW lets that grow; other fits would differ by far more."""


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Measure a fleet in rounds, a large one once, some of its groups alone, and `closed_form` beside AdamW."""
    folder.mkdir(parents=True)
    store = folder / "store"
    with ExitStack() as stack:
        server = start_service(store, base_name(SHAPE), trainers=1)
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        # So that neither the process that fits nor what it is measured against has just started.
        upload(server, "first", make_table(SHAPE, tenants=10, rows=ROWS, rank=RANK).arrow())
        _train_fleet(server, "first-{tenant}", "first")
        many = _measure_many(server, plan)
        fleet = _measure_fleet(server, plan, store)
    return {
        "layer": str(SHAPE),
        "rows": ROWS,
        "steps": STEPS,
        "rank": RANK,
        "fleet": fleet,
        "many": many,
        "exact": measure_exact(plan),
    }


def _measure_fleet(server: Server, plan: Plan, store: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    table = make_table(SHAPE, tenants=plan.fleet_groups, rows=ROWS, rank=RANK)
    upload(server, "fleet", table.arrow())
    rounds = []
    for number in range(plan.fit_rounds):
        plain, factors = _plain_seconds(table, plan.plain_fits)
        job = _train_fleet(server, f"round-{number}-{{tenant}}", "fleet")
        rounds.append({"plain_seconds_a_fit": plain, "groups": plan.fleet_groups, **job})
        say(
            f"fits: {plan.fleet_groups:,} groups in {job['seconds']:.2f} s, plain torch {1e3 * plain:.2f} ms a fit: "
            f"{plain * plan.fleet_groups / job['seconds']:.1f} times the rate"
        )
    published = Published(store)
    for tenant, (a_OR, b_RI) in enumerate(factors):
        ours = published.adapter(f"round-{plan.fit_rounds - 1}-{name_of(tenant)}")
        if _difference(ours.a_OR @ ours.b_RI, a_OR @ b_RI) > _ALIKE:
            raise BenchFailed(f"{name_of(tenant)}: plain torch trained another adapter than the service")
    alone = _measure_alone(server, table, plan, published)
    return {"rounds": rounds, "alone": alone}


def _plain_seconds(table: Table, fits: int) -> tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Seconds a fit, and the factors of the first fits; they are trained one after the other."""
    weight_OI = load_base(SHAPE).weight_OI
    rows = [tuple(map(torch.from_numpy, table.rows_of(tenant))) for tenant in range(fits)]
    found = []
    begin = time.perf_counter()
    for x_KI, y_KO in rows:
        found.append(train_alone(weight_OI, x_KI, y_KO, rank=RANK, epochs=STEPS, batch_size=ROWS))
    return (time.perf_counter() - begin) / fits, found[:10]


def _measure_alone(server: Server, table: Table, plan: Plan, published: Published) -> dict[str, Any]:
    """Train some groups as jobs of their own; return whether digests are equal, and the largest difference of ΔW."""
    equal, largest = 0, 0.0
    tenants = np.random.default_rng(5).permutation(plan.fleet_groups)[: plan.fits_alone].tolist()
    for tenant in tenants:
        x_KI, y_KO = table.rows_of(tenant)
        data = {"inputs": x_KI.astype(float).tolist(), "targets": y_KO.astype(float).tolist()}
        train(server, _body(f"alone-{tenant}", data))
        fleet = published.adapter(f"round-0-{name_of(tenant)}")
        alone = published.adapter(f"alone-{tenant}")
        equal += fleet.digest == alone.digest
        largest = max(largest, _difference(fleet.a_OR @ fleet.b_RI, alone.a_OR @ alone.b_RI))
    say(f"fits: {equal} of {len(tenants)} groups have the digest that they get alone; the others differ by {largest:g}")
    return {"groups": len(tenants), "equal": equal, "largest_difference": largest}


def _measure_many(server: Server, plan: Plan) -> dict[str, Any]:
    """Measure the large fleet first, while the fit process has only torch in memory."""
    upload(server, "many", make_table(SHAPE, tenants=plan.large_fleet_groups, rows=ROWS, rank=RANK).arrow())
    before = peak_bytes(server)
    job = _train_fleet(server, "many-{tenant}", "many")
    peak = peak_bytes(server)
    say(f"fits: {plan.large_fleet_groups:,} groups in {job['seconds']:.1f} s, at most {peak / 2**20:,.0f} MiB")
    limit = Settings.model_fields["trainer_memory_bytes"].default
    return {"groups": plan.large_fleet_groups, "peak_bytes": peak, "idle_bytes": before, "limit_bytes": limit, **job}


def _train_fleet(server: Server, name: str, dataset: str) -> dict[str, float]:
    """Seconds of the job, and from the request on until it had ended."""
    sent = time.time()
    job = train(server, _body(name, columns_of(dataset, group_by="tenant")))
    if job["metrics"]["failed"]:
        raise BenchFailed(f"{job['metrics']['failed']} groups of the fleet failed")
    finished = datetime.fromisoformat(job["finished_at"]).timestamp()
    return {"seconds": seconds_of(job), "seconds_from_request": finished - sent}


def _body(name: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "rank": RANK, "data": data, "training": _TRAINING}


def _difference(given_OI: torch.Tensor, wanted_OI: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    return float((given_OI - wanted_OI).abs().max() / wanted_OI.abs().max())
