"""`POST /adapters/{name}/update`: a closed form that kept its statistics, with rows added and rows forgotten."""

# I in_features · O out_features
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from adapters.catalog.versions import Version
from adapters.errors import Conflict, IgnoredField, MissingField, NoStatistics, NotFound
from adapters.jobs.job import Job
from adapters.names import Reference, check_name
from adapters.training.data_file import Column, DataFile, in_memory_column
from adapters.training.planning.estimate import estimate
from adapters.training.settings import Loss, TrainingSpec
from app.http.bodies import object_of_body, read_as
from app.service import Service
from app.training.dataset_rows import read_rows
from app.training.gates import read_gate
from app.training.plans import Plan, check_estimate, submit
from app.training.rows import Rows
from app.training.schemas import UpdateRequest
from app.training.starts import find_usable, prior_columns


def queue_update(service: Service, name: str, body: object) -> Job:
    """Check an update, store its rows and its job; both are durable when this returns.

    Raises `NoStatistics` where the live version kept none, and the error that names the field.
    """
    version = service.catalog.find(Reference(check_name(name)))
    version.check_servable(service.base, service.settings.feature_space)
    lineage = version.lineage
    if version.statistics is None or lineage is None:
        raise NoStatistics(
            f"{name}@{version.version} was trained without keep_statistics: train it again with it",
            field="name",
            given=name,
            expected='an adapter trained by closed_form with "keep_statistics": true',
        )
    request = read_as(UpdateRequest, object_of_body(body))
    given = {field: getattr(request, field) for field in ("add", "forget") if request.gave(field)}
    if not given:
        raise MissingField("an update adds rows, or forgets rows", field="add", expected="add, forget, or both")
    rows = {field: _read(service, value, field) for field, value in given.items()}
    spec = TrainingSpec.from_json(lineage["spec"])  # type: ignore[arg-type]  # it is what asdict made
    gate = read_gate(request.publish, spec, holds_out=False, fleet=False)
    prior = _prior(service, lineage)

    def columns() -> dict[str, Column]:
        found = rows["add"].columns() if "add" in rows else _no_rows(service)
        found |= rows["forget"].columns("gone_") if "forget" in rows else {}
        return found | prior_columns(prior)

    return submit(service, _plan(service, version, rows, spec, gate=gate, columns=columns, publish=request.publish))


def _read(service: Service, value: object, field: str) -> Rows:
    rows = read_rows(service, value, Loss.MSE, field=field)
    if rows.shown.get("group_by") is not None or rows.groups is not None:
        raise IgnoredField(
            f"{field}: groups have no effect here: leave them out", field=field, expected="rows without groups"
        )
    return rows


def _prior(service: Service, lineage: Mapping[str, Any]) -> Any:
    reference = lineage.get("prior")
    if reference is None:
        return None
    try:
        return find_usable(service, reference, field="name")
    except NotFound:
        raise Conflict(
            f"the adapter that it shrinks towards, {reference}, is gone: train it again",
            field="name",
            given=reference,
            expected="a prior that is still there",
        ) from None


def _no_rows(service: Service) -> dict[str, Column]:
    base = service.base
    shapes = {"inputs_NI": (0, base.in_features), "targets": (0, base.out_features)}
    return {name: in_memory_column(np.zeros(shape, np.float32)) for name, shape in shapes.items()}


def _plan(
    service: Service,
    version: Version,
    rows: Mapping[str, Rows],
    spec: TrainingSpec,
    *,
    gate: Any,
    columns: Any,
    publish: object,
) -> Plan:
    base = service.base
    told = {
        field: {**each.shown, "rows": each.count, "digest": DataFile(each.columns()).digest()}
        for field, each in rows.items()
    }
    guessed = estimate(
        spec,
        in_features=base.in_features,
        out_features=base.out_features,
        training_rows=sum(each.count for each in rows.values()),
    )
    check_estimate(guessed, service.settings.trainer_memory_bytes)
    reference = f"{version.adapter}@{version.version}"
    labels = None if version.labels is None else tuple(version.labels)
    lineage = {**(version.lineage or {}), "parent": reference, "data": told, "split": None}
    return Plan(
        name=version.adapter,
        fleet=None,
        spec=replace(spec, split=None),
        gate=gate,
        labels=labels,
        columns=columns,
        shown={
            "name": version.adapter,
            "rank": spec.rank,
            "alpha": spec.alpha,
            "update": {"of": reference, **told},
            "training": {"method": str(spec.method), "loss": str(spec.loss), "ridge": spec.ridge, "bias": spec.bias},
            "publish": publish,
        },
        lineage=lineage | {"spec": asdict(replace(spec, split=None))},
        steps=1,
        estimate=guessed,
        rows=sum(each.count for each in rows.values()),
        is_update=True,
    )
