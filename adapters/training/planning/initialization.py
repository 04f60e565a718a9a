"""Initial factors of a training, and the adapter that a closed form shrinks towards."""

# O out_features · I in_features · R rank
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from adapters.arrays import matrix
from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.errors import Conflict, InvalidCombination, NotFound, OutOfRange, WrongShape
from adapters.lora.adapter import MAX_ALPHA, Adapter, check_factors, digest_of, scaling_of
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, parse_reference
from adapters.training.data_file import Column, in_memory_column
from adapters.training.planning.request import TrainingRequest
from adapters.training.settings import AUTO, AdapterSource, Init, InitFactors


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFinder:
    """Lookup of adapters that this service can answer with."""

    catalog: Catalog
    base: BaseLayer
    feature_space: str | None

    def find(self, reference: object, *, field: str) -> tuple[Version, Adapter]:
        """Return the version that a reference means, and its adapter.

        Raises the error about the reference, `NotFound`, or `Conflict` for another base layer or feature space.
        """
        parsed = parse_reference(reference, field=field)
        try:
            version, adapter = find_adapter(self.catalog, parsed)
            version.check_servable(self.base, self.feature_space)
        except (NotFound, Conflict) as error:
            raise error.at(field=field) from None
        return version, adapter


@dataclass(frozen=True, slots=True)
class Initialization:
    """Initial factors, with the alpha and the labels of the adapter that they come from."""

    init: Init
    a_OR: torch.Tensor | None = None
    b_RI: torch.Tensor | None = None
    parent: str | None = None
    """Reference of the adapter that the factors come from."""
    alpha: float | None = None
    rslora: bool = False
    labels: Sequence[str | int] | None = None
    """Labels of the outputs of that adapter, if it has some."""

    def description(self) -> Any:
        """Return the JSON value that the job shows."""
        if self.parent is not None:
            return {"adapter": self.parent}
        if self.a_OR is None or self.b_RI is None:
            return self.init.value
        return {"digest": digest_of(save({"A": self.a_OR, "B": self.b_RI}))}

    def columns(self) -> dict[str, Column]:
        """Return the columns of a data file for given factors."""
        if self.a_OR is None or self.b_RI is None:
            return {}
        return {"start_OR": in_memory_column(self.a_OR.numpy()), "start_RI": in_memory_column(self.b_RI.numpy())}


def read_initialization(request: TrainingRequest, adapters: AdapterFinder, *, max_rank: int) -> Initialization:
    """Read `training.init`; raise the error that names the field."""
    init, field = request.settings.init, "training.init"
    if isinstance(init, Init):
        return Initialization(init)
    if request.rank == AUTO:
        raise InvalidCombination(
            "rank cannot be auto where training.init gives factors, which have one",
            field="rank",
            given=AUTO,
            expected="the rank of the factors",
        )
    if isinstance(init, AdapterSource):
        return _from_adapter(request, init.adapter, adapters)
    assert isinstance(init, InitFactors)
    a_OR, b_RI = (
        torch.from_numpy(matrix(value, field=f"{field}.{name}")) for name, value in (("A", init.A), ("B", init.B))
    )
    names = (f"{field}.A", f"{field}.B", f"{field}.bias")
    check_factors(a_OR, b_RI, None, adapters.base, max_rank=max_rank, names=names)
    _check_rank(b_RI.shape[0], request.rank)
    return Initialization(Init.FACTORS, a_OR, b_RI)


def check_label_positions(start: Initialization, labels: Sequence[str | int] | None) -> None:
    """Raise `InvalidCombination` if a label is that of another output of the adapter to start from.

    Its ΔW belongs to the rows of W in their order: moved to the outputs that the training has for its labels, it would
    no longer make the same layer.
    """
    outputs = {label: output for output, label in enumerate(start.labels or ())}
    for output, label in enumerate(labels or ()):
        if outputs.get(label, output) != output:
            raise InvalidCombination(
                f"{str(label)[:40]!r} is the label of output {outputs[label]} of {start.parent}, and of output "
                f"{output} in this training: give data.labels in the order of the adapter",
                field="training.init.adapter",
                given=start.parent,
                expected="an adapter whose labels are those of the same outputs",
            )


def prior_columns(prior: Adapter | None) -> dict[str, Column]:
    """Return the columns of a data file for the adapter to shrink towards.

    s is a factor of A there, so that ΔW₀ is the product of the two.
    """
    if prior is None:
        return {}
    return {
        "prior_OR": in_memory_column((prior.a_OR * prior.scaling).numpy()),
        "prior_RI": in_memory_column(prior.b_RI.numpy()),
    }


def _from_adapter(request: TrainingRequest, reference: object, adapters: AdapterFinder) -> Initialization:
    """Start from the ΔW of an adapter: with its alpha, or with A rescaled to the requested alpha."""
    version, adapter = adapters.find(reference, field="training.init.adapter")
    _check_rank(version.rank, request.rank)
    parent = str(Reference(version.adapter, version.version))
    if request.alpha is not None and request.alpha != AUTO:
        scaling = scaling_of(request.alpha, version.rank, rslora=False)
        rescaled_OR = adapter.a_OR * (adapter.scaling / scaling if scaling > 0 else math.inf)
        if not bool(torch.isfinite(rescaled_OR).all()):
            raise OutOfRange(
                f"alpha is too small to start from {parent}: A would have to grow past float32",
                field="alpha",
                given=request.alpha,
                expected="a larger alpha",
            )
        return Initialization(Init.FACTORS, rescaled_OR, adapter.b_RI, parent, labels=adapter.labels)
    if adapter.alpha <= 0:
        raise OutOfRange(
            f"{parent} has alpha {adapter.alpha:g}, and training needs one above 0: give alpha",
            field="alpha",
            given=adapter.alpha,
            expected=f"a number above 0, at most {MAX_ALPHA:g}",
        )
    return Initialization(
        Init.FACTORS, adapter.a_OR, adapter.b_RI, parent, adapter.alpha, adapter.rslora, adapter.labels
    )


def _check_rank(rank: int, expected: object) -> None:
    if rank != expected:
        raise WrongShape(
            f"training.init has rank {rank}, the request has rank {expected}",
            field="training.init",
            given=f"rank {rank}",
            expected=f"rank {expected}",
        )
