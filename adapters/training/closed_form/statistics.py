"""Sufficient statistics of squared error: sums whose size does not depend on the number of rows.

They are kept about the means, not about zero: in XᵀX, a column whose mean is a thousand times its spread would lose six
digits of that spread. Sums about any other point follow from these. Parts are added and subtracted by the pairwise
update of Chan, Golub & LeVeque 1983 (section 2).
"""

# N rows · I in_features · O out_features · J = I + 1 · G groups · … any leading dimensions
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from adapters.errors import BlobCorrupt, InvalidCombination
from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.limits import CHUNK_ROWS, SUM_CHUNK_NUMBERS

# Rows: x (N, I) and y (N, O), and their weights (N,), or None for weights of 1.
Chunk = tuple[Tensor, Tensor, Tensor | None]

# Most rows at once. In a longer sum over few different numbers, all roundings would have the same sign.
_CHUNK_ROWS = 4096
# Spread relative to the mean below which a column is constant. Rounding in float64 is far below it, and the smallest
# difference in float32 is far above it.
_CONSTANT_TOLERANCE = 1e-13
_LATTICE_BITS = 16


class Sums(NamedTuple):
    """Sums over rows about a point (x₀, r₀)."""

    gram_II: Tensor
    """Σ w·(x − x₀)ᵀ(x − x₀), (…, I, I)."""
    cross_IO: Tensor
    """Σ w·(x − x₀)ᵀ(r − r₀), (…, I, O)."""
    square: Tensor
    """Σ w·‖r − r₀‖², (…)."""


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Sufficient statistics of rows x with residuals r = y − x·Wᵀ − b and weights w, in float64.

    The tensors may have common leading dimensions: a stack, with the statistics of one group each. Never add statistics
    of different base layers.
    """

    count: Tensor
    """(…) int64: number of rows with a weight above 0."""
    total: Tensor
    """(…): Σ w."""
    mean_I: Tensor
    """(…, I): mean of x; 0 without rows."""
    mean_O: Tensor
    """(…, O): mean of r."""
    gram_II: Tensor
    """(…, I, I): Σ w·xᵀx about the means."""
    cross_IO: Tensor
    """(…, I, O): Σ w·xᵀr about the means."""
    spread: Tensor
    """(…): Σ w·‖r‖² about the mean."""
    peak_2J: Tensor
    """(…, 2, I + 1): maxima of Σ w·x² of each column and, last, of Σ w·‖r‖², about the means and about zero, over all
    sums that led here. Rounding errors of these statistics are relative to them."""

    @classmethod
    def zeros(
        cls, in_features: int, out_features: int, *, groups: int | None = None, device: torch.device | None = None
    ) -> "Statistics":
        """Return the statistics of no rows, or a stack of `groups` of them."""
        I, O = in_features, out_features
        lead = () if groups is None else (groups,)
        shapes = ((), (I,), (O,), (I, I), (I, O), (), (2, I + 1))
        sums = [torch.zeros(lead + shape, dtype=torch.float64, device=device) for shape in shapes]
        return cls(torch.zeros(lead, dtype=torch.int64, device=device), *sums)

    def __getitem__(self, group: int | None) -> "Statistics":
        """Return one group of a stack; with None, a stack of these statistics alone."""
        return Statistics(*(getattr(self, field.name)[group] for field in fields(self)))

    def to(self, device: torch.device) -> "Statistics":
        """Return a copy on a device."""
        return Statistics(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def out_features(self) -> int:
        """Return O."""
        return self.mean_O.shape[-1]

    @property
    def rows(self) -> int:
        """Return the number of rows with a weight above 0; not for a stack."""
        return int(self.count)

    @property
    def weight(self) -> float:
        """Return Σ w; not for a stack."""
        return float(self.total)

    @property
    def square(self) -> float:
        """Return Σ w·‖r‖²; not for a stack."""
        return float(self.spread + self.total * self.mean_O.square().sum())

    def constant(self) -> Tensor:
        """Return which columns of x are constant, up to rounding in float64, (…, I) bool."""
        spread_I = self.gram_II.diagonal(dim1=-2, dim2=-1)
        return spread_I <= self.total[..., None] * (_CONSTANT_TOLERANCE * self.mean_I).square()

    def about(self, point_I: Tensor, point_O: Tensor) -> Sums:
        """Return the sums about a point other than the means."""
        gap_I, gap_O = self.mean_I - point_I, self.mean_O - point_O
        pull_I = self.total[..., None] * gap_I
        return Sums(
            self.gram_II + _outer(pull_I, gap_I),
            self.cross_IO + _outer(pull_I, gap_O),
            self.spread + self.total * gap_O.square().sum(-1),
        )

    def about_zero(self) -> Sums:
        """Return weighted XᵀX, XᵀR and tr RᵀR."""
        return self.about(torch.zeros_like(self.mean_I), torch.zeros_like(self.mean_O))

    def plus(self, other: "Statistics") -> "Statistics":
        """Return the statistics of the rows of both. Raise `InvalidCombination` if their shapes differ."""
        return self._joined(other, 1)

    def minus(self, other: "Statistics") -> "Statistics":
        """Return the statistics without the rows of `other`, which must be among them (`refit.forget` checks that).

        Raises `InvalidCombination` if their shapes differ.
        """
        rest = self._joined(other, -1)
        # A constant column is constant in every part, so the rest of its spread is rounding.
        varies_I = ~self.constant()
        rest.gram_II.mul_(_outer(varies_I, varies_I))
        rest.cross_IO.mul_(varies_I[..., None])
        return rest

    def _joined(self, other: "Statistics", sign: int) -> "Statistics":
        if self.cross_IO.shape != other.cross_IO.shape:
            own, given = (tuple(part.cross_IO.shape) for part in (self, other))
            text = f"statistics of shape {given} cannot be joined to those of shape {own} (inputs, outputs)"
            raise InvalidCombination(text, given=str(given), expected=f"statistics of shape {own}")
        total = self.total + sign * other.total
        share = torch.where(total > 0, sign * other.total / torch.where(total > 0, total, 1.0), 0.0)
        gap_I, gap_O = other.mean_I - self.mean_I, other.mean_O - self.mean_O
        pull_I = (self.total * share)[..., None] * gap_I
        mean_I, mean_O = self.mean_I + share[..., None] * gap_I, self.mean_O + share[..., None] * gap_O
        gram_II = self.gram_II + sign * other.gram_II + _outer(pull_I, gap_I)
        cross_IO = self.cross_IO + sign * other.cross_IO + _outer(pull_I, gap_O)
        spread = self.spread + sign * other.spread + self.total * share * gap_O.square().sum(-1)
        peak_2J = torch.maximum(self.peak_2J, other.peak_2J)
        peak_2J = torch.maximum(peak_2J, _peaks(total, mean_I, mean_O, gram_II, spread))
        count = self.count + sign * other.count
        return Statistics(count, total, mean_I, mean_O, gram_II, cross_IO, spread, peak_2J)

    def to_bytes(self) -> bytes:
        """Return a safetensors file. Equal statistics have equal bytes."""
        return save({field.name: getattr(self, field.name).cpu().contiguous() for field in fields(self)})

    @classmethod
    def from_bytes(cls, content: bytes) -> "Statistics":
        """Return the statistics (not a stack) of `to_bytes`, on the CPU; raise `BlobCorrupt` if they are malformed."""
        try:
            tensors = load(content)
            statistics = cls(**tensors)
            like = cls.zeros(statistics.mean_I.shape[0], statistics.mean_O.shape[0])
        except (SafetensorError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BlobCorrupt(f"stored statistics cannot be read: {error}") from None
        for name, tensor in tensors.items():
            expected: Tensor = getattr(like, name)
            same_form = (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
            if not same_form or not bool(torch.isfinite(tensor).all()):
                raise BlobCorrupt(
                    f"stored statistics cannot be read: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                    f"expected finite {expected.dtype} of shape {tuple(expected.shape)}"
                )
        return statistics


def base_outputs(base: BaseLayer, x_NI: Tensor) -> Tensor:
    """Return the outputs of the base layer, (…, I) -> (…, O), in the dtype of x."""
    bias_O = None if base.bias_O is None else base.bias_O.to(x_NI.dtype)
    return functional.linear(x_NI, base.weight_OI.to(x_NI.dtype), bias_O)


def accumulate_data(base: BaseLayer, data: TrainingData, rows_K: Tensor | None = None) -> Statistics:
    """Return the statistics of these rows of the data (None: all), which are read in chunks."""
    parts = data.parts(rows_K, CHUNK_ROWS)
    return accumulate(base, ((part.inputs_NI, part.targets, part.weights_N) for part in parts))


def accumulate(base: BaseLayer, chunks: Iterable[Chunk], *, groups: int | None = None) -> Statistics:
    """Return the statistics of all rows. The chunks may have any length; each is dropped before the next one is read.

    x (N, I) and y (N, O) are float32; weights (N,) are finite and not negative, or None. The base's device computes.
    groups: all tensors have a leading dimension G, and so has the result, which is G·(I + O)·I numbers of float64.
    Padding rows are finite and have weight 0.
    """
    statistics = Statistics.zeros(base.in_features, base.out_features, groups=groups, device=base.device)
    chunk_rows = SUM_CHUNK_NUMBERS // ((groups or 1) * (base.in_features + base.out_features))
    chunk_rows = min(max(1, chunk_rows), _CHUNK_ROWS)
    for x_NI, y_NO, weights_N in chunks:
        for begin in range(0, x_NI.shape[-2], chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            part_N = None if weights_N is None else weights_N[..., rows]
            statistics = statistics.plus(_statistics_of_rows(base, x_NI[..., rows, :], y_NO[..., rows, :], part_N))
    return statistics


def _statistics_of_rows(base: BaseLayer, x_NI: Tensor, y_NO: Tensor, weights_N: Tensor | None) -> Statistics:
    x_NI, y_NO = (rows.to(base.device).double() for rows in (x_NI, y_NO))
    r_NO = y_NO - base_outputs(base, x_NI)
    if weights_N is None:
        is_counted_N = None
        total, count = x_NI.new_full(x_NI.shape[:-2], x_NI.shape[-2]), torch.tensor(x_NI.shape[-2], device=base.device)
    else:
        weights_N = weights_N.to(base.device).double()
        is_counted_N = weights_N > 0
        total, count = weights_N.sum(-1), is_counted_N.sum(-1)
    near_I, near_O = lattice_mean(x_NI, is_counted_N), lattice_mean(r_NO, is_counted_N)
    dx_NI, dr_NO = x_NI - near_I[..., None, :], r_NO - near_O[..., None, :]
    wx_NI, wr_NO = (rows if weights_N is None else rows * weights_N[..., None] for rows in (dx_NI, dr_NO))
    safe = torch.where(total > 0, total, 1.0)[..., None]
    # The means relative to the points are small, so subtracting them loses no digits.
    gap_I, gap_O = wx_NI.sum(-2) / safe, wr_NO.sum(-2) / safe
    pull_I = total[..., None] * gap_I
    gram_II = dx_NI.mT @ wx_NI
    gram_II = (gram_II + gram_II.mT) / 2 - _outer(pull_I, gap_I)
    cross_IO = dx_NI.mT @ wr_NO - _outer(pull_I, gap_O)
    spread = (dr_NO * wr_NO).sum((-2, -1)) - total * gap_O.square().sum(-1)
    mean_I, mean_O = near_I + gap_I, near_O + gap_O
    peak_2J = _peaks(total, mean_I, mean_O, gram_II, spread)
    return Statistics(count.expand(total.shape), total, mean_I, mean_O, gram_II, cross_IO, spread, peak_2J)


def _outer(left_I: Tensor, right_O: Tensor) -> Tensor:
    """Return the outer product, (…, I) and (…, O) -> (…, I, O)."""
    return left_I[..., None] * right_O[..., None, :]


def _peaks(total: Tensor, mean_I: Tensor, mean_O: Tensor, gram_II: Tensor, spread: Tensor) -> Tensor:
    """Return Σ w·x² of each column and, last, Σ w·‖r‖², about the means and about zero, (…, 2, I + 1)."""
    near_J = torch.cat([gram_II.diagonal(dim1=-2, dim2=-1), spread[..., None]], dim=-1)
    level_J = torch.cat([mean_I.square(), mean_O.square().sum(-1, keepdim=True)], dim=-1)
    return torch.stack([near_J, near_J + total[..., None] * level_J], dim=-2)


def lattice_mean(rows_NI: Tensor, is_counted_N: Tensor | None) -> Tensor:
    """Return a point near the mean, with few significant bits, of the counted rows (None: all).

    Differences from it, and sums of their products, are exact if a column has counts, flags or classes, so that one-hot
    columns stay exactly dependent. The point of a constant column is its value, and 0 without rows.
    """
    if is_counted_N is None:
        lowest_I, highest_I, mean_I = rows_NI.amin(-2), rows_NI.amax(-2), rows_NI.mean(-2)
    else:
        out_N1 = ~is_counted_N[..., None]
        lowest_I = rows_NI.masked_fill(out_N1, torch.inf).amin(-2)
        highest_I = rows_NI.masked_fill(out_N1, -torch.inf).amax(-2)
        counted = is_counted_N.sum(-1, keepdim=True)
        mean_I = rows_NI.masked_fill(out_N1, 0.0).sum(-2) / counted.clamp(min=1)
        lowest_I, highest_I = (torch.where(counted > 0, bound_I, 0.0) for bound_I in (lowest_I, highest_I))
    exponent_I = torch.frexp(torch.maximum(lowest_I.abs(), highest_I.abs())).exponent
    unit_I = torch.ldexp(torch.ones_like(mean_I), exponent_I - _LATTICE_BITS)
    return torch.where(lowest_I == highest_I, lowest_I, (mean_I / unit_I).round() * unit_I)
