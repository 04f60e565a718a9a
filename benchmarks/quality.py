"""Accuracy with the defaults: tenants with few rows, beside what one would use instead; and single adapters."""

# T test rows of one tenant
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.training.settings import Candidate
from benchmarks.failures import BenchFailed
from benchmarks.jobs import arrow_stream, columns_of, predict, seconds_of, serving_layer, train, train_fleet, upload
from benchmarks.one_adapter import measure_label_errors, measure_large, measure_regression
from benchmarks.plan import Plan
from benchmarks.processes import Server
from benchmarks.progress import say
from benchmarks.references import base_layer, candidate_alone, outputs_of, own_heads
from benchmarks.tenants import name_of
from benchmarks.wide_fleet import measure_wide_fleet
from benchmarks.worlds import SOURCES, Classes, Kind, Tenant, World, world

Json = dict[str, Any]
Hits = NDArray[np.bool_]

SINGLE = (
    Candidate.RIDGE,
    Candidate.RIDGE_IN_BASE_METRIC,
    Candidate.OWN_HEAD,
    Candidate.FLEET_MEAN,
    Candidate.CLUSTER_MEAN,
)
"""Each is also measured alone, without a choice and without a decision."""
BEFORE: Json = {
    "name": "before-{tenant}",
    "rank": 8,
    "training": {"method": "adamw", "loss": "cross_entropy", "epochs": 50, "learning_rate": 0.01},
    "publish": "always",
}
"""The defaults before `auto`."""
_LABELLED_ROWS = 10
_HARM, _HARM_Z = -0.01, -1.64


def measure(plan: Plan, folder: Path) -> Json:
    """Return the figures of a wide fleet, of single adapters with enough rows, and of tenants with few rows."""
    seeds = range(plan.quality_seeds)
    pairs = [(data, seed) for data in SOURCES for seed in seeds]
    return {
        "fleet": measure_wide_fleet(plan, folder / "fleet"),
        "label_errors": [measure_label_errors(data, seed, folder / f"errors-{data}-{seed}") for data, seed in pairs],
        "regression": measure_regression(folder / "regression"),
        "large": [measure_large(data, seed, folder / f"large-{data}-{seed}") for data, seed in pairs],
        "newcomers": [measure_newcomers(data, seed, folder / f"newcomers-{data}-{seed}") for data, seed in pairs],
        "worlds": [
            measure_world(kind, data, seed, folder / f"{kind}-{data}-{seed}") for kind in Kind for data, seed in pairs
        ],
    }


def measure_world(kind: str, data: str, seed: int, folder: Path) -> Json:
    """Train one fleet with the defaults and one with those before, both through the service; and the alternatives."""
    begin, members = time.monotonic(), world(kind, data, seed)
    tenants = members.tenants
    predicted = {"base": base_classes(members, tenants), "head": own_heads(tenants)}
    predicted |= {str(candidate): candidate_alone(members, candidate) for candidate in SINGLE}
    with serving_layer(folder, members.weight_CI, members.bias_C, members.labels) as server:
        upload(server, "rows", table_of(tenants, members.labels))
        columns = columns_of("rows", group_by="tenant")
        _, adapters = train_fleet(server, BEFORE | {"data": columns | {"labels": members.labels}})
        predicted["before"] = live_classes(server, members, tenants, adapters)
        job, adapters = train_fleet(server, {"name": "auto-{tenant}", "data": columns})
        predicted["auto"] = live_classes(server, members, tenants, adapters)
    hits = {name: hits_of(classes, tenants) for name, classes in predicted.items()}
    figures = {name: _figures(own, hits["base"]) for name, own in hits.items()}
    said = ", ".join(f"{name} {own['accuracy']:.3f}" for name, own in figures.items())
    say(f"quality: {kind} {data} {seed}: {said}; auto harmed {figures['auto']['harmed']:.1%}")
    return {
        "kind": str(kind),
        "data": data,
        "seed": seed,
        "tenants": len(tenants),
        "ceiling": float(np.mean([tenant.ceiling for tenant in tenants])),
        "figures": figures,
        "summary": job["summary"],
        "taken": Counter(adapter["auto"]["taken"] for adapter in adapters),
        "reported": _reported(adapters, hits["auto"]),
        "job_seconds": seconds_of(job),
        "seconds": time.monotonic() - begin,
    }


