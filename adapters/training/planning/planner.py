"""Planner: checks a training request in full, decides what it leaves open, and makes a training job of it."""

# N rows · I in_features · O out_features
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np

from adapters.arrays import vector
from adapters.catalog.catalog import Catalog
from adapters.datasets.store import Datasets
from adapters.errors import (
    EstimateTooLarge,
    InvalidCombination,
    InvalidName,
    LoraplexError,
    MissingField,
    OutOfRange,
    RankTooLarge,
)
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import JobAdapter
from adapters.jobs.queue import JobQueue
from adapters.jobs.training_job import Provenance, TrainingJob
from adapters.lora.base_layer import BaseLayer
from adapters.names import check_name
from adapters.training.data_file import Column, write_data_file
from adapters.training.planning.auto import Decisions, decide
from adapters.training.planning.estimate import Estimate, estimate
from adapters.training.planning.holdout import Holdout, SplitReport, read_holdout, report_split
from adapters.training.planning.initialization import (
    AdapterFinder,
    Initialization,
    check_label_positions,
    read_initialization,
)
from adapters.training.planning.request import RowSource, TrainingRequest, nothing_held_out
from adapters.training.planning.rows import Groups, Rows, read_rows
from adapters.training.planning.targets import Labels
from adapters.training.settings import (
    AUTO,
    BALANCED,
    SETTINGS,
    EarlyStopping,
    Init,
    Loss,
    TrainingSpec,
    no_effect,
    unused_settings,
)

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ALWAYS_SHOWN = frozenset(
    {"method", "loss", "epochs", "learning_rate", "batch_size", "seed", "init", "validation_fraction", "ridge"}
)


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
        settings, base, limits = request.settings, self.base, self.limits
        if not request.is_fleet:
            check_name(request.name)
        if settings.rank != AUTO and settings.rank > limits.max_rank:
            detail = f"rank is {str(settings.rank)[:20]}, at most {limits.max_rank} is accepted"
            expected = f"a rank of at most {limits.max_rank}"
            raise RankTooLarge(detail, field="rank", given=settings.rank, expected=expected)
        settings.check()
        start = read_initialization(settings, self.adapters, max_rank=limits.max_rank)
        rows = self.read_rows(request.rows, settings.loss, field="data")
        check_label_positions(start, rows.targets.labels)
        adapters = _adapters(request, rows, max_groups=limits.max_groups)
        sizes = [adapter.rows for adapter in adapters] if request.is_fleet else None
        holdout = read_holdout(request, rows, datasets=self.datasets, base=base)
        max_rank = min(base.in_features, base.out_features, limits.max_rank)
        decisions = decide(request, rows, holdout, max_rank=max_rank)
        holdout = decisions.holdout
        spec = _resolve(request, rows, start, decisions, outputs=base.out_features)
        gate = request.publish.make_gate(spec.loss, holds_out=holdout is not None, is_fleet=request.is_fleet)
        _check_used(request, rows, holdout)
        split = _report_split(request, rows, holdout, spec, sizes)
        training_rows, labels = split.train.rows, rows.targets.labels
        spec.check_steps(training_rows)
        cost = self.estimate(spec, training_rows, held_rows=split.held_out.rows, group_sizes=sizes)
        provenance = Provenance(
            data=rows.description(),
            split=split.rule,
            parent=start.parent,
            prior=None if start.prior is None else str(start.prior[0]),
        )
        optional = {
            "labels": None if labels is None else list(labels),
            "rslora": spec.rslora and spec.init is Init.FACTORS,
            "warnings": [*_label_warnings(request, labels, base), *split.warnings],
            "split": split.to_json(),
            "auto": dict(decisions.reasons),
        }
        job = TrainingJob(
            spec=spec,
            gate=gate,
            labels=labels,
            steps=len(adapters) if request.is_fleet else spec.steps(training_rows),
            adapters=len(adapters),
            is_fleet=request.is_fleet,
            is_update=False,
            provenance=provenance,
            description=_describe(request, spec, start, provenance)
            | {name: value for name, value in optional.items() if value},
        )
        columns = _columns(rows, holdout, is_fleet=request.is_fleet) | start.columns()
        return Plan(name=str(request.name), adapters=tuple(adapters), job=job, estimate=cost, columns=columns)

    def estimate(
        self, spec: TrainingSpec, training_rows: int, *, held_rows: int = 0, group_sizes: Sequence[int] | None = None
    ) -> Estimate:
        """Estimate the cost of a training; raise `EstimateTooLarge` if no trainer may use as much memory."""
        cost = estimate(
            spec,
            in_features=self.base.in_features,
            out_features=self.base.out_features,
            training_rows=training_rows,
            held_rows=held_rows,
            groups=None if group_sizes is None else len(group_sizes),
            largest_group=max(group_sizes or [0]),
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


def _adapters(request: TrainingRequest, rows: Rows, *, max_groups: int) -> list[JobAdapter]:
    """Return the adapters to train: of a fleet, one for each group, in the order of the group codes."""
    name, group_by = str(request.name), rows.origin.get("group_by")
    if request.is_fleet:
        groups = _fleet_groups(name, rows, max_groups=max_groups)
        sizes = np.bincount(groups.codes_N, minlength=len(groups.values))
        return [
            JobAdapter(_expand(name, value), str(value), int(size), position=position)
            for position, (value, size) in enumerate(zip(groups.values, sizes, strict=True))
        ]
    if group_by is not None:
        detail = f"data.group_by trains an adapter a group: the name has to have {{{group_by}}}"
        raise InvalidCombination(detail, field="name", expected=f"a template such as acme-{{{group_by}}}")
    return [JobAdapter(name, None, rows.count)]


def _fleet_groups(template: str, rows: Rows, *, max_groups: int) -> Groups:
    """Return the groups of a fleet if the template of its names, such as `acme-{tenant}`, has their column."""
    placeholders = _PLACEHOLDER.findall(template)
    if not placeholders:
        check_name(template)
    is_inline = rows.table is None
    column = "group" if is_inline else rows.origin.get("group_by")
    if rows.fleet is None:
        field = "data.groups" if is_inline else "data.group_by"
        detail = f"name has a placeholder, so each group gets an adapter: say with {field} which group a row is of"
        raise MissingField(detail, field=field, given=template, expected="groups, or a name without a placeholder")
    if placeholders != [column]:
        detail = f"name has to have {{{column}}}, once, and no other placeholder"
        raise InvalidName(detail, field="name", given=template, expected=f"a template such as acme-{{{column}}}")
    count = len(rows.fleet.values)
    if count > max_groups:
        detail = f"the fleet has {count} groups, at most {max_groups} are accepted (LORAPLEX_MAX_GROUPS)"
        raise OutOfRange(detail, field="data", given=f"{count} groups", expected=f"at most {max_groups} groups")
    return rows.fleet


def _expand(template: str, value: str | int) -> str:
    try:
        return check_name(_PLACEHOLDER.sub(lambda _: str(value), template))
    except LoraplexError as error:
        raise error.explain(before=f"the group {str(value)[:80]!r} makes no name: ") from None


def _resolve(
    request: TrainingRequest, rows: Rows, start: Initialization, decisions: Decisions, *, outputs: int
) -> TrainingSpec:
    """Return the settings of the training, resolved but for what held-out rows decide in the fit.

    Raises the `InvalidInput` that names the field.
    """
    settings, holdout = request.settings, decisions.holdout
    if settings.early_stopping is not None and holdout is None:
        raise nothing_held_out("early_stopping looks at the loss of held-out rows")
    shared = SETTINGS.keys() & TrainingSpec.__dataclass_fields__.keys()
    values: dict[str, Any] = {name: getattr(settings, name) for name in shared}
    if settings.early_stopping is not None:
        values |= asdict(settings.early_stopping)
    values |= decisions.values
    has_own_alpha = settings.alpha is not None and settings.alpha != AUTO
    if not has_own_alpha:
        values["alpha"] = values["rank"] if start.alpha is None else start.alpha
    classes = _classes(rows, outputs)
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


def _classes(rows: Rows, outputs: int) -> int | None:
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
    shown = (_ALWAYS_SHOWN | settings.given) - set(unused_settings(spec.method))
    # Only the held-out rows decide these, in the fit.
    open_names = {"learning_rate": bool(spec.try_rates), "ridge": spec.try_ridges}
    training = {}
    for name in filter(shown.__contains__, SETTINGS):
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
    return {
        "name": request.name,
        "rank": AUTO if spec.try_ranks else spec.rank,
        "alpha": AUTO if spec.try_ranks and spec.alpha_is_rank else spec.alpha,
        "data": provenance.data,
        "training": training,
        "publish": request.publish.as_sent,
    }


def _label_warnings(request: TrainingRequest, labels: Labels | None, base: BaseLayer) -> list[str]:
    if labels is None or request.rows.labels is not None or base.weight_norm == 0:
        return []
    return [
        f"the labels were taken from the data and sorted: output 0 is {str(labels[0])[:40]!r}; where the base "
        "layer's outputs have an order of their own, give data.labels"
    ]
