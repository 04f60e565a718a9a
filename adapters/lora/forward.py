"""Forward of one batch whose rows use different adapters."""

# N rows · K some of them · I in_features · O out_features · R rank · C choices
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.lora.adapter import RECORD, Adapter
from adapters.lora.base_layer import BaseLayer

# Most rows times rank for the kernel if all rows use one adapter. Beyond it, two GEMMs are faster.
_KERNEL_MAX_RANK_ROWS = 512
_NO_TERM = RECORD.pack(0, 0, 0, 0, 0.0)


def load_kernel() -> None:
    """Import the CPU kernel, which numba compiles in most of a second.

    A service does so before it is ready. Elsewhere the first batch that needs the kernel does.
    """
    global _add_low_rank_terms
    from adapters.lora.kernel import add_low_rank_terms

    _add_low_rank_terms = add_low_rank_terms


def _load_and_add(*arguments: Any) -> None:
    load_kernel()
    _add_low_rank_terms(*arguments)


_add_low_rank_terms: Callable[..., None] = _load_and_add


def low_rank_term(x_KI: Tensor, adapter: Adapter) -> Tensor:
    """Return s·((x·Bᵀ)·Aᵀ + bias), (K, I) -> (K, O) (Hu et al. 2021, eq. 3). `W + A·B` is never formed."""
    low_KO = (x_KI @ adapter.b_RI.T) @ adapter.a_OR.T
    if adapter.bias_O is not None:
        low_KO += adapter.bias_O
    return low_KO.mul_(adapter.scaling)


def mixed_forward(base: BaseLayer, x_NI: Tensor, choices: Sequence[Adapter | None], choice_N: Sequence[int]) -> Tensor:
    """Return the outputs (N, O): one base GEMM for all rows, plus for row n the term of `choices[choice_N[n]]`.

    A choice of None is the bare base layer. Adapters and x_NI (N, I) are on the base's device, in its dtype. Outputs
    may be infinite or NaN if inputs and factors are large.
    """
    y_NO = base.forward(x_NI)
    if all(adapter is None for adapter in choices):
        return y_NO
    on_cpu = x_NI.device.type == "cpu"
    only = choices[0] if len(choices) == 1 else None
    if only is not None and (not on_cpu or only.rank * len(x_NI) > _KERNEL_MAX_RANK_ROWS):
        y_NO += low_rank_term(x_NI, only)
    elif on_cpu:
        chosen_N = np.asarray(choice_N, dtype=np.int64)
        # Sorted by adapter, so that its factors stay in the processor's cache from one row to the next.
        order_N = chosen_N.argsort(kind="stable")
        records = b"".join([_NO_TERM if adapter is None else adapter.record for adapter in choices])
        _add_low_rank_terms(y_NO.numpy(), x_NI.contiguous().numpy(), records, chosen_N, order_N)
    else:
        add_gathered_terms(y_NO, x_NI, choices, choice_N)
    return y_NO


def add_gathered_terms(y_NO: Tensor, x_NI: Tensor, choices: Sequence[Adapter | None], choice_N: Sequence[int]) -> None:
    """Add the low-rank terms to y_NO with batched matmuls over gathered factors, one pair for each rank. For CUDA."""
    chosen_K = [(row, adapter) for row, choice in enumerate(choice_N) if (adapter := choices[choice]) is not None]
    chosen_K.sort(key=lambda chosen: chosen[1].rank)
    for _, same_rank in groupby(chosen_K, key=lambda chosen: chosen[1].rank):
        rows, adapters = zip(*same_rank, strict=True)
        index_K = torch.tensor(rows, device=x_NI.device)
        scaling_K = torch.tensor([adapter.scaling for adapter in adapters]).to(x_NI)
        hidden_KR1 = torch.bmm(torch.stack([adapter.b_RI for adapter in adapters]), x_NI[index_K].unsqueeze(2))
        low_KO = torch.bmm(torch.stack([adapter.a_OR for adapter in adapters]), hidden_KR1).squeeze(2)
        for position, adapter in enumerate(adapters):
            if adapter.bias_O is not None:
                low_KO[position] += adapter.bias_O
        y_NO.index_add_(0, index_K, low_KO * scaling_K.unsqueeze(1))
