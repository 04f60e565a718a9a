"""Where the factors start, and the adapter that a closed form shrinks towards."""

# O out_features · I in_features · R rank
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from adapters.arrays import matrix
from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.versions import Version
from adapters.errors import Conflict, InvalidCombination, NotFound, OutOfRange, WrongShape, WrongType
from adapters.lora.adapter import MAX_ALPHA, Adapter, check_factors, digest_of, scaling_of
from adapters.names import parse_reference
from adapters.training.data_file import Column, in_memory_column
from adapters.training.settings import Init
from app.http.bodies import read_as
from app.service import Service
from app.training.schemas import InitAdapter, InitFactors, PriorBody, TrainRequest, is_auto


@dataclass(frozen=True, slots=True)
class Start:
    """Where the factors start, the alpha that they bring along, and how the job shows it."""

    init: Init
    shown: Any
    a_OR: torch.Tensor | None = None
    b_RI: torch.Tensor | None = None
    alpha: float | None = None
    rslora: bool = False
    labels: Sequence[str | int] | None = None
    """Labels of the adapter's outputs, if it is an adapter that has some."""


def read_start(service: Service, request: TrainRequest) -> Start:
    """What `training.init` says; raises the error that names the field."""
    init, field = request.training.init, "training.init"
    if init in (Init.ZERO_DELTA, Init.RANDN):
        return Start(Init(init), init)
    if not isinstance(init, dict):
        raise WrongType(
            "training.init is not a way to start",
            field=field,
            given=init,
            expected='"zero_delta", "randn", {"A", "B"} or {"adapter": reference}',
        )
    if is_auto(request.rank):
        raise InvalidCombination(
            "rank cannot be auto where training.init gives factors, which have one",
            field="rank",
            given="auto",
            expected="the rank of the factors",
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
    return Start(Init.FACTORS, {"digest": digest_of(save({"A": a_OR, "B": b_RI}))}, a_OR, b_RI)


def check_start_labels(start: Start, labels: Sequence[str | int] | None) -> None:
    """Raise `InvalidCombination` if a label is that of another output of the adapter to start from.

    Its ΔW belongs to the rows of W in their order: moved to the outputs that the training has for its labels, it would
    no longer make the same layer.
    """
    place = {label: number for number, label in enumerate(start.labels or ())}
    for number, label in enumerate(labels or ()):
        if place.get(label, number) != number:
            reference = start.shown["adapter"]
            raise InvalidCombination(
                f"{str(label)[:40]!r} is the label of output {place[label]} of {reference}, and of output {number} in "
                "this training: give data.labels in the order of the adapter",
                field="training.init.adapter",
                given=reference,
                expected="an adapter whose labels are those of the same outputs",
            )


def read_prior(service: Service, body: PriorBody) -> tuple[Version, Adapter]:
    """The adapter to shrink towards; raises the error that names the field."""
    return find_usable(service, body.adapter, field="training.prior.adapter")


def prior_columns(prior: tuple[Version, Adapter] | None) -> dict[str, Column]:
    """What a data file stores of the adapter to shrink towards; s goes into A, so that ΔW₀ is their product."""
    if prior is None:
        return {}
    adapter = prior[1]
    return {
        "prior_OR": in_memory_column((adapter.a_OR * adapter.scaling).numpy()),
        "prior_RI": in_memory_column(adapter.b_RI.numpy()),
    }


def start_columns(start: Start) -> dict[str, Column]:
    """What a data file stores of the factors to start from, where they are given."""
    if start.a_OR is None or start.b_RI is None:
        return {}
    return {"start_OR": in_memory_column(start.a_OR.numpy()), "start_RI": in_memory_column(start.b_RI.numpy())}


def find_usable(service: Service, given: object, *, field: str) -> tuple[Version, Adapter]:
    """The version that a reference in `field` means, which this service can answer with."""
    reference = parse_reference(given, field=field)
    try:
        version, adapter = find_adapter(service.catalog, reference)
        version.check_servable(service.base, service.settings.feature_space)
    except (NotFound, Conflict) as error:
        error.field = field
        raise
    return version, adapter


def _start_from_adapter(service: Service, request: TrainRequest, given: object) -> Start:
    """Its ΔW at the start: with the alpha that it has, or with A rescaled to the alpha that is asked for."""
    version, adapter = find_usable(service, given, field="training.init.adapter")
    _check_start_rank(version.rank, request.rank)
    shown = {"adapter": f"{version.adapter}@{version.version}"}
    if request.alpha is not None and not is_auto(request.alpha):
        scaling = scaling_of(request.alpha, request.rank, rslora=False)
        rescaled_OR = adapter.a_OR * (adapter.scaling / scaling if scaling > 0 else math.inf)
        if not bool(torch.isfinite(rescaled_OR).all()):
            raise OutOfRange(
                f"alpha is too small to start from {shown['adapter']}: A would have to grow past float32",
                field="alpha",
                given=request.alpha,
                expected="a larger alpha",
            )
        return Start(Init.FACTORS, shown, rescaled_OR, adapter.b_RI, labels=adapter.labels)
    if adapter.alpha <= 0:
        raise OutOfRange(
            f"{shown['adapter']} has alpha {adapter.alpha:g}, and training needs one above 0: give alpha",
            field="alpha",
            given=adapter.alpha,
            expected=f"a number above 0, at most {MAX_ALPHA:g}",
        )
    return Start(Init.FACTORS, shown, adapter.a_OR, adapter.b_RI, adapter.alpha, adapter.rslora, adapter.labels)


def _check_start_rank(rank: int, expected: int) -> None:
    if rank != expected:
        raise WrongShape(
            f"training.init has rank {rank}, the request has rank {expected}",
            field="training.init",
            given=f"rank {rank}",
            expected=f"rank {expected}",
        )
