"""What an adapted layer answers, the slow way: `W + s·A·B` formed and multiplied in float64."""

# N rows · I in_features · O out_features · R rank
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer

Float64 = NDArray[np.float64]


def layer(weight_OI: Tensor, bias_O: Tensor | None = None) -> BaseLayer:
    """A base layer of these numbers, from no source."""
    norm = float(np.linalg.norm(weight_OI.double().numpy()))
    return BaseLayer(weight_OI, bias_O, source="numbers", fingerprint="sha256:numbers", weight_norm=norm)


def random_adapter(
    out_features: int,
    in_features: int,
    rank: int,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Adapter:
    """Standard normal factors; alpha is the rank where it is not given, so that s = 1."""
    generator = torch.Generator().manual_seed(seed)
    a_OR, b_RI = (torch.randn(shape, generator=generator) for shape in ((out_features, rank), (rank, in_features)))
    bias_O = torch.randn(out_features, generator=generator) if bias else None
    return Adapter(a_OR, b_RI, bias_O, float(rank if alpha is None else alpha), rslora)


def delta(adapter: Adapter) -> Float64:
    """(O, I): s·A·B."""
    divisor = adapter.rank**0.5 if adapter.rslora else adapter.rank
    product: Float64 = adapter.a_OR.double().numpy() @ adapter.b_RI.double().numpy()
    return product * (adapter.alpha / divisor)


def answer(base: BaseLayer, x_NI: Tensor, adapter: Adapter | None) -> Float64:
    """(N, O): `x·(W + s·A·B)ᵀ + b + s·bias`."""
    weight_OI: Float64 = base.weight_OI.double().numpy()
    shift_O = np.zeros(base.out_features) if base.bias_O is None else base.bias_O.double().numpy()
    if adapter is not None:
        weight_OI = weight_OI + delta(adapter)
        if adapter.bias_O is not None:
            divisor = adapter.rank**0.5 if adapter.rslora else adapter.rank
            shift_O = shift_O + adapter.bias_O.double().numpy() * (adapter.alpha / divisor)
    product: Float64 = x_NI.double().numpy() @ weight_OI.T
    return product + shift_O


def relative_error(given: Float64 | NDArray[np.float32], wanted: Float64) -> float:
    """The largest difference, relative to the largest number that is wanted."""
    return float(np.abs(given - wanted).max() / np.abs(wanted).max())
