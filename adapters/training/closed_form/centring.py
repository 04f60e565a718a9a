"""Where to centre columns before their squares are summed."""

# N rows · I columns · … any leading dimensions
import torch
from torch import Tensor

_LATTICE_BITS = 16


def near_the_mean(rows_NI: Tensor, counts_N: Tensor | None) -> Tensor:
    """A point near the mean of the rows that count, with so few bits that differences from it, and sums of their
    products, are exact where the column holds counts, flags or classes: one-hot columns stay exactly dependent.

    For a column of one number it is that number, and 0 where no row counts.
    """
    if counts_N is None:
        lowest_I, highest_I, mean_I = rows_NI.amin(-2), rows_NI.amax(-2), rows_NI.mean(-2)
    else:
        out_N1 = ~counts_N[..., None]
        lowest_I = rows_NI.masked_fill(out_N1, torch.inf).amin(-2)
        highest_I = rows_NI.masked_fill(out_N1, -torch.inf).amax(-2)
        counted = counts_N.sum(-1, keepdim=True)
        mean_I = rows_NI.masked_fill(out_N1, 0.0).sum(-2) / counted.clamp(min=1)
        lowest_I, highest_I = (torch.where(counted > 0, each, 0.0) for each in (lowest_I, highest_I))
    exponent_I = torch.frexp(torch.maximum(lowest_I.abs(), highest_I.abs())).exponent
    unit_I = torch.ldexp(torch.ones_like(mean_I), exponent_I - _LATTICE_BITS)
    return torch.where(lowest_I == highest_I, lowest_I, (mean_I / unit_I).round() * unit_I)
