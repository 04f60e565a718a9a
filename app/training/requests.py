"""`POST /adapters`: a request, checked in full before anything is stored."""

# N rows · I in_features · O out_features
from dataclasses import dataclass
from typing import Any

from adapters.catalog.versions import Version
from adapters.errors import IgnoredField, InvalidCombination, OutOfRange, RankTooLarge, WrongShape
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import JobAdapter
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.names import check_name
from adapters.training.data_file import Column, DataFile, in_memory_column
from adapters.training.planning.estimate import estimate
from adapters.training.planning.split import Split
from adapters.training.settings import Loss, TrainingSpec
from app.http.bodies import object_of_body, read_as
from app.service import Service
from app.training.auto import decide
from app.training.dataset_rows import read_rows
from app.training.fields import check_settings
from app.training.gates import read_gate
from app.training.names import check_single, read_fleet
from app.training.plans import Plan, check_estimate, submit
from app.training.resolving import make_spec
from app.training.rows import Codes, Rows
from app.training.schemas import DatasetData, TrainRequest, is_auto
from app.training.shown import lineage_of, show
from app.training.sides import describe_sides, describe_sides_of_fleet, read_split, training_rows
from app.training.starts import Start, check_start_labels, prior_columns, read_prior, read_start, start_columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    """A request and all that it refers to, each read and checked by itself."""

    request: TrainRequest
    start: Start
    prior: tuple[Version, Adapter] | None
    rows: Rows
    fleet: list[JobAdapter] | None
    held: Rows | None
    """A data set that is held out whole."""
    split: Split | None
    key_N: Codes | None
    """What the split goes by."""

    @property
    def holds_out(self) -> bool:
        """Whether the request says which rows are held out."""
        return self.split is not None or self.held is not None

    def columns(self, key_N: Codes | None) -> dict[str, Column]:
        """Of the data file."""
        rows, held = self.rows, self.held
        found = rows.columns() | ({} if held is None else held.columns("held_"))
        found |= {} if key_N is None else {"key_N": in_memory_column(key_N)}
        found |= {} if self.fleet is None or rows.fleet is None else {"groups_N": in_memory_column(rows.fleet.codes_N)}
        found |= {} if rows.corpus is None else {"corpus_MO": rows.corpus.column()}
        return found | start_columns(self.start) | prior_columns(self.prior)


def queue_training(service: Service, body: object) -> Job:
    """Check a request to train, which a JSON body says; store its data and its job, durably before this returns."""
    return submit(service, plan_training(service, body))


def plan_training(service: Service, body: object) -> Plan:
    """Check a request to train, and decide all that it leaves open; nothing is stored."""
    asked = _read(service, body)
    request, rows, fleet = asked.request, asked.rows, asked.fleet
    base, settings = service.base, service.settings
    most_rank = min(base.in_features, base.out_features, settings.max_rank)
    decided = decide(request, rows, asked.split, holds_out=asked.holds_out, most_rank=most_rank)
    # A split that was decided here goes by the groups, where there are any.
    by_groups = decided.split is not asked.split and rows.groups is not None
    key_N = rows.groups.codes_N if by_groups and rows.groups is not None else asked.key_N
    spec = make_spec(request, rows, asked.start, decided, holds_out=asked.holds_out, outputs=base.out_features)
    holds_out = asked.holds_out or spec.split is not None
    gate = read_gate(request.publish, spec, holds_out=holds_out, fleet=fleet is not None)
    _check_used(request, rows, fleet, asked.held, holds_out=holds_out)
    sides = _sides(request, rows, asked.held, spec, key_N, fleet)
    on_train = training_rows(rows, sides)
    spec.check_steps(on_train)
    guessed = estimate(
        spec,
        in_features=base.in_features,
        out_features=base.out_features,
        training_rows=on_train,
        held_rows=0 if sides is None else sides["held_out"]["rows"],
        groups=None if fleet is None else len(fleet),
        largest_group=0 if fleet is None else max(each.rows for each in fleet),
    )
    check_estimate(guessed, settings.trainer_memory_bytes)
    digest = DataFile(rows.columns()).digest()
    shown = show(request, spec, asked.start, rows, digest, asked.prior)
    warnings = [*_about_labels(request, rows, base), *({} if sides is None else sides).pop("warnings", [])]
    shown |= {"warnings": warnings} if warnings else {}
    shown |= ({} if sides is None else {"split": sides}) | ({"auto": decided.why} if decided.why else {})
    return Plan(
        name=str(request.name),
        fleet=fleet,
        spec=spec,
        gate=gate,
        labels=rows.labels,
        columns=lambda: asked.columns(key_N),
        shown=shown,
        lineage=lineage_of(spec, asked.start, rows, digest, asked.prior, sides),
        steps=spec.steps(on_train) if fleet is None else len(fleet),
        estimate=guessed,
        rows=rows.count,
    )


