"""Planner: checks a training request in full, decides what it leaves open, and makes a training job of it."""

# N rows · I in_features · O out_features
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from adapters.arrays import vector
from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.datasets.store import Datasets, DatasetVersion
from adapters.datasets.table import Table
from adapters.errors import Conflict, IgnoredField, InvalidCombination, MissingField, NoStatistics, NotFound, OutOfRange
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import JobAdapter
from adapters.jobs.queue import JobQueue, OnSubmit
from adapters.jobs.training_job import JobKind, Provenance, TrainingJob
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.lora.labels import Labels
from adapters.names import Reference, check_name, parse_reference
from adapters.training.data_file import Column, write_data_file
from adapters.training.evaluation.gate import Gate, When
from adapters.training.planning.auto import Decisions, decide
from adapters.training.planning.estimate import Estimate, estimate, estimate_fleet
from adapters.training.planning.holdout import Holdout, SplitReport, read_holdout, report_split
from adapters.training.planning.initialization import (
    Initialization,
    check_label_positions,
    prior_columns,
    read_initialization,
)
from adapters.training.planning.request import RowSource, TrainingRequest, UpdateRequest, nothing_held_out
from adapters.training.planning.rows import Rows, loss_of, read_rows, renamed
from adapters.training.settings import (
    AUTO,
    BALANCED,
    SETTINGS,
    Candidate,
    EarlyStopping,
    Init,
    InitFactors,
    Loss,
    Method,
    TrainingSpec,
    no_effect,
    unused_settings,
)

