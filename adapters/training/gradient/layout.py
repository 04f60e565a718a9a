"""In which shapes adapters are trained: in a few only, so that those of a fleet share them, each as if it were alone.

Linear algebra adds up in an order that depends on a matrix's shape and on where it begins in memory, and gradient
descent lets the last bit grow: where a gradient is all rounding, AdamW divides it by its own size. So the rows of each
adapter are a matrix of their own, which begins on a cache line, and whose length depends on their number alone.
"""

# G adapters · N rows of the data · K rows of one adapter, filled up · T rows of all of them, filled up
# I in_features · O out_features
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData

LINE = 16
"""float32 numbers in a cache line of 64 bytes."""
VECTOR = 8
"""float32 numbers in 32 bytes. A product that begins on these came out the same wherever that was, on x86."""
_FEWEST_ROWS = 4
"""A product with a single row or column goes another way, which depends on how many there are in a stack."""
_MOST_ROWS = 4096
_MOST_NUMBERS = 2**22
"""An adapter with more than this is trained from where its rows are: they would not be laid out in little memory."""


class Batch(NamedTuple):
    """What one step sees: for each adapter its rows."""

    x_GKI: Tensor
    frozen_GOK: Tensor
    """The base layer's answers."""
    targets: Tensor
    """(G, O, K) float32, or (G, K) int64."""
    weights_GK: Tensor | None
    """0 for what only fills up; None where every row counts 1."""
    documents_GK: Tensor | None
    """For `multiple_negatives`: equal targets have equal numbers, what only fills up has -1."""

    def of(self, places: Sequence[int]) -> "Batch":
        """These adapters' part."""
        places_G = torch.tensor(places, dtype=torch.int64, device=self.x_GKI.device)
        return Batch(*(None if part is None else part.index_select(0, places_G) for part in self))  # type: ignore[arg-type]


class Laid(NamedTuple):
    """Rows of adapters under one another, those of each filled up with its first one."""

    x_TI: Tensor
    frozen: Sequence[Tensor]
    """(g, O, K) each: the base layer's answers for as many adapters as have one number of rows."""
    targets_T: Tensor
    weights_T: Tensor | None
    documents_T: Tensor | None

    def answers(self) -> Tensor:
        """(T, O): the base layer's, row by row."""
        return torch.cat([frozen_gOK.transpose(1, 2).flatten(0, 1) for frozen_gOK in self.frozen])

    def batch(self, rows: int) -> Batch:
        """All of them, where each adapter has so many."""
        (frozen_GOK,) = self.frozen
        targets = self.targets_T.unflatten(0, (-1, rows))
        return Batch(
            self.x_TI.unflatten(0, (-1, rows)),
            frozen_GOK,
            targets.transpose(1, 2).contiguous() if targets.dim() == 3 else targets,
            None if self.weights_T is None else self.weights_T.unflatten(0, (-1, rows)),
            None if self.documents_T is None else self.documents_T.unflatten(0, (-1, rows)),
        )


def laid_rows(rows: int, *widths: int) -> int:
    """How many rows so many are filled up to: at most a sixteenth more, once they are many.

    A matrix of that many rows with one of these widths is whole cache lines.
    """
    least = max(_FEWEST_ROWS, LINE // math.gcd(LINE, *widths))
    return _up_to(rows, max(least, 1 << max(0, (rows - 1).bit_length() - 5)))


def laid_numbers(numbers: int) -> int:
    """The same for numbers in a row."""
    return _up_to(numbers, LINE)


def is_laid(rows: int, batch: int, base: BaseLayer) -> bool:
    """Whether an adapter with so many rows, and so many in a batch, is trained in such a shape."""
    return batch <= _MOST_ROWS and rows * (base.in_features + 2 * base.out_features) <= _MOST_NUMBERS


def lay(
    base: BaseLayer,
    data: TrainingData,
    rows: Sequence[Tensor],
    lengths: Sequence[int],
    documents_N: Tensor | None = None,
) -> Laid:
    """The rows of each adapter, by their numbers in `data`, filled up to its length."""
    rows_T, there_T = (part.to(base.device) for part in fill_up(rows, torch.tensor(lengths)))
    x_TI = data.inputs_NI.index_select(0, rows_T)
    weights_T = None if data.weights_N is None else data.weights_N[rows_T]
    documents_T = None if documents_N is None else documents_N[rows_T]
    if not bool(there_T.all()):
        weights_T = there_T.float() if weights_T is None else weights_T * there_T
        documents_T = None if documents_T is None else documents_T.masked_fill(~there_T, -1)
    answers, begin = [], 0
    for K, some in itertools.groupby(lengths):
        end = begin + K * len(list(some))
        answers.append(frozen_stack(base, x_TI[begin:end].unflatten(0, (-1, K))))
        begin = end
    return Laid(x_TI, answers, data.targets.index_select(0, rows_T), weights_T, documents_T)


def fill_up(rows: Sequence[Tensor], lengths_G: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) int64: the rows of each adapter, filled up to its length with its first one; (T,) bool: which are there."""
    counts_G = torch.tensor([len(rows_K) for rows_K in rows])
    place_T = torch.arange(int(lengths_G.sum())) - _begins(lengths_G).repeat_interleave(lengths_G)
    there_T = place_T < counts_G.repeat_interleave(lengths_G)
    begin_T = _begins(counts_G).repeat_interleave(lengths_G)
    return torch.cat(list(rows))[begin_T + place_T * there_T], there_T


def _begins(lengths_G: Tensor) -> Tensor:
    return lengths_G.cumsum(0) - lengths_G


def frozen(base: BaseLayer, x_NI: Tensor) -> Tensor:
    """(N, O) float32: the base layer's answers."""
    bias_O = None if base.bias_O is None else base.bias_O.float()
    return functional.linear(x_NI, base.weight_OI.float(), bias_O)


def frozen_stack(base: BaseLayer, x_GKI: Tensor) -> Tensor:
    """(G, O, K) in the dtype of `x_GKI`: the same, each adapter's columns a product of their own."""
    weight_OI = base.weight_OI.to(x_GKI.dtype)
    weight_GOI, x_GIK = weight_OI.expand(len(x_GKI), *weight_OI.shape), x_GKI.transpose(1, 2)
    if base.bias_O is None:
        return torch.bmm(weight_GOI, x_GIK)
    bias_O1 = base.bias_O.to(x_GKI.dtype).unsqueeze(1)
    return torch.baddbmm(bias_O1.expand(len(x_GKI), len(bias_O1), x_GKI.shape[1]), weight_GOI, x_GIK)


def _up_to(number: int, step: int) -> int:
    return -(-number // step) * step
