"""Initial factors of a training, and the adapter that a closed form shrinks towards."""

# O out_features · I in_features · R rank
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save

from adapters.arrays import matrix
from adapters.catalog.versions import Version
from adapters.errors import InvalidCombination, OutOfRange, WrongShape
from adapters.lora.adapter import MAX_ALPHA, Adapter, check_factors, digest_of, scaling_of
from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import Column
from adapters.training.settings import AUTO, AdapterSource, Init, InitFactors, RequestedSettings

# Lookup of an adapter by its reference, which raises the error about the field with this name.
FindAdapter = Callable[[object, str], tuple[Version, Adapter]]


@dataclass(frozen=True, slots=True)
class Initialization:
    """Initial factors with the alpha and the labels of the adapter that they come from, and the prior."""

    init: Init
    a_OR: torch.Tensor | None = None
    b_RI: torch.Tensor | None = None
    parent: str | None = None
    """Reference of the adapter that the factors come from."""
    alpha: float | None = None
    rslora: bool = False
    labels: Sequence[str | int] | None = None
    """Labels of the outputs of that adapter, if it has some."""
    prior: tuple[Version, Adapter] | None = None
    """The adapter that a closed form shrinks towards."""

    @property
    def rank(self) -> int | None:
        """Return the rank of the factors; None if they are drawn."""
        return None if self.b_RI is None else len(self.b_RI)

    def description(self) -> Any:
        """Return the JSON value that the job shows for `init`."""
        if self.parent is not None:
            return {"adapter": self.parent}
        if self.a_OR is None or self.b_RI is None:
            return self.init.value
        return {"digest": digest_of(save({"A": self.a_OR, "B": self.b_RI}))}

    def columns(self) -> dict[str, Column]:
        """Return the columns of a data file for given factors and for the prior."""
        columns = prior_columns(None if self.prior is None else self.prior[1])
        if self.a_OR is None or self.b_RI is None:
            return columns
        return {"start_OR": Column.of(self.a_OR.numpy()), "start_RI": Column.of(self.b_RI.numpy())} | columns


def read_initialization(
    settings: RequestedSettings, find: FindAdapter, *, base: BaseLayer, max_rank: int
) -> Initialization:
    """Read `training.init` and `training.prior`; raise the error that names the field."""
    start = _read_init(settings, find, base=base, max_rank=max_rank)
    if settings.prior is None:
        return start
    return replace(start, prior=find(settings.prior.adapter, "training.prior.adapter"))


def _read_init(settings: RequestedSettings, find: FindAdapter, *, base: BaseLayer, max_rank: int) -> Initialization:
    init, field = settings.init, "training.init"
    if isinstance(init, Init):
        return Initialization(init)
    if isinstance(init, AdapterSource):
        start = _from_adapter(settings, *find(init.adapter, f"{field}.adapter"))
    else:
        assert isinstance(init, InitFactors)
        a_OR = torch.from_numpy(matrix(init.A, field=f"{field}.A"))
        b_RI = torch.from_numpy(matrix(init.B, field=f"{field}.B"))
        names = (f"{field}.A", f"{field}.B", f"{field}.bias")
        check_factors(a_OR, b_RI, None, base, max_rank=max_rank, names=names)
        start = Initialization(Init.FACTORS, a_OR, b_RI)
    rank = start.rank
    if rank != settings.rank and settings.rank != AUTO and "rank" in settings.given:
        detail = f"training.init has rank {rank}, the request has rank {settings.rank}"
        raise WrongShape(detail, field=field, given=f"rank {rank}", expected=f"rank {settings.rank}")
    return start


def check_label_positions(start: Initialization, labels: Sequence[str | int] | None) -> None:
    """Raise `InvalidCombination` if a label is that of another output of the adapter to start from.

    Its ΔW belongs to the rows of W in their order: moved to the outputs that the training has for its labels, it would
    no longer make the same layer.
    """
    outputs = {label: output for output, label in enumerate(start.labels or ())}
    for output, label in enumerate(labels or ()):
        if outputs.get(label, output) != output:
            theirs = f"{str(label)[:40]!r} is the label of output {outputs[label]} of {start.parent}"
            detail = f"{theirs}, and of output {output} in this training: give data.labels in the order of the adapter"
            field, expected = "training.init.adapter", "an adapter whose labels are those of the same outputs"
            raise InvalidCombination(detail, field=field, given=start.parent, expected=expected)


def prior_columns(prior: Adapter | None) -> dict[str, Column]:
    """Return the columns of a data file for the adapter to shrink towards.

    s is a factor of A there, so that ΔW₀ is the product of the two.
    """
    if prior is None:
        return {}
    scaled_OR = prior.a_OR * prior.scaling
    return {"prior_OR": Column.of(scaled_OR.numpy()), "prior_RI": Column.of(prior.b_RI.numpy())}


def _from_adapter(settings: RequestedSettings, version: Version, adapter: Adapter) -> Initialization:
    """Start from the ΔW of an adapter: with its alpha, or with A rescaled to the requested alpha."""
    start = Initialization(Init.FACTORS, adapter.a_OR, adapter.b_RI, str(version), labels=adapter.labels)
    if settings.alpha is None or settings.alpha == AUTO:
        if adapter.alpha <= 0:
            detail = f"{start.parent} has alpha {adapter.alpha:g}, and training needs one above 0: give alpha"
            expected = f"a number above 0, at most {MAX_ALPHA:g}"
            raise OutOfRange(detail, field="alpha", given=adapter.alpha, expected=expected)
        return replace(start, alpha=adapter.alpha, rslora=adapter.rslora)
    scaling = scaling_of(settings.alpha, version.rank, rslora=False)
    rescaled_OR = adapter.a_OR * (adapter.scaling / scaling if scaling > 0 else math.inf)
    if not bool(torch.isfinite(rescaled_OR).all()):
        detail = f"alpha is too small to start from {start.parent}: A would have to grow past float32"
        raise OutOfRange(detail, field="alpha", given=settings.alpha, expected="a larger alpha")
    return replace(start, a_OR=rescaled_OR)