# Settings that a job shows, whether they were sent or not: of a named method, and if auto compares.
_ALWAYS_SHOWN = frozenset(
    {"method", "loss", "epochs", "learning_rate", "batch_size", "seed", "init", "validation_fraction", "ridge"}
)
_ALWAYS_SHOWN_OF_AUTO = frozenset({"method", "loss", "bias", "seed"})
_MAX_RENAMED_SHOWN = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningLimits:
    """Bounds of what a service plans."""

    max_rank: int
    max_groups: int
    trainer_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A training that has passed every check, with the data that it needs."""

    name: str
    """Name of the adapter, or the template of a fleet's names."""
    adapters: tuple[JobAdapter, ...]
    job: TrainingJob
    estimate: Estimate
    columns: Mapping[str, Column]
    """Columns of the data file."""

    def to_json(self) -> dict[str, Any]:
        """Return the answer to a dry run."""
        return {"spec": self.job.description, "estimate": asdict(self.estimate), "adapters": len(self.adapters)}

    def write_data(self, file: BinaryIO) -> None:
        """Write the data file."""
        write_data_file(self.columns, file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Planner of the trainings of one tenant."""

    tenant: str
    catalog: Catalog
    datasets: Datasets
    base: BaseLayer
    feature_space: str | None
    limits: PlanningLimits

    def find_adapter(self, reference: object, field: str) -> tuple[Version, Adapter]:
        """Return the version that a reference means, and its adapter, if this service can answer with it.

        Raises the error about the reference, `NotFound`, or `Conflict` for another base layer or feature space.
        """
        parsed = parse_reference(reference, field=field)
        try:
            version, adapter = find_adapter(self.catalog, parsed, tenant=self.tenant)
            version.check_servable(self.base, self.feature_space)
        except (NotFound, Conflict) as error:
            raise error.at(field=field) from None
        return version, adapter

    def open_table(self, reference: object, field: str) -> tuple[DatasetVersion, Table]:
        """Return the version of a data set that a reference means, and its rows.

        Raises the error about the reference, `NotFound` or `BlobCorrupt`.
        """
        version = self.datasets.find(parse_reference(reference, field=field), tenant=self.tenant, field=field)
        return version, Table.open(self.datasets.local(version, is_read_whole=True))

    def read_rows(self, source: RowSource, loss: Loss, *, field: str, are_evaluated: bool = False) -> Rows:
        """Read and check rows; raise the `InvalidInput` that names the field and the row."""
        return read_rows(source, loss, self.open_table, base=self.base, field=field, are_evaluated=are_evaluated)

    def plan(self, request: TrainingRequest, *, only_groups: Collection[str | None] | None = None) -> Plan:
        """Check a request and decide what it leaves open; nothing is stored.

        only_groups: train only these groups of a fleet, with all rows; None is the fleet's prior. Raises the
        `InvalidInput`, `NotFound` or `Conflict` that names the field.
        """
        base, limits = self.base, self.limits
        # 1. Read what the request refers to, and check each part by itself.
        request, start, rows = self._read(request)
        name = str(request.name)
        adapters = rows.job_adapters(name, is_fleet=request.is_fleet, max_groups=limits.max_groups)
        sizes = [adapter.rows for adapter in adapters] if request.is_fleet else None
        holdout = read_holdout(request, rows, open_table=self.open_table, base=base)
        # 2. Decide what the request leaves open, and check that the parts go together.
        full_rank = min(base.in_features, base.out_features)
        decisions = decide(request, rows, holdout, full_rank=full_rank, rank_limit=limits.max_rank)
        holdout = decisions.holdout
        spec = _resolve(request, rows, start, decisions, outputs=base.out_features)
        _check_used(request, rows, holdout)
        split = _report_split(request, rows, holdout, spec, sizes)
        gate = request.publish.make_gate(spec.loss, holds_out=split.held_out.rows > 0, is_fleet=request.is_fleet)
        adapters = _add_prior(request, adapters, spec, rows.count)
        positions = len(adapters)
        if only_groups is not None:
            adapters = [adapter for adapter in adapters if adapter.group in only_groups]
        # 3. Check the cost, and describe the training.
        training_rows, labels = split.train.rows, rows.targets.labels
        spec.check_steps(training_rows)
        cost = self.estimate(spec, training_rows, held_rows=split.held_out.rows, group_sizes=sizes)
        prior = None if start.prior is None else str(start.prior[0])
        provenance = Provenance(data=rows.description(), split=split.rule, parent=start.parent, prior=prior)
        names = renamed(name, adapters)
        optional = {
            "fleet_prior": request.fleet_prior,
            "renamed": names[:_MAX_RENAMED_SHOWN],
            "renamed_count": len(names),
            "labels": None if labels is None else list(labels),
            "rslora": spec.rslora and spec.init is Init.FACTORS,
            "warnings": [*_label_warnings(request, labels, base), *split.warnings, *_unevaluated(gate, holdout)],
            "split": split.to_json(),
            "auto": dict(decisions.reasons),
        }
        # A comparison is one step: each of its candidates has steps of its own.
        steps = 1 if spec.candidates else spec.steps(training_rows)
        job = TrainingJob(
            spec=spec,
            gate=gate,
            labels=labels,
            steps=len(adapters) if request.is_fleet else steps,
            adapters=len(adapters),
            positions=positions,
            is_fleet=request.is_fleet,
            fleet_prior=None if request.fleet_prior is None else str(request.fleet_prior),
            request=None if rows.table is None or isinstance(request.settings.init, InitFactors) else request.body,
            provenance=provenance,
            description=_describe(request, spec, start, provenance) | {k: v for k, v in optional.items() if v},
            scratch_bytes=cost.scratch_bytes,
        )
        columns = _columns(rows, holdout, is_fleet=request.is_fleet) | start.columns()
        return Plan(name=name, adapters=tuple(adapters), job=job, estimate=cost, columns=columns)

    def _read(self, request: TrainingRequest) -> tuple[TrainingRequest, Initialization, Rows]:
        """Return a complete request, where its factors start, and its rows."""
        max_rank = self.limits.max_rank
        if not request.is_fleet:
            check_name(request.name)
        request = request.complete(self._loss(request), max_rank=max_rank)
        request.settings.check(max_rank=max_rank)
        start = read_initialization(request.settings, self.find_adapter, base=self.base, max_rank=max_rank)
        if start.rank is not None:
            request = replace(request, settings=replace(request.settings, rank=start.rank))
        rows = self.read_rows(request.rows, Loss(request.settings.loss), field="data")
        check_label_positions(start, rows.targets.labels)
        return request, start, rows

    def _loss(self, request: TrainingRequest) -> Loss:
        """Return the loss of a request; the targets decide it if it is open."""
        settings = request.settings
        if settings.loss != AUTO:
            return Loss(settings.loss)
        if settings.method != AUTO and "loss" not in settings.given:
            return Loss(SETTINGS["loss"].exact_default)
        return loss_of(request.rows, self.open_table, base=self.base)

    def updatable_version(self, name: str) -> Version:
        """Return the live version of an adapter if it can be updated.

        Raises `NotFound`, `Conflict` for another base layer or feature space, and `NoStatistics`.
        """
        version = self.catalog.find(Reference(check_name(name)), tenant=self.tenant)
        version.check_servable(self.base, self.feature_space)
        if version.statistics is None or version.lineage is None:
            detail = f"{version} was trained without keep_statistics: train it again with it"
            expected = 'an adapter trained by closed_form with "keep_statistics": true'
            raise NoStatistics(detail, field="name", given=name, expected=expected)
        return version

    def plan_update(self, version: Version, request: UpdateRequest) -> Plan:
        """Check an update of a version that `updatable_version` returned: rows to add and to forget in a closed form.

        Nothing is stored. Raises the `InvalidInput`, `NotFound` or `Conflict` that names the field.
        """
        if not request.rows:
            raise MissingField("an update adds rows, or forgets rows", field="add", expected="add, forget, or both")
        if request.publish.when is When.IF_NOT_WORSE:
            detail, expected = "publish if_not_worse: an update is not evaluated", "always or never"
            raise InvalidCombination(detail, field="publish", given=request.publish.as_sent, expected=expected)
        rows = {field: self.read_rows(source, Loss.MSE, field=field) for field, source in request.rows.items()}
        for field, part in rows.items():
            if part.groups is not None or part.fleet is not None:
                detail = f"{field}: groups have no effect here: leave them out"
                raise IgnoredField(detail, field=field, expected="rows without groups")
        lineage: Mapping[str, Any] = version.lineage or {}
        spec = replace(TrainingSpec.from_json(lineage["spec"]), split=None)
        gate = request.publish.make_gate(spec.loss, holds_out=False, is_fleet=False)
        parent, prior = str(version), lineage.get("prior")
        # Without rows to add, there are empty arrays.
        empty = {"inputs_NI": (0, self.base.in_features), "targets": (0, self.base.out_features)}
        columns = {name: Column.of(np.zeros(shape, np.float32)) for name, shape in empty.items()}
        columns |= self._prior_columns(prior)
        for prefix, field in (("", "add"), ("gone_", "forget")):
            if field in rows:
                columns |= rows[field].columns(prefix)
        count = sum(part.count for part in rows.values())
        data = {field: part.description() for field, part in rows.items()}
        job = TrainingJob(
            spec=spec,
            gate=gate,
            labels=None if version.labels is None else tuple(version.labels),
            steps=1,
            adapters=1,
            is_fleet=False,
            kind=JobKind.UPDATE,
            provenance=Provenance(data=data, parent=parent, prior=prior),
            description={
                "name": version.adapter,
                "rank": spec.rank,
                "alpha": spec.alpha,
                "update": {"of": parent, **data},
                "training": {"method": spec.method, "loss": spec.loss, "ridge": spec.ridge, "bias": spec.bias},
                "publish": request.publish.as_sent,
            },
        )
        adapters, cost = (JobAdapter(version.adapter, None, count),), self.estimate(spec, count)
        return Plan(name=version.adapter, adapters=adapters, job=job, estimate=cost, columns=columns)

    def _prior_columns(self, reference: str | None) -> dict[str, Column]:
        """Return the columns of the adapter that a version shrinks towards; raise `Conflict` if it is gone."""
        if reference is None:
            return {}
        try:
            return prior_columns(self.find_adapter(reference, "name")[1])
        except NotFound:
            detail = f"the adapter that it shrinks towards, {reference}, is gone: train it again"
            expected = "a prior that is still there"
            raise Conflict(detail, field="name", given=reference, expected=expected) from None

    def estimate(
        self, spec: TrainingSpec, training_rows: int, *, held_rows: int = 0, group_sizes: Sequence[int] | None = None
    ) -> Estimate:
        """Estimate the cost of a training; raise `EstimateTooLarge` if no trainer may use as much memory."""
        limit = self.limits.trainer_memory_bytes
        I, O = self.base.in_features, self.base.out_features
        shape: dict[str, Any] = {"in_features": I, "out_features": O, "held_rows": held_rows}
        if group_sizes is None:
            cost = estimate(spec, **shape, training_rows=training_rows)
        else:
            cost = estimate_fleet(spec, **shape, group_sizes=group_sizes, limit=limit)
        return cost.check(limit)


def submit(
    plan: Plan, queue: JobQueue, *, job_id: str, planner: Planner, max_queued: int, on_submit: OnSubmit | None = None
) -> Job:
    """Store the data and the job of a plan; both are durable when this returns.

    `on_submit` is called as in `JobQueue.submit`. Raises `QueueFull` or `StorageFull`; nothing is stored then.
    """
    return queue.submit(
        job_id,
        tenant=planner.tenant,
        adapter=plan.name,
        adapters=plan.adapters,
        base=planner.base.fingerprint,
        feature_space=planner.feature_space,
        training=replace(plan.job, memory_bytes=plan.estimate.memory_bytes),
        data=plan.write_data,
        max_queued=max_queued,
        on_submit=on_submit,
    )


def _add_prior(
    request: TrainingRequest, adapters: Sequence[JobAdapter], spec: TrainingSpec, rows: int
) -> list[JobAdapter]:
    """Return the adapters with that of the fleet's mean, if one is to be published; raise `InvalidCombination`."""
    name, field = request.fleet_prior, "fleet_prior"
    if name is None:
        return list(adapters)
    checked = check_name(name, field=field)
    detail = None
    if not request.is_fleet:
        detail = "fleet_prior publishes what the groups of a fleet have in common, and this is no fleet"
    elif Candidate.FLEET_MEAN not in spec.candidates:
        detail = "fleet_prior needs the candidates of one decomposition, which the other settings leave out"
    elif any(adapter.name == checked for adapter in adapters):
        detail = f"fleet_prior: {checked} is the name of one of the fleet's adapters"
    if detail is not None:
        raise InvalidCombination(detail, field=field, given=name, expected="another name, or no fleet_prior")
    return [*adapters, JobAdapter(checked, None, rows, position=len(adapters))]


def _resolve(
    request: TrainingRequest, rows: Rows, start: Initialization, decisions: Decisions, *, outputs: int
) -> TrainingSpec:
    """Return the settings of the training, resolved but for what held-out rows decide in the fit.

    Raises the `InvalidInput` that names the field.
    """
    settings, holdout = request.settings, decisions.holdout
    if settings.early_stopping is not None and holdout is None and settings.method != AUTO:
        raise nothing_held_out("early_stopping looks at the loss of held-out rows")
    shared = SETTINGS.keys() & TrainingSpec.__dataclass_fields__.keys()
    # What the method does not use may have been left to the data, and keeps its default.
    values: dict[str, Any] = {name: value for name in shared if (value := getattr(settings, name)) != AUTO}
    if settings.early_stopping is not None:
        values |= asdict(settings.early_stopping)
    values |= decisions.values
    has_own_alpha = settings.alpha is not None and settings.alpha != AUTO
    if not has_own_alpha:
        values["alpha"] = values["rank"] if start.alpha is None else start.alpha
    classes = count_classes(rows, outputs)
    values |= {
        "alpha": float(values["alpha"]),
        "alpha_is_rank": not has_own_alpha and start.alpha is None,
        "rslora": start.rslora,
        "method": decisions.method,
        "init": start.init,
        "split": None if holdout is None else holdout.split,
        "classes": classes,
        "class_weights": _class_weights(settings.class_weights, classes or outputs),
    }
    return TrainingSpec(**values)


def count_classes(rows: Rows, outputs: int) -> int | None:
    """Return the number of outputs that the task uses; None if it uses all."""
    targets, classes = rows.targets, None
    if targets.labels is not None:
        classes = len(targets.labels)
    elif targets.classes_N is None:
        classes = targets.column.shape[1]
    return None if classes == outputs else classes


def _class_weights(value: Any, classes: int) -> str | tuple[float, ...] | None:
    field, expected = "training.class_weights", f'"balanced", or {classes} numbers above 0'
    if value is None or value == BALANCED:
        return None if value is None else BALANCED
    weights_C = vector(value, field=field, length=classes)
    if not ((weights_C > 0) & (weights_C <= np.float32(1e30))).all():
        detail = f"{field}: not every number is above 0 and at most 1e30"
        raise OutOfRange(detail, field=field, given=value, expected=expected)
    return tuple(map(float, value))


def _check_used(request: TrainingRequest, rows: Rows, holdout: Holdout | None) -> None:
    """Raise `IgnoredField` or `InvalidCombination` for a field without effect."""
    if request.is_fleet:
        refused = {
            "split.dataset": holdout is not None and holdout.rows is not None,
            "training.keep_statistics": request.settings.keep_statistics,
            "data.corpus": rows.corpus is not None,
        }
        for field, is_refused in refused.items():
            if is_refused:
                raise InvalidCombination(f"{field} does not go with a fleet", field=field, expected=f"{field} left out")
    elif holdout is None:
        unused = {"data.groups" if rows.table is None else "data.group": rows.groups, "data.corpus": rows.corpus}
        for field, value in unused.items():
            if value is not None:
                raise no_effect(field, "because no rows are held out")


def _report_split(
    request: TrainingRequest, rows: Rows, holdout: Holdout | None, spec: TrainingSpec, sizes: Sequence[int] | None
) -> SplitReport:
    try:
        return report_split(rows, holdout, spec, group_sizes=sizes)
    except OutOfRange as error:
        fraction = request.settings.validation_fraction
        raise (error.at(field="training.validation_fraction", given=fraction) if fraction > 0 else error) from None


def _columns(rows: Rows, holdout: Holdout | None, *, is_fleet: bool) -> dict[str, Column]:
    """Return the columns of the data file for the rows."""
    columns = rows.columns()
    if holdout is not None and holdout.rows is not None:
        columns |= holdout.rows.columns("held_")
    if holdout is not None and holdout.key_N is not None:
        columns["key_N"] = Column.of(holdout.key_N)
    if is_fleet and rows.fleet is not None:
        columns["groups_N"] = Column.of(rows.fleet.codes_N)
    return columns if rows.corpus is None else columns | {"corpus_MO": rows.corpus}


def _describe(
    request: TrainingRequest, spec: TrainingSpec, start: Initialization, provenance: Provenance
) -> dict[str, Any]:
    """Return the resolved settings as the job shows them: what the method uses, and the data by digest."""
    settings = request.settings
    if settings.method == AUTO:
        shown = _ALWAYS_SHOWN_OF_AUTO | settings.given
    else:
        shown = (_ALWAYS_SHOWN | settings.given) - set(unused_settings(Method(settings.method)))
    # Only the held-out rows decide these, in the fit.
    open_names = {"learning_rate": bool(spec.try_rates), "ridge": spec.try_ridges, "bias": spec.try_bias}
    open_names |= {"method": bool(spec.candidates), "epochs": spec.try_steps}
    training: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        if setting.is_top_level or name not in shown:
            continue
        value = getattr(settings, name)
        if name == "init":
            value = start.description()
        elif name == "prior" and provenance.prior is not None:
            value = {"adapter": provenance.prior}
        elif isinstance(value, EarlyStopping):
            value = asdict(value)
        elif value == AUTO and not open_names.get(name, False):
            value = getattr(spec, name)
        training[name] = value
    if settings.method == AUTO:
        training["candidates"] = list(spec.candidates)
    has_open_rank = bool(spec.try_ranks or spec.candidates)
    return {
        "name": request.name,
        "rank": settings.rank if has_open_rank else spec.rank,
        "alpha": AUTO if has_open_rank and spec.alpha_is_rank else spec.alpha,
        "data": provenance.data,
        "training": training,
        "publish": request.publish.as_sent,
    }


def _unevaluated(gate: Gate, holdout: Holdout | None) -> list[str]:
    """Return a warning if live moves although nothing is evaluated and the request does not ask for that."""
    if gate.when is not When.IF_NOT_WORSE or holdout is not None:
        return []
    return ["no rows are held out, so nothing is evaluated: live moves to the new version, however good it is"]


def _label_warnings(request: TrainingRequest, labels: Labels | None, base: BaseLayer) -> list[str]:
    if labels is None or request.rows.labels is not None or base.weight_norm == 0:
        return []
    if base.labels is not None:
        if not set(labels).isdisjoint(base.labels):
            return []
        unknown = f"none of the labels is one of the base layer's ({str(base.labels[0])[:40]!r}, …)"
        return [f"{unknown}: they were sorted, and output 0 is {str(labels[0])[:40]!r}"]
    return [
        f"the labels were taken from the data and sorted: output 0 is {str(labels[0])[:40]!r}; where the base "
        "layer's outputs have an order of their own, give data.labels"
    ]
