"""`POST /adapters`: a request, checked in full before anything is stored, becomes a job."""

# N rows · I in_features · O out_features
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from adapters.adapter import Adapter
from adapters.errors import EstimateTooLarge, InvalidCombination, OutOfRange, RankTooLarge, WrongShape
from adapters.job_adapters import JobAdapter
from adapters.jobs import Job
from adapters.names import check_name
from adapters.training.data import Column, DataFile, whole
from adapters.training.estimate import Estimate, estimate
from adapters.training.gate import Gate
from adapters.training.spec import Init, Loss, TrainingSpec
from adapters.versions import Version
from app.bodies import parse_object, read_as
from app.service import Service
from app.training.dataset_rows import read_rows
from app.training.gates import read_gate
from app.training.names import check_single, read_fleet
from app.training.resolving import IGNORED, check_settings, decide, make_spec
from app.training.rows import Codes, Rows
from app.training.schemas import DatasetData, TrainRequest, is_auto
from app.training.sides import describe_sides, describe_sides_of_fleet, read_split, training_rows
from app.training.starts import Start, read_prior, read_start

_ALWAYS_SHOWN = frozenset(
    {
        "method",
        "loss",
        "epochs",
        "learning_rate",
        "batch_size",
        "seed",
        "init",
        "validation_fraction",
        "ridge",
    }
)
_OF_THE_SIDES = frozenset({"train", "held_out", "warnings"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request that has passed every check."""

    name: str
    fleet: list[JobAdapter] | None
    spec: TrainingSpec
    gate: Gate
    labels: tuple[str | int, ...] | None
    columns: Callable[[], dict[str, Column]]
    """Of the data file; anew at each call."""
    shown: dict[str, Any]
    lineage: dict[str, Any]
    steps: int
    estimate: Estimate
    rows: int
    is_update: bool = False
    """Whether the fit begins with the statistics of the live version."""

    def answer(self) -> dict[str, Any]:
        """What a dry run answers."""
        return {"spec": self.shown, "estimate": asdict(self.estimate), "adapters": len(self.fleet or [0])}


def queue_training(service: Service, body: bytes) -> Job:
    """Check a request to train, store its data and its job; both are durable when this returns."""
    return submit(service, plan_training(service, body))


def plan_training(service: Service, body: bytes) -> Plan:
    """Check a request to train, and decide all that it leaves open; nothing is stored."""
    request = read_as(TrainRequest, parse_object(body))
    base, settings = service.base, service.settings
    fleet_of = None if isinstance(request.name, str) and "{" in request.name else check_name(request.name)
    if not is_auto(request.rank):
        _check_rank(request.rank, settings.max_rank)
    check_settings(request.training)
    start = read_start(service, request)
    prior = None if request.training.prior is None else read_prior(service, request.training.prior)
    loss = Loss(request.training.loss)
    rows = read_rows(service, request.data, loss)
    fleet = None if fleet_of is not None else read_fleet(request.name, rows, max_groups=settings.max_groups)
    if fleet is None:
        check_single(rows)
    split, key_N = read_split(request, rows)
    held = _held_rows(service, request, rows, loss)
    holds_out = split is not None or held is not None
    decided = decide(
        request, rows, split, holds_out=holds_out, most_rank=min(base.in_features, base.out_features, settings.max_rank)
    )
    if decided.split is not split and rows.groups is not None:
        key_N = rows.groups.codes_N
    spec = make_spec(request, rows, start, decided, holds_out=holds_out, outputs=base.out_features)
    gate = read_gate(request.publish, spec, holds_out=holds_out or spec.split is not None, fleet=fleet is not None)
    if fleet is not None:
        _check_fleet(request, held)
    sides = _sides(request, rows, held, spec, key_N, fleet)
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

    def columns() -> dict[str, Column]:
        found = rows.columns() | ({} if held is None else held.columns("held_"))
        found |= {} if key_N is None else {"key_N": whole(key_N)}
        found |= {} if fleet is None or rows.fleet is None else {"groups_N": whole(rows.fleet.codes_N)}
        found |= {} if rows.corpus is None else {"corpus_MO": rows.corpus.column()}
        if start.a_OR is not None and start.b_RI is not None:
            found |= {"start_OR": whole(start.a_OR.numpy()), "start_RI": whole(start.b_RI.numpy())}
        return found | prior_columns(prior)

    digest = DataFile(rows.columns()).digest()
    shown = _shown(request, spec, start, rows, digest, prior)
    if sides is not None:
        shown["split"] = sides
    if decided.why:
        shown["auto"] = decided.why
    parent = start.shown["adapter"] if isinstance(start.shown, dict) and "adapter" in start.shown else None
    lineage = {
        "loss": str(spec.loss),
        "data": {**rows.shown, "rows": rows.count, "digest": digest},
        "split": None if sides is None else {name: sides[name] for name in sides if name not in _OF_THE_SIDES},
        "seed": spec.seed,
        "spec": asdict(spec),
        "parent": parent,
        "prior": None if prior is None else _reference(prior[0]),
    }
    return Plan(
        name=str(request.name),
        fleet=fleet,
        spec=spec,
        gate=gate,
        labels=rows.labels,
        columns=columns,
        shown=shown,
        lineage=lineage,
        steps=spec.steps(on_train) if fleet is None else len(fleet),
        estimate=guessed,
        rows=rows.count,
    )


def check_estimate(guessed: Estimate, most_bytes: int) -> None:
    """Raises `EstimateTooLarge` where a trainer may not use as much memory."""
    if guessed.memory_bytes > most_bytes:
        raise EstimateTooLarge(
            f"the training is estimated to need {guessed.memory_bytes} bytes of memory, a trainer may use {most_bytes} "
            "(LORAPLEX_TRAINER_MEMORY_BYTES)",
            field="data",
            given=guessed.memory_bytes,
            expected=f"a training of at most {most_bytes} bytes",
        )


def prior_columns(prior: tuple[Version, Adapter] | None) -> dict[str, Column]:
    """What a data file stores of the adapter to shrink towards; s goes into A, so that ΔW₀ is their product."""
    if prior is None:
        return {}
    adapter = prior[1]
    return {
        "prior_OR": whole((adapter.a_OR * adapter.scaling).numpy()),
        "prior_RI": whole(adapter.b_RI.numpy()),
    }


def submit(service: Service, plan: Plan) -> Job:
    """Store the data and the job of a plan."""
    adapters = plan.fleet or [JobAdapter(plan.name, None, plan.rows)]

    def write(file: BinaryIO) -> None:
        DataFile(plan.columns()).write(file)

    return service.queue.submit(
        service.new_id(),
        adapter=plan.name,
        adapters=adapters,
        base=service.base.fingerprint,
        feature_space=service.settings.feature_space,
        spec={
            "shown": plan.shown,
            "resolved": asdict(plan.spec),
            "steps": plan.steps,
            "publish": asdict(plan.gate),
            "fleet": plan.fleet is not None,
            "adapters": len(adapters),
            "labels": None if plan.labels is None else list(plan.labels),
            "update": plan.is_update,
            "lineage": plan.lineage,
        },
        steps=plan.steps,
        data=write,
        max_queued=service.settings.max_queued_jobs,
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


def _shown(
    request: TrainRequest,
    spec: TrainingSpec,
    start: Start,
    rows: Rows,
    digest: str,
    prior: tuple[Version, Adapter] | None,
) -> dict[str, Any]:
    """The resolved settings as the job shows them: what the method uses and is not as usual, the data by digest."""
    given = request.training
    # What only held-out rows decide is still open.
    open_fields = ({"learning_rate"} if spec.try_rates else set()) | ({"ridge"} if spec.try_ridges else set())
    training: dict[str, Any] = {}
    # Without warnings: a field that is auto is not of the type that it has otherwise.
    for name, value in given.model_dump(warnings=False).items():
        if name in IGNORED[spec.method] or not (name in _ALWAYS_SHOWN or given.gave(name)):
            continue
        decided = is_auto(value) and name not in open_fields
        training[name] = getattr(spec, name) if decided else value
    if "init" in training:
        training["init"] = start.shown
    if prior is not None:
        training["prior"] = {"adapter": _reference(prior[0])}
    shown: dict[str, Any] = {
        "name": request.name,
        "rank": spec.rank if not spec.try_ranks else "auto",
        "alpha": spec.alpha if not spec.try_ranks or not spec.alpha_is_rank else "auto",
        "data": {**rows.shown, "rows": rows.count, "digest": digest},
        "training": training,
        "publish": request.publish,
    }
    if rows.labels is not None:
        shown["labels"] = list(rows.labels)
    return shown | ({"rslora": True} if spec.rslora and spec.init is Init.FACTORS else {})


def _reference(version: Version) -> str:
    return f"{version.adapter}@{version.version}"
