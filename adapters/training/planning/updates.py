"""Plan of an update: a closed form that kept its statistics, refitted with rows added and rows forgotten."""

# I in_features · O out_features
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from adapters.catalog.versions import Version
from adapters.errors import Conflict, IgnoredField, MissingField, NoStatistics, NotFound
from adapters.jobs.job_adapters import JobAdapter
from adapters.jobs.training_job import Provenance, TrainingJob
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, check_name
from adapters.training.data_file import Column
from adapters.training.planning.initialization import prior_columns
from adapters.training.planning.planner import Plan, Planner
from adapters.training.planning.request import RowSource, UpdateRequest
from adapters.training.planning.rows import Rows
from adapters.training.settings import Loss, TrainingSpec


def updatable_version(planner: Planner, name: str) -> Version:
    """Return the live version of an adapter if it can be updated.

    Raises `NotFound`, `Conflict` for another base layer or feature space, and `NoStatistics`.
    """
    version = planner.catalog.find(Reference(check_name(name)))
    version.check_servable(planner.base, planner.feature_space)
    if version.statistics is None or version.lineage is None:
        raise NoStatistics(
            f"{name}@{version.version} was trained without keep_statistics: train it again with it",
            field="name",
            given=name,
            expected='an adapter trained by closed_form with "keep_statistics": true',
        )
    return version


def plan_update(planner: Planner, version: Version, request: UpdateRequest) -> Plan:
    """Check an update of a version that `updatable_version` returned; nothing is stored.

    Raises the `InvalidInput`, `NotFound` or `Conflict` that names the field.
    """
    if not request.rows:
        raise MissingField("an update adds rows, or forgets rows", field="add", expected="add, forget, or both")
    rows = {field: _read(planner, source, field) for field, source in request.rows.items()}
    lineage: Mapping[str, Any] = version.lineage or {}
    spec = TrainingSpec.from_json(lineage["spec"])
    gate = request.publish.make_gate(spec.loss, holds_out=False, is_fleet=False)
    prior = _prior(planner, lineage.get("prior"))
    spec = replace(spec, split=None)
    count = sum(part.count for part in rows.values())
    cost = planner.estimate(spec, count)
    parent = str(version)
    data = {field: part.description() for field, part in rows.items()}
    job = TrainingJob(
        spec=spec,
        gate=gate,
        labels=None if version.labels is None else tuple(version.labels),
        steps=1,
        adapters=1,
        is_fleet=False,
        is_update=True,
        provenance=Provenance(data=data, parent=parent, prior=lineage.get("prior")),
        description={
            "name": version.adapter,
            "rank": spec.rank,
            "alpha": spec.alpha,
            "update": {"of": parent, **data},
            "training": {"method": str(spec.method), "loss": str(spec.loss), "ridge": spec.ridge, "bias": spec.bias},
            "publish": request.publish.as_sent,
        },
    )
    return Plan(
        name=version.adapter,
        adapters=(JobAdapter(version.adapter, None, count),),
        job=job,
        estimate=cost,
        columns=_columns(rows, planner.base, prior),
    )


def _read(planner: Planner, source: RowSource, field: str) -> Rows:
    rows = planner.read_rows(source, Loss.MSE, field=field)
    if rows.origin.get("group_by") is not None or rows.groups is not None:
        raise IgnoredField(
            f"{field}: groups have no effect here: leave them out", field=field, expected="rows without groups"
        )
    return rows


def _prior(planner: Planner, reference: str | None) -> Adapter | None:
    if reference is None:
        return None
    try:
        return planner.adapters.find(reference, field="name")[1]
    except NotFound:
        raise Conflict(
            f"the adapter that it shrinks towards, {reference}, is gone: train it again",
            field="name",
            given=reference,
            expected="a prior that is still there",
        ) from None


def _columns(rows: Mapping[str, Rows], base: BaseLayer, prior: Adapter | None) -> dict[str, Column]:
    """Return the columns of the data file; without `add`, its rows are empty arrays."""
    if "add" in rows:
        columns = rows["add"].columns()
    else:
        shapes = {"inputs_NI": (0, base.in_features), "targets": (0, base.out_features)}
        columns = {name: Column.of(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    if "forget" in rows:
        columns |= rows["forget"].columns("gone_")
    return columns | prior_columns(prior)
