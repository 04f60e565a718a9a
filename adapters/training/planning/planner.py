"""Planner: checks a training request in full, decides what it leaves open, and makes a training job of it."""

# N rows · I in_features · O out_features
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from adapters.arrays import vector
from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.datasets.store import Datasets
from adapters.errors import (
    EstimateTooLarge,
    IgnoredField,
    InvalidCombination,
    MissingField,
    OutOfRange,
    RankTooLarge,
    WrongShape,
    WrongType,
)
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import JobAdapter
from adapters.jobs.queue import JobQueue
from adapters.jobs.training_job import Provenance, TrainingJob
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, check_name
from adapters.training.data_file import Column, DataFile, in_memory_column
from adapters.training.planning.auto import Decisions, decide
from adapters.training.planning.estimate import Estimate, estimate
from adapters.training.planning.fleet_template import check_not_fleet, fleet_adapters
from adapters.training.planning.initialization import (
    AdapterFinder,
    Initialization,
    check_label_positions,
    prior_columns,
    read_initialization,
)
from adapters.training.planning.provenance import describe
from adapters.training.planning.publish_policy import make_gate
from adapters.training.planning.request import DatasetColumns, RowSource, TrainingRequest
from adapters.training.planning.rows import Codes, Rows, read_rows
from adapters.training.planning.split import Split
from adapters.training.planning.split_report import SplitReport, read_split, report_fleet_split, report_split
from adapters.training.settings import AUTO, BALANCED, SETTINGS, Loss, TrainingSpec


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
    columns: Callable[[], dict[str, Column]]
    """Columns of the data file; new ones per call."""

    def to_json(self) -> dict[str, Any]:
        """Return the answer to a dry run."""
        return {"spec": self.job.description, "estimate": asdict(self.estimate), "adapters": len(self.adapters)}

    def write_data(self, file: BinaryIO) -> None:
        """Write the data file."""
        DataFile(self.columns()).write(file)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Inputs:
    """Rows and adapters that a request refers to, each loaded and checked by itself."""

    start: Initialization
    prior: tuple[Version, Adapter] | None
    rows: Rows
    fleet: list[JobAdapter] | None
    held_rows: Rows | None
    """A data set that is held out whole."""
    split: Split | None
    key_N: Codes | None
    """The key that decides the split."""

    @property
    def holds_out(self) -> bool:
        """Return whether the request holds rows out."""
        return self.split is not None or self.held_rows is not None

    def columns(self, key_N: Codes | None) -> dict[str, Column]:
        """Return the columns of the data file."""
        columns = self.rows.columns()
        if self.held_rows is not None:
            columns |= self.held_rows.columns("held_")
        if key_N is not None:
            columns["key_N"] = in_memory_column(key_N)
        if self.fleet is not None and self.rows.fleet is not None:
            columns["groups_N"] = in_memory_column(self.rows.fleet.codes_N)
        if self.rows.corpus is not None:
            columns["corpus_MO"] = self.rows.corpus.column()
        return columns | self.start.columns() | prior_columns(None if self.prior is None else self.prior[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Planner of the trainings of one service."""

    catalog: Catalog
    datasets: Datasets
    base: BaseLayer
    feature_space: str | None
    limits: PlanningLimits

    @property
    def adapters(self) -> AdapterFinder:
        """Return the lookup of adapters that a training may start from or shrink towards."""
        return AdapterFinder(catalog=self.catalog, base=self.base, feature_space=self.feature_space)

    def read_rows(self, source: RowSource, loss: Loss, *, field: str) -> Rows:
        """Read and check rows; raise the `InvalidInput` that names the field and the row."""
        return read_rows(source, loss, datasets=self.datasets, base=self.base, field=field)

    def plan(self, request: TrainingRequest) -> Plan:
        """Check a request and decide what it leaves open; nothing is stored.

        Raises the `InvalidInput`, `NotFound` or `Conflict` that names the field.
        """
        inputs = self._load(request)
        rows, fleet, base = inputs.rows, inputs.fleet, self.base
        max_rank = min(base.in_features, base.out_features, self.limits.max_rank)
        decisions = decide(request, rows, inputs.split, holds_out=inputs.holds_out, max_rank=max_rank)
        # A split that was decided here keeps the groups together, if there are any.
        by_groups = decisions.split is not inputs.split and rows.groups is not None
        key_N = rows.groups.codes_N if by_groups and rows.groups is not None else inputs.key_N
        spec = _resolve(request, inputs, decisions, outputs=base.out_features)
        holds_out = inputs.holds_out or spec.split is not None
        gate = make_gate(request.publish, spec.loss, holds_out=holds_out, is_fleet=fleet is not None)
        _check_used(request, inputs, holds_out=holds_out)
        split = _report_split(request, inputs, spec, key_N)
        training_rows = rows.count if split is None else split.train.rows
        spec.check_steps(training_rows)
        cost = self.estimate(spec, training_rows, held_rows=0 if split is None else split.held_out.rows, fleet=fleet)
        provenance = Provenance(
            data=rows.description(),
            split=None if split is None else split.rule,
            parent=inputs.start.parent,
            prior=None if inputs.prior is None else reference_of(inputs.prior[0]),
        )
        return Plan(
            name=str(request.name),
            adapters=tuple(fleet or [JobAdapter(str(request.name), None, rows.count)]),
            job=TrainingJob(
                spec=spec,
                gate=gate,
                labels=rows.labels,
                steps=spec.steps(training_rows) if fleet is None else len(fleet),
                adapters=1 if fleet is None else len(fleet),
                is_fleet=fleet is not None,
                is_update=False,
                provenance=provenance,
                description=describe(
                    request,
                    spec,
                    inputs.start,
                    provenance,
                    labels=rows.labels,
                    split=split,
                    decisions=decisions,
                    warnings=[*_label_warnings(request, rows, base), *(() if split is None else split.warnings)],
                ),
            ),
            estimate=cost,
            columns=lambda: inputs.columns(key_N),
        )

    def estimate(
        self, spec: TrainingSpec, training_rows: int, *, held_rows: int = 0, fleet: list[JobAdapter] | None = None
    ) -> Estimate:
        """Estimate the cost of a training; raise `EstimateTooLarge` if no trainer may use as much memory."""
        cost = estimate(
            spec,
            in_features=self.base.in_features,
            out_features=self.base.out_features,
            training_rows=training_rows,
            held_rows=held_rows,
            groups=None if fleet is None else len(fleet),
            largest_group=0 if fleet is None else max(adapter.rows for adapter in fleet),
        )
        limit = self.limits.trainer_memory_bytes
        if cost.memory_bytes > limit:
            raise EstimateTooLarge(
                f"the training is estimated to need {cost.memory_bytes} bytes of memory, a trainer may use {limit} "
                "(LORAPLEX_TRAINER_MEMORY_BYTES)",
                field="data",
                given=cost.memory_bytes,
                expected=f"a training of at most {limit} bytes",
            )
        return cost

    def _load(self, request: TrainingRequest) -> _Inputs:
        settings, limits = request.settings, self.limits
        if not request.is_fleet:
            check_name(request.name)
        if request.rank != AUTO and request.rank > limits.max_rank:
            raise RankTooLarge(
                f"rank is {str(request.rank)[:20]}, at most {limits.max_rank} is accepted",
                field="rank",
                given=request.rank,
                expected=f"a rank of at most {limits.max_rank}",
            )
        settings.check()
        start = read_initialization(request, self.adapters, max_rank=limits.max_rank)
        prior = None
        if settings.prior is not None:
            prior = self.adapters.find(settings.prior.adapter, field="training.prior.adapter")
        rows = self.read_rows(request.rows, settings.loss, field="data")
        check_label_positions(start, rows.labels)
        fleet = None
        if request.is_fleet:
            fleet = fleet_adapters(str(request.name), rows, max_groups=limits.max_groups)
        else:
            check_not_fleet(rows)
        split, key_N = read_split(request, rows)
        held_rows = self._held_rows(request, rows)
        return _Inputs(start=start, prior=prior, rows=rows, fleet=fleet, held_rows=held_rows, split=split, key_N=key_N)

    def _held_rows(self, request: TrainingRequest, rows: Rows) -> Rows | None:
        """Return the data set that is held out whole, read by the columns of the training rows."""
        if request.split is None or request.split.dataset is None:
            return None
        if not isinstance(request.rows, DatasetColumns):
            raise InvalidCombination(
                "split.dataset holds out a data set by the columns of the training data, which are in the request",
                field="split.dataset",
                given=request.split.dataset,
                expected="training data from a data set too",
            )
        source = replace(request.rows, dataset=request.split.dataset, labels=rows.labels, corpus=None, group_by=None)
        held_rows = self.read_rows(source, request.settings.loss, field="split")
        if held_rows.targets.shape[1:] != rows.targets.shape[1:]:
            raise WrongShape(
                f"split.dataset has {held_rows.targets.shape[1]} targets a row, the training data have "
                f"{rows.targets.shape[1]}",
                field="split.dataset",
                given=f"{held_rows.targets.shape[1]} targets",
                expected=f"{rows.targets.shape[1]} targets",
            )
        return held_rows


def submit(plan: Plan, queue: JobQueue, *, job_id: str, planner: Planner, max_queued: int) -> Job:
    """Store the data and the job of a plan; both are durable when this returns.

    Raises `QueueFull` or `StorageFull`; nothing is stored then.
    """
    return queue.submit(
        job_id,
        adapter=plan.name,
        adapters=plan.adapters,
        base=planner.base.fingerprint,
        feature_space=planner.feature_space,
        training=plan.job,
        data=plan.write_data,
        max_queued=max_queued,
    )


def reference_of(version: Version) -> str:
    """Return `name@3` for a version."""
    return str(Reference(version.adapter, version.version))


def _resolve(request: TrainingRequest, inputs: _Inputs, decisions: Decisions, *, outputs: int) -> TrainingSpec:
    """Return the settings of the training, resolved but for what held-out rows decide in the fit.

    Raises the `InvalidInput` that names the field.
    """
    settings, start, stopping = request.settings, inputs.start, request.settings.early_stopping
    if stopping is not None and not inputs.holds_out and decisions.split is None:
        raise MissingField(
            "early_stopping looks at the loss of held-out rows, and none are held out",
            field="split",
            expected="a split, or training.validation_fraction",
        )
    shared = SETTINGS.keys() & TrainingSpec.__dataclass_fields__.keys()
    values: dict[str, Any] = {name: getattr(settings, name) for name in shared}
    values["rank"] = request.rank
    if stopping is not None:
        values |= asdict(stopping)
    values |= decisions.values
    has_own_alpha = request.alpha is not None and request.alpha != AUTO
    inherited = values["rank"] if start.alpha is None else start.alpha
    classes = _classes(inputs.rows, outputs)
    values |= {
        "alpha": float(request.alpha if has_own_alpha else inherited),  # type: ignore[arg-type]  # it is a number then
        "alpha_is_rank": not has_own_alpha and start.alpha is None,
        "rslora": start.rslora,
        "method": decisions.method,
        "init": start.init,
        "split": decisions.split,
        "classes": classes,
        "class_weights": _class_weights(settings.class_weights, classes or outputs),
    }
    return TrainingSpec(**values)


def _classes(rows: Rows, outputs: int) -> int | None:
    """Return the number of outputs that the task uses; None if it uses all."""
    classes = None if rows.labels is None else len(rows.labels)
    if classes is None and rows.classes_N is None and len(rows.targets.shape) == 2:
        classes = rows.targets.shape[1]
    return None if classes == outputs else classes


def _class_weights(value: object, classes: int) -> str | tuple[float, ...] | None:
    field, expected = "training.class_weights", f'"balanced", or {classes} numbers above 0'
    if value is None or value == BALANCED:
        return None if value is None else BALANCED
    if not isinstance(value, list):
        raise WrongType(f"{field} is no list of numbers", field=field, given=value, expected=expected)
    if len(value) != classes:
        raise WrongShape(
            f"{field} has {len(value)} numbers for {classes} classes",
            field=field,
            given=f"{len(value)} numbers",
            expected=expected,
        )
    weights_C = vector(value, field=field, length=classes)
    if not ((weights_C > 0) & (weights_C <= np.float32(1e30))).all():
        raise OutOfRange(
            f"{field}: not every number is above 0 and at most 1e30", field=field, given=value, expected=expected
        )
    return tuple(map(float, value))


def _check_used(request: TrainingRequest, inputs: _Inputs, *, holds_out: bool) -> None:
    """Raise `IgnoredField` or `InvalidCombination` for a field without effect."""
    rows = inputs.rows
    if inputs.fleet is not None:
        refused: Mapping[str, bool] = {
            "split.dataset": inputs.held_rows is not None,
            "training.keep_statistics": request.settings.keep_statistics,
            "data.corpus": request.rows.corpus is not None,
        }
        for field, is_refused in refused.items():
            if is_refused:
                raise InvalidCombination(f"{field} does not go with a fleet", field=field, expected=f"{field} left out")
    elif rows.groups is not None and not holds_out:
        field = "data.groups" if rows.table is None else "data.group"
        raise IgnoredField(
            f"{field} has no effect: groups are kept together where rows are held out, and none are",
            field=field,
            expected="a split, or no groups",
        )
    elif rows.corpus is not None and not holds_out:
        raise IgnoredField(
            "data.corpus has no effect: held-out rows are looked for in it, and none are held out",
            field="data.corpus",
            expected="a split, or no corpus",
        )


def _label_warnings(request: TrainingRequest, rows: Rows, base: BaseLayer) -> list[str]:
    if rows.labels is None or request.rows.labels is not None or base.weight_norm == 0:
        return []
    return [
        f"the labels were taken from the data and sorted: output 0 is {str(rows.labels[0])[:40]!r}; where the base "
        "layer's outputs have an order of their own, give data.labels"
    ]


def _report_split(
    request: TrainingRequest, inputs: _Inputs, spec: TrainingSpec, key_N: Codes | None
) -> SplitReport | None:
    column = None if request.split is None else request.split.column
    try:
        if inputs.fleet is not None:
            # Each group is split by itself, in the fit.
            sizes = [adapter.rows for adapter in inputs.fleet]
            return report_fleet_split(inputs.rows, sizes, spec, key_N, column=column)
        return report_split(inputs.rows, inputs.held_rows, spec, key_N, column=column)
    except OutOfRange as error:
        if request.settings.validation_fraction > 0:
            raise error.at(field="training.validation_fraction", given=request.settings.validation_fraction) from None
        raise
