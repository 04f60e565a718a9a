"""Ways to compute one batch of mixed adapters in this process: ours, PEFT's, and those that one writes oneself."""

# N rows · I in_features · O out_features · R rank · C distinct adapters · P ranks of all of them
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.lora.forward import mixed_forward
from benchmarks.peft_layer import PeftLayer
from benchmarks.requests import Shape
from benchmarks.servers.layer import make_linear
from benchmarks.stores import as_adapter
from benchmarks.tenants import Factors

Contender = Callable[[], Tensor]
TITLES = {
    "base": "base GEMM alone (the limit)",
    "ours": "**loraplex**, `mixed_forward`",
    "loop": "a loop of `addmm` over runs",
    "sddmm": "SDDMM + SpMM, `sampled_addmm` and `embedding_bag`",
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
        "loop": lambda: _loop(base, adapters, x_NI, choice_N),
        "sddmm": _sddmm(base, adapters, x_NI, choice_N),
        "gather": _gather(base, adapters, x_NI, choice_N),
        "peft": lambda: peft(x_NI, names_N),
        "merge": lambda: _merge(base, adapters, x_NI, choice_N),
    }


def _loop(base: BaseLayer, adapters: Sequence[Adapter], x_NI: Tensor, choice_N: Sequence[int]) -> Tensor:
    """Rows sorted into runs by adapter, and two GEMMs a run."""
    y_NO = torch.nn.functional.linear(x_NI, base.weight_OI, base.bias_O)
    chosen_N = torch.tensor(choice_N)
    order_N = chosen_N.argsort()
    lengths = torch.bincount(chosen_N, minlength=len(adapters)).tolist()
    for adapter, rows_K in zip(adapters, order_N.split(lengths), strict=True):
        if len(rows_K) == 1:
            row = int(rows_K[0])
            y_NO[row].addmv_(adapter.a_OR, torch.mv(adapter.b_RI, x_NI[row]), alpha=adapter.scaling)
        else:
            low_KO = (x_NI[rows_K] @ adapter.b_RI.T) @ adapter.a_OR.T
            y_NO.index_add_(0, rows_K, low_KO, alpha=adapter.scaling)
    return y_NO


def _sddmm(base: BaseLayer, adapters: Sequence[Adapter], x_NI: Tensor, choice_N: Sequence[int]) -> Contender:
    """All factors in two pools; of x·Bᵀ over the pool only the columns of each row's adapter, then their sum over A.

    No padding: a row has as many columns as its adapter has ranks.
    """
    b_PI = torch.cat([adapter.b_RI for adapter in adapters])
    a_PO = torch.cat([adapter.scaling * adapter.a_OR.T for adapter in adapters])
    ends = torch.tensor([adapter.rank for adapter in adapters]).cumsum(0).tolist()
    places = [torch.arange(end - adapter.rank, end) for end, adapter in zip(ends, adapters, strict=True)]

    def forward() -> Tensor:
        y_NO = torch.nn.functional.linear(x_NI, base.weight_OI, base.bias_O)
        columns = torch.cat([places[choice] for choice in choice_N])
        offsets = torch.tensor([0, *(adapters[choice].rank for choice in choice_N)]).cumsum(0)
        wanted_NP = torch.sparse_csr_tensor(offsets, columns, torch.zeros(len(columns)), (len(x_NI), len(b_PI)))
        hidden = torch.sparse.sampled_addmm(wanted_NP, x_NI, b_PI.T).values()
        return y_NO.add_(
            torch.nn.functional.embedding_bag(columns, a_PO, offsets[:-1], mode="sum", per_sample_weights=hidden)
        )

    return forward


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
