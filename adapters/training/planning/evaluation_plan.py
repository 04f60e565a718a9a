"""Plan of an evaluation: the versions to compare, resolved when it is queued, and the rows to compare them on."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapters.catalog.versions import Version
from adapters.errors import Conflict, NotFound
from adapters.jobs.training_job import JobKind, Provenance, TrainingJob
from adapters.names import parse_reference
from adapters.training.evaluation.gate import Gate, When
from adapters.training.planning.estimate import estimate_evaluation
from adapters.training.planning.planner import Plan, Planner, count_classes
from adapters.training.planning.request import EvaluationRequest
from adapters.training.planning.rows import Rows, loss_of
from adapters.training.settings import TrainingSpec, no_effect

MAX_COMPARED = 100
_MAX_NAMED = 3


def plan_evaluation(planner: Planner, request: EvaluationRequest) -> Plan:
    """Check an evaluation in full; nothing is stored.

    Raises the `InvalidInput`, `NotFound` or `Conflict` that names the field, and the position of an adapter as its row.
    """
    versions = _find_versions(planner, request.adapters)
    compared = tuple(None if version is None else str(version) for version in versions)
    loss = loss_of(request.rows, planner.open_table, base=planner.base)
    rows = planner.read_rows(request.rows, loss, field="data", are_evaluated=True)
    _check_used(rows)
    spec = TrainingSpec(rank=1, alpha=1.0, loss=loss, classes=count_classes(rows, planner.base.out_features))
    labels, data = rows.targets.labels, rows.description()
    optional = {"labels": labels, "warnings": _warn_of_training_rows(versions, data)}
    job = TrainingJob(
        spec=spec,
        gate=Gate(when=When.NEVER),
        labels=labels,
        steps=len(compared),
        adapters=0,
        is_fleet=False,
        kind=JobKind.EVALUATION,
        provenance=Provenance(data=data),
        description={"adapters": list(compared), "data": data, "loss": loss}
        | {name: list(values) for name, values in optional.items() if values},
        compared=compared,
        output_labels=None if request.rows.labels is None else labels,
    )
    cost = estimate_evaluation(
        spec,
        in_features=planner.base.in_features,
        out_features=planner.base.out_features,
        rows=rows.count,
        adapters=len(compared),
    ).check(planner.limits.trainer_memory_bytes)
    return Plan(name=_name_of(compared), adapters=(), job=job, estimate=cost, columns=rows.columns())


def _find_versions(planner: Planner, references: Sequence[object]) -> list[Version | None]:
    """Return the version that each reference means now; None for the base layer."""
    versions: list[Version | None] = []
    for position, reference in enumerate(references):
        if reference is None:
            versions.append(None)
            continue
        parsed = parse_reference(reference, field="adapters", row=position)
        try:
            version = planner.catalog.find(parsed, tenant=planner.tenant)
            version.check_servable(planner.base, planner.feature_space)
        except (NotFound, Conflict) as error:
            raise error.at(field="adapters", row=position) from None
        versions.append(version)
    return versions


def _check_used(rows: Rows) -> None:
    """Raise `IgnoredField` for groups, which have no effect."""
    names = {"groups": "group", "fleet": "group_by"} if rows.table is not None else {"groups": "groups"}
    for part, name in names.items():
        if getattr(rows, part) is not None:
            raise no_effect(f"data.{name}", "in an evaluation, which splits no rows")


def _warn_of_training_rows(versions: Sequence[Version | None], data: Mapping[str, Any]) -> list[str]:
    """Return a warning for each version that was trained on the same data set, or on the same rows of a request."""
    warnings = []
    for version in dict.fromkeys(version for version in versions if version is not None):
        trained_on: Any = (version.lineage or {}).get("data") or {}
        if any(name in data and trained_on.get(name) == data[name] for name in ("dataset_digest", "digest")):
            warnings.append(f"{version} was trained on rows of the same data: its figures may be too good")
    return warnings


def _name_of(compared: Sequence[str | None]) -> str:
    """Return what the job shows in place of the name of an adapter."""
    names = ["base layer" if reference is None else reference for reference in compared[:_MAX_NAMED]]
    more = len(compared) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