def _read(service: Service, body: object) -> _Asked:
    request = read_as(TrainRequest, object_of_body(body))
    is_fleet = isinstance(request.name, str) and "{" in request.name
    if not is_fleet:
        check_name(request.name)
    if not is_auto(request.rank):
        _check_rank(request.rank, service.settings.max_rank)
    check_settings(request.training)
    start = read_start(service, request)
    prior = None if request.training.prior is None else read_prior(service, request.training.prior)
    loss = Loss(request.training.loss)
    rows = read_rows(service, request.data, loss)
    check_start_labels(start, rows.labels)
    fleet = read_fleet(request.name, rows, max_groups=service.settings.max_groups) if is_fleet else None
    if fleet is None:
        check_single(rows)
    split, key_N = read_split(request, rows)
    held = _held_rows(service, request, rows, loss)
    return _Asked(
        request=request, start=start, prior=prior, rows=rows, fleet=fleet, held=held, split=split, key_N=key_N
    )


def _check_rank(rank: int, most: int) -> None:
    if rank > most:
        raise RankTooLarge(
            f"rank is {str(rank)[:20]}, at most {most} is accepted",
            field="rank",
            given=rank,
            expected=f"a rank of at most {most}",
        )


def _held_rows(service: Service, request: TrainRequest, rows: Rows, loss: Loss) -> Rows | None:
    """The data set that is held out whole, read as the training rows are."""
    if request.split is None or request.split.dataset is None:
        return None
    if rows.table is None:
        raise InvalidCombination(
            "split.dataset holds out a data set by the columns of the training data, which are in the request",
            field="split.dataset",
            given=request.split.dataset,
            expected="training data from a data set too",
        )
    body = read_as(DatasetData, request.data, within="data")
    held = read_rows(service, request.split.dataset, loss, field="split", labels=rows.labels, as_dataset=body)
    if held.targets.shape[1:] != rows.targets.shape[1:]:
        raise WrongShape(
            f"split.dataset has {held.targets.shape[1]} targets a row, the training data have {rows.targets.shape[1]}",
            field="split.dataset",
            given=f"{held.targets.shape[1]} targets",
            expected=f"{rows.targets.shape[1]} targets",
        )
    return held


def _check_used(
    request: TrainRequest, rows: Rows, fleet: list[JobAdapter] | None, held: Rows | None, *, holds_out: bool
) -> None:
    """Raises `IgnoredField` or `InvalidCombination` where something would have no effect."""
    if fleet is not None:
        _check_fleet(request, held)
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


def _about_labels(request: TrainRequest, rows: Rows, base: BaseLayer) -> list[str]:
    given = request.data.get("labels") if isinstance(request.data, dict) else None
    if rows.labels is None or given is not None or base.weight_norm == 0:
        return []
    return [
        f"the labels were taken from the data and sorted: output 0 is {str(rows.labels[0])[:40]!r}; where the base "
        "layer's outputs have an order of their own, give data.labels"
    ]


def _check_fleet(request: TrainRequest, held: Rows | None) -> None:
    refused = {
        "split.dataset": held is not None,
        "training.keep_statistics": request.training.keep_statistics,
        "data.corpus": isinstance(request.data, dict) and request.data.get("corpus") is not None,
    }
    for field, given in refused.items():
        if given:
            raise InvalidCombination(f"{field} does not go with a fleet", field=field, expected=f"{field} left out")


def _sides(
    request: TrainRequest,
    rows: Rows,
    held: Rows | None,
    spec: TrainingSpec,
    key_N: Codes | None,
    fleet: list[JobAdapter] | None,
) -> dict[str, Any] | None:
    column = None if request.split is None else request.split.column
    try:
        if fleet is not None:
            # Each group is split by itself, in the fit.
            return describe_sides_of_fleet(rows, [each.rows for each in fleet], spec, key_N, column=column)
        return describe_sides(rows, held, spec, key_N, column=column)
    except OutOfRange as error:
        if request.training.validation_fraction > 0:
            error.field, error.given = "training.validation_fraction", request.training.validation_fraction
        raise
