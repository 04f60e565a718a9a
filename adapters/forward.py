"""The mixed-adapter forward of one batch."""

# N rows · I in_features · O out_features · R rank · K rows of one adapter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.base_layer import BaseLayer


def low_rank_term(x_KI: Tensor, adapter: Adapter) -> Tensor:
    """(K, I) → (K, O): s·((x·Bᵀ)·Aᵀ + bias), Hu et al. 2021, eq. 3; `W + A·B` is never formed."""
    low_KO = (x_KI @ adapter.b_RI.T) @ adapter.a_OR.T
    if adapter.bias_O is not None:
        low_KO += adapter.bias_O
    return low_KO.mul_(adapter.scaling)


def mixed_forward(base: BaseLayer, x_NI: Tensor, choices: Sequence[Adapter | None], choice_N: Sequence[int]) -> Tensor:
    """(N, I) → (N, O): one base GEMM for all rows, plus for row n the term of `choices[choice_N[n]]`.

    A choice that is None is the bare base layer. Adapters and `x_NI` are on the base's device in its dtype.
    The answer may have numbers that are not finite where the inputs and factors are large.
    """
    y_NO = torch.nn.functional.linear(x_NI, base.weight_OI, base.bias_O)
    if len(choices) == 1:
        if choices[0] is not None:
            y_NO += low_rank_term(x_NI, choices[0])
        return y_NO
    chosen_N = np.asarray(choice_N)
    for position, adapter in enumerate(choices):
        if adapter is not None:
            rows_K = torch.from_numpy(np.flatnonzero(chosen_N == position)).to(x_NI.device)
            y_NO.index_add_(0, rows_K, low_rank_term(x_NI[rows_K], adapter))
    return y_NO
