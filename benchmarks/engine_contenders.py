"""Ways to compute one batch of mixed adapters in this process: ours, PEFT's, and the two that one writes oneself."""

# N rows · I in_features · O out_features · R rank · C distinct adapters
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.base_layer import BaseLayer
from adapters.forward import mixed_forward
from benchmarks.peft_layer import PeftLayer
from benchmarks.requests import Shape
from benchmarks.servers.layer import make_linear
from benchmarks.stores import as_adapter
from benchmarks.tenants import Factors

Contender = Callable[[], Tensor]
TITLES = {
    "base": "base GEMM alone (the limit)",
    "ours": "**loraplex**, `mixed_forward`",
    "gather": "gather + bmm",
    "peft": "PEFT, `adapter_names=`",
    "merge": "merge per adapter, `W + A·B`",
}


def contenders(
    base: BaseLayer, tenants: Sequence[Factors], x_NI: Tensor, choice_N: Sequence[int]
) -> dict[str, Contender]:
    """Each takes the same rows and returns (N, O); whatever can be prepared before a request is prepared here."""
    adapters = [as_adapter(tenant) for tenant in tenants]
    shape = Shape(base.in_features, base.out_features)
    peft = PeftLayer(make_linear(shape.in_features, shape.out_features), tenants)
    names_N = [tenants[choice].name for choice in choice_N]
    return {
        "base": lambda: torch.nn.functional.linear(x_NI, base.weight_OI, base.bias_O),
        "ours": lambda: mixed_forward(base, x_NI, adapters, choice_N),
        "gather": _gather(base, adapters, x_NI, choice_N),
        "peft": lambda: peft(x_NI, names_N),
        "merge": lambda: _merge(base, adapters, x_NI, choice_N),
    }


def _gather(base: BaseLayer, adapters: Sequence[Adapter], x_NI: Tensor, choice_N: Sequence[int]) -> Contender:
    """Factors of each row copied side by side, padded with zeros to the largest rank, then two batched GEMMs."""
    largest = max(adapter.rank for adapter in adapters)
    a_COR = torch.zeros(len(adapters), base.out_features, largest)
    b_CRI = torch.zeros(len(adapters), largest, base.in_features)
    for number, adapter in enumerate(adapters):
        a_COR[number, :, : adapter.rank] = adapter.scaling * adapter.a_OR
        b_CRI[number, : adapter.rank] = adapter.b_RI

    def forward() -> Tensor:
        y_NO = torch.nn.functional.linear(x_NI, base.weight_OI, base.bias_O)
        index_N = torch.tensor(choice_N)
        low_NR1 = torch.bmm(b_CRI[index_N], x_NI.unsqueeze(2))
        return y_NO.unsqueeze(2).baddbmm_(a_COR[index_N], low_NR1).squeeze(2)

    return forward


def _merge(base: BaseLayer, adapters: Sequence[Adapter], x_NI: Tensor, choice_N: Sequence[int]) -> Tensor:
    y_NO = torch.empty(len(x_NI), base.out_features)
    chosen_N = torch.tensor(choice_N)
    for number, adapter in enumerate(adapters):
        rows_K = (chosen_N == number).nonzero().squeeze(1)
        merged_OI = torch.addmm(base.weight_OI, adapter.a_OR, adapter.b_RI, alpha=adapter.scaling)
        y_NO[rows_K] = torch.nn.functional.linear(x_NI[rows_K], merged_OI, base.bias_O)
    return y_NO