def measure_newcomers(data: str, seed: int, folder: Path) -> Json:
    """Serve tenants without rows by the prior of a fleet with one shared shift; then give each of them 30 rows.

    The rows are trained on alone, and as part of the fleet.
    """
    members = world(Kind.SHARED, data, seed)
    newcomers = members.newcomers
    predicted = {"base": base_classes(members, newcomers)}
    with serving_layer(folder, members.weight_CI, members.bias_C, members.labels) as server:
        upload(server, "rows", table_of(members.tenants, members.labels))
        columns = columns_of("rows", group_by="tenant")
        train_fleet(server, {"name": "old-{tenant}", "fleet_prior": "start", "data": columns})
        prior = [{"name": "start", "moved_live": True}] * len(newcomers)
        predicted["prior"] = live_classes(server, members, newcomers, prior)
        alone = [
            _train_alone(server, f"alone-{name_of(number)}", own, members.labels)
            for number, own in enumerate(newcomers)
        ]
        predicted["alone"] = live_classes(server, members, newcomers, alone)
        upload(server, "all", table_of((*members.tenants, *newcomers), members.labels))
        _, adapters = train_fleet(server, {"name": "all-{tenant}", "data": columns_of("all", group_by="tenant")})
        predicted["fleet"] = live_classes(server, members, newcomers, adapters[len(members.tenants) :])
    accuracy = {name: _accuracy(hits_of(classes, newcomers)) for name, classes in predicted.items()}
    say(f"quality: newcomers {data} {seed}: " + ", ".join(f"{name} {own:.3f}" for name, own in accuracy.items()))
    return {"data": data, "seed": seed, "newcomers": len(newcomers), "accuracy": accuracy}


def _train_alone(server: Server, name: str, tenant: Tenant, labels: Sequence[str]) -> Json:
    """Train one adapter on a tenant's rows; return it as a job lists it."""
    targets = [labels[number] for number in tenant.classes_K]
    rows = {"inputs": tenant.inputs_KI.astype(float).tolist(), "targets": targets}
    job = train(server, {"name": name, "data": rows})
    return {"name": name, "moved_live": job["decision"]["moved"]}


def table_of(tenants: Sequence[Tenant], labels: Sequence[str]) -> memoryview:
    """Return the rows of all tenants, the target as a label, as a data set."""
    return arrow_stream(
        x=np.concatenate([tenant.inputs_KI for tenant in tenants]),
        y=[labels[number] for tenant in tenants for number in tenant.classes_K],
        tenant=[name_of(number) for number, tenant in enumerate(tenants) for _ in tenant.classes_K],
    )


def base_classes(members: World, tenants: Sequence[Tenant]) -> list[Classes]:
    """Return the classes (T,) that the base layer predicts for the test rows of each tenant."""
    base = base_layer(members.weight_CI, members.bias_C)
    return [outputs_of(base, None, tenant.test_inputs_TI).argmax(1) for tenant in tenants]


def live_classes(
    server: Server, members: World, tenants: Sequence[Tenant], adapters: Sequence[Mapping[str, Any]]
) -> list[Classes]:
    """Return the classes (T,) that each tenant's name answers with: the live version, or the base layer."""
    predicted = base_classes(members, tenants)
    for number, (tenant, adapter) in enumerate(zip(tenants, adapters, strict=True)):
        classes_T = _classes(server, adapter["name"], members.labels, tenant)
        if (classes_T is None) == bool(adapter["moved_live"]):
            raise BenchFailed(
                f"the job says of {adapter['name']}: moved_live {adapter['moved_live']}; /predict differs"
            )
        if classes_T is not None:
            predicted[number] = classes_T
    return predicted


def _classes(server: Server, name: str, labels: Sequence[str], tenant: Tenant) -> Classes | None:
    """Return the classes of the largest outputs; labels cost the service more, so only a few rows check them."""
    answer = predict(server, name, tenant.test_inputs_TI)
    named = predict(server, name, tenant.test_inputs_TI[:_LABELLED_ROWS], **{"return": ["labels"]})
    if answer is None or named is None:
        return None
    classes_T: Classes = np.argmax(answer["outputs"], axis=1)
    if [labels[number] for number in classes_T[:_LABELLED_ROWS]] != named["labels"]:
        raise BenchFailed(f"{name} has its labels in another order than the base layer")
    return classes_T


def hits_of(predicted: Sequence[Classes], tenants: Sequence[Tenant]) -> list[Hits]:
    """Return which test rows (T,) of each tenant are predicted right."""
    return [classes_T == tenant.test_classes_T for classes_T, tenant in zip(predicted, tenants, strict=True)]


def _accuracy(hits: Sequence[Hits]) -> float:
    return float(np.mean([own_T.mean() for own_T in hits]))


def _figures(hits: Sequence[Hits], base: Sequence[Hits]) -> dict[str, float]:
    """Return the mean accuracy, and the share of tenants that are worse off than with the base layer."""
    return {"accuracy": _accuracy(hits), "harmed": float(np.mean([*map(_is_harmed, hits, base)]))}


def _is_harmed(hits_T: Hits, base_T: Hits) -> bool:
    """Whether accuracy is more than a percentage point below the base layer's, beyond chance (paired z)."""
    differences_T = hits_T.astype(float) - base_T
    mean, error = differences_T.mean(), differences_T.std(ddof=1) / len(differences_T) ** 0.5
    return bool(mean < _HARM and mean < _HARM_Z * error)


def _reported(adapters: Sequence[Mapping[str, Any]], hits: Sequence[Hits]) -> dict[str, float]:
    """Return the mean accuracy of the live adapters as the job reports it, and on the test rows."""
    live = [number for number, adapter in enumerate(adapters) if adapter["moved_live"]]
    reported = [adapters[number]["evaluation"]["adapter"] for number in live]
    return {"live": len(live), "job": float(np.mean(reported)), "test": _accuracy([hits[number] for number in live])}
