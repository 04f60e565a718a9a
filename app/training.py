"""A `POST /adapters` body, checked in full before anything is stored."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save

from adapters.adapter import MAX_ALPHA, check_factors, digest_of, scaling_of
from adapters.errors import (
    Conflict,
    IgnoredField,
    InvalidCombination,
    NotFound,
    OutOfRange,
    RankTooLarge,
    WrongShape,
    WrongType,
)
from adapters.jobs import Job
from adapters.matrices import class_indices, matrix
from adapters.names import check_name, parse_reference
from adapters.residency import find_adapter
from adapters.training.data import TrainingData
from adapters.training.spec import Init, Loss, Method, TrainingSpec
from app.bodies import parse_object, read_as
from app.schemas import InitAdapter, InitFactors, TrainingBody, TrainRequest
from app.service import Service

_IGNORED = {
    Method.CLOSED_FORM: ("epochs", "learning_rate", "batch_size", "init"),
    Method.ADAMW: ("ridge",),
    Method.SGD: ("ridge",),
}
"""Fields that a method has no use for: giving one is a mistake, and said so."""


@dataclass(frozen=True, slots=True)
class _Start:
    """Where the factors start, the alpha that they bring along, and how the job shows it."""

    init: Init
    shown: object
    a_OR: torch.Tensor | None = None
    b_RI: torch.Tensor | None = None
    alpha: float | None = None
    rslora: bool = False


def queue_training(service: Service, body: bytes) -> Job:
    """Check a request to train, store its data and its job; both are durable when this returns."""
    request = read_as(TrainRequest, parse_object(body))
    name = check_name(request.name)
    _check_rank(request.rank, service)
    _check_method(request.training)
    start = _read_start(service, request)
    data = _read_data(service, request, start)
    spec = _decide(request, start)
    spec.check_rows(data.rows)
    steps = spec.steps(data.rows)
    return service.queue.submit(
        service.new_id(),
        adapter=name,
        base=service.base.fingerprint,
        feature_space=service.settings.feature_space,
        spec={
            "shown": _shown(request, spec, start, data),
            "resolved": asdict(spec),
            "steps": steps,
            "publish": request.publish,
        },
        steps=steps,
        data=data.to_bytes(),
        max_queued=service.settings.max_queued_jobs,
    )


def _check_rank(rank: int, service: Service) -> None:
    if rank > service.settings.max_rank:
        raise RankTooLarge(
            f"rank is {str(rank)[:20]}, at most {service.settings.max_rank} is accepted",
            field="rank",
            given=rank,
            expected=f"a rank of at most {service.settings.max_rank}",
        )


def _check_method(training: TrainingBody) -> None:
    method = Method(training.method)
    if method is Method.CLOSED_FORM and Loss(training.loss) is not Loss.MSE:
        raise InvalidCombination(
            "closed_form minimises squared error, which has an exact solution; cross_entropy has none: use adamw "
            "or sgd",
            field="training.loss",
            given=training.loss,
            expected="mse with closed_form",
        )
    for field in _IGNORED[method]:
        if training.gave(field):
            raise IgnoredField(
                f"training.{field} has no effect with {method}: leave it out",
                field=f"training.{field}",
                given=getattr(training, field),
                expected=f"{field} left out with {method}",
            )


def _read_start(service: Service, request: TrainRequest) -> _Start:
    init, field = request.training.init, "training.init"
    if init in (Init.ZERO_DELTA, Init.RANDN):
        return _Start(Init(init), init)
    if not isinstance(init, dict):
        raise WrongType(
            "training.init is not a way to start",
            field=field,
            given=init,
            expected='"zero_delta", "randn", {"A", "B"} or {"adapter": reference}',
        )
    if "adapter" in init:
        return _start_from_adapter(service, request, read_as(InitAdapter, init, within=field).adapter)
    factors = read_as(InitFactors, init, within=field)
    a_OR, b_RI = (
        torch.from_numpy(matrix(value, field=f"{field}.{name}")) for name, value in (("A", factors.A), ("B", factors.B))
    )
    names = (f"{field}.A", f"{field}.B", f"{field}.bias")
    check_factors(a_OR, b_RI, None, service.base, max_rank=service.settings.max_rank, names=names)
    _check_start_rank(b_RI.shape[0], request.rank)
    return _Start(Init.FACTORS, {"digest": digest_of(save({"A": a_OR, "B": b_RI}))}, a_OR, b_RI)


def _start_from_adapter(service: Service, request: TrainRequest, given: object) -> _Start:
    """Its ΔW at the start: with the alpha that it has, or with A rescaled to the alpha that is asked for."""
    field = "training.init.adapter"
    reference = parse_reference(given, field=field)
    try:
        version, adapter = find_adapter(service.catalog, reference)
        version.check_answers_on(service.base, service.settings.feature_space)
    except (NotFound, Conflict) as error:
        error.field = field
        raise
    _check_start_rank(version.rank, request.rank)
    shown = {"adapter": f"{version.adapter}@{version.version}"}
    if request.alpha is not None:
        scaling = scaling_of(request.alpha, request.rank, rslora=False)
        rescaled_OR = adapter.a_OR * (adapter.scaling / scaling if scaling > 0 else math.inf)
        if not bool(torch.isfinite(rescaled_OR).all()):
            raise OutOfRange(
                f"alpha is too small to start from {shown['adapter']}: A would have to grow past float32",
                field="alpha",
                given=request.alpha,
                expected="a larger alpha",
            )
        return _Start(Init.FACTORS, shown, rescaled_OR, adapter.b_RI)
    if adapter.alpha <= 0:
        raise OutOfRange(
            f"{shown['adapter']} has alpha {adapter.alpha:g}, and training needs one above 0: give alpha",
            field="alpha",
            given=adapter.alpha,
            expected=f"a number above 0, at most {MAX_ALPHA:g}",
        )
    return _Start(Init.FACTORS, shown, adapter.a_OR, adapter.b_RI, adapter.alpha, adapter.rslora)


def _check_start_rank(rank: int, expected: int) -> None:
    if rank != expected:
        raise WrongShape(
            f"training.init has rank {rank}, the request has rank {expected}",
            field="training.init",
            given=f"rank {rank}",
            expected=f"rank {expected}",
        )


def _read_data(service: Service, request: TrainRequest, start: _Start) -> TrainingData:
    inputs_NI = matrix(request.data.inputs, field="data.inputs", columns=service.base.in_features)
    rows, outputs = len(inputs_NI), service.base.out_features
    targets = (
        torch.from_numpy(matrix(request.data.targets, field="data.targets", rows=rows, columns=outputs))
        if Loss(request.training.loss) is Loss.MSE
        else torch.from_numpy(class_indices(request.data.targets, field="data.targets", rows=rows, classes=outputs))
    )
    return TrainingData(torch.from_numpy(inputs_NI), targets, start.a_OR, start.b_RI)


def _decide(request: TrainRequest, start: _Start) -> TrainingSpec:
    training = request.training
    inherited = start.alpha if start.alpha is not None else request.rank
    return TrainingSpec(
        rank=request.rank,
        alpha=float(inherited if request.alpha is None else request.alpha),
        rslora=start.rslora,
        method=Method(training.method),
        loss=Loss(training.loss),
        epochs=training.epochs,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        seed=training.seed,
        init=start.init,
        validation_fraction=training.validation_fraction,
        ridge=training.ridge,
    )


def _shown(request: TrainRequest, spec: TrainingSpec, start: _Start, data: TrainingData) -> Mapping[str, Any]:
    """The resolved settings as the job shows them: what the method uses, and the data by its digest."""
    training = request.training.model_dump(exclude=set(_IGNORED[spec.method]))
    if "init" in training:
        training["init"] = start.shown
    return {
        "name": request.name,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "data": {"rows": data.rows, "digest": data.digest()},
        "training": training,
        "publish": request.publish,
    } | ({"rslora": True} if spec.rslora else {})
