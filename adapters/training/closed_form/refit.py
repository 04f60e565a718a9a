"""Taking rows out of statistics: what is left is as if they had never been in, or it is refused.

The sums that are left are exact only to rounding of what they came to before. Where little is left in some direction
that is no longer small against it. How far it moves ΔW is estimated to first order, entry by entry:
δΔWᵀ = G⁻¹·(δ(XᵀR) − δ(XᵀX)·ΔWᵀ) with δ(XᵀX)ᵢⱼ of the size ε·√(pᵢ·pⱼ) for the peaks p (Higham 2002, section 7.2, with
roots of sums of squares in place of sums: roundings are independent).
"""

# I in_features · O out_features · K directions kept
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.errors import IllConditioned
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import (
    Spectrum,
    eigenvalue_cutoff,
    loss_of_factors,
    reduced_rank,
    solve,
    spectrum,
    sums_for,
)
from adapters.training.closed_form.statistics import Statistics, Sums, accumulate
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import Evaluation
from adapters.training.fit import Fit
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import TrainingSpec

TOLERANCE = 1e-6
"""How far, relatively, ΔW may be from that of rows that were never in."""
_EPSILON = torch.finfo(torch.float64).eps
_MARGIN = 32.0
"""What estimates are multiplied by before they are held against a tolerance: measured errors were up to 9 of them."""
_WEAK_DIRECTION = 1e-9
"""Strength, relative to the first, of a direction that adds too little to ΔW for its turning to be seen."""


class _Noise(NamedTuple):
    """ε times the peaks that rounding is relative to.

    Sums about zero are off by √(nearᵢ·nearⱼ). Sums about means are so too, with the peaks about the means, and where
    a mean was rounded by √(nearᵢ·farⱼ) + √(farᵢ·nearⱼ), with those about zero.
    """

    near_I: Tensor
    far_I: Tensor
    near_square: Tensor
    far_square: Tensor

    def of_gram(self, scale_I: Tensor) -> float:
        """A bound on the norm of the error of scale·G·scale."""
        near, far = ((each * scale_I.square()).sum() for each in (self.near_I, self.far_I))
        return float(near + 2 * (near * far).sqrt())

    def of_fit(self, solution_IO: Tensor) -> tuple[Tensor, Tensor]:
        """The squared size of δ(XᵀR) − δ(XᵀX)·ΔWᵀ in row i, over its own peak: for near and for far."""
        squares_I = solution_IO.square().sum(1)
        return (self.near_I @ squares_I) + self.near_square, (self.far_I @ squares_I) + self.far_square


def forget(
    kept: Statistics,
    gone: Statistics,
    *,
    ridge: float,
    bias: bool,
    rank: int | None = None,
    prior_OI: Tensor | None = None,
) -> Statistics:
    """`kept` without the rows of `gone`, good for `solve` with this ridge, bias and prior to `TOLERANCE`.

    With `rank`, the choice of its directions is looked at too: where the last one in and the first one out are nearly
    as strong, rounding decides between them. Raises `IllConditioned` where rounding could move ΔW further than that,
    where no rows would remain, and where what remains cannot be a sum over rows, so that some were never in it (most
    such mistakes cannot be seen: pass rows that are). Raises `InvalidCombination` where the shapes differ.
    """
    rest = kept.minus(gone)
    if gone.rows == 0:
        return kept
    if rest.rows <= 0 or rest.weight <= _EPSILON * kept.weight * kept.rows:
        raise IllConditioned(
            f"no rows would remain: {gone.rows} are to be forgotten of {kept.rows}",
            given=f"{gone.rows} rows",
            expected="some rows that stay; to forget all of them, delete the adapter",
        )
    noise = _noise(kept, rest, bias=bias)
    # Not `sums_for`: that takes a column whose sum of squares has become negative for a constant one.
    sums = Sums(rest.gram_II, rest.cross_IO, rest.spread) if bias else rest.about_zero()
    _check_remainder(sums, noise)
    found = spectrum(sums.gram_II, sums.gram_II.new_tensor(ridge))
    _check_free_directions(sums, found, noise, ridge=ridge)
    _check_movement(sums, found, noise, ridge=ridge, rank=rank, prior_OI=prior_OI)
    return rest


def _noise(kept: Statistics, rest: Statistics, *, bias: bool) -> _Noise:
    # A column that never varied, or was always 0, is known to be that still: no rounding there.
    live_I = sums_for(kept, bias=bias).gram_II.diagonal() > 0
    about_means_J, about_zero_J = _EPSILON * rest.peak_2J
    near_J, far_J = (about_means_J, about_zero_J) if bias else (about_zero_J, torch.zeros_like(about_zero_J))
    return _Noise(torch.where(live_I, near_J[:-1], 0.0), torch.where(live_I, far_J[:-1], 0.0), near_J[-1], far_J[-1])


def _check_remainder(sums: Sums, noise: _Noise) -> None:
    """A sum over rows has no negative eigenvalue beyond rounding."""
    diagonal_I = torch.maximum(sums.gram_II.diagonal(), noise.near_I)
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
    least = torch.linalg.eigvalsh(scale_I[:, None] * sums.gram_II * scale_I)[0]
    if float(least) < -_MARGIN * noise.of_gram(scale_I):
        raise _not_in_sums()


def _check_free_directions(sums: Sums, found: Spectrum, noise: _Noise, *, ridge: float) -> None:
    """Directions that count as free must be that: rounding may neither have hidden a small one nor made one up."""
    absent = int((sums.gram_II.diagonal() + ridge == 0).sum())
    hidden = int((~found.kept_I).sum()) > absent
    if hidden and noise.of_gram(found.scale_I) > float(eigenvalue_cutoff(found.values_I)):
        raise _ill_conditioned("in some direction nothing but rounding is left")


def _check_movement(
    sums: Sums, found: Spectrum, noise: _Noise, *, ridge: float, rank: int | None, prior_OI: Tensor | None
) -> None:
    """Rounding of the size of the noise may move the solution by no more than the tolerance."""
    prior_IO = None if prior_OI is None else prior_OI.to(sums.cross_IO).T
    solution_GIO, basis_GOR = reduced_rank(
        sums.gram_II[None],
        sums.cross_IO[None],
        ridge_G=sums.gram_II.new_tensor([ridge]),
        rank=sums.cross_IO.shape[1],
        prior_GIO=None if prior_IO is None else prior_IO[None],
    )
    directions_IK = (found.scale_I[:, None] * found.vectors_II[:, found.kept_I]) * found.values_I[found.kept_I].rsqrt()
    near, far = noise.of_fit(solution_GIO[0])
    explained = (directions_IK.T @ sums.cross_IO).square().sum()
    if float(explained - sums.square) > _MARGIN * len(directions_IK) * float(near + 2 * (near * far).sqrt()):
        # No fit explains more of the residuals' squares than there is.
        raise _not_in_sums()
    inverse_near, inverse_far = (
        torch.linalg.matrix_norm(directions_IK @ (directions_IK.T * each_I.sqrt())).square()
        for each_I in (noise.near_I, noise.far_I)
    )
    moved = _MARGIN * (inverse_near * near + inverse_far * near + inverse_near * far).sqrt()
    if rank is not None:
        pulled_IO = sums.cross_IO if prior_IO is None else sums.cross_IO + ridge * prior_IO
        moved = moved * _amplification(directions_IK.T @ pulled_IO, rank)
    reached = torch.linalg.matrix_norm(solution_GIO[0] @ basis_GOR[0][:, :rank])
    if not float(moved) <= TOLERANCE * float(reached):
        raise _ill_conditioned(f"rounding could move the solution by {float(moved / reached):.1e} of its size")


def _amplification(whitened_KO: Tensor, rank: int) -> Tensor:
    """How much more a truncation moves than what is truncated: σᵣ / (σᵣ − σᵣ₊₁), from its first derivative."""
    strengths_K = torch.linalg.svdvals(whitened_KO)
    if rank >= len(strengths_K) or strengths_K[rank - 1] <= _WEAK_DIRECTION * strengths_K[0]:
        return whitened_KO.new_ones(())
    last, next_out = strengths_K[rank - 1 : rank + 1]
    return torch.div(last, last - next_out)


def _not_in_sums() -> IllConditioned:
    return IllConditioned(
        "what would remain is no sum over rows: some that are to be forgotten were never in it",
        expected="only rows that were trained on, with the targets and weights that they had",
    )


def _ill_conditioned(why: str) -> IllConditioned:
    return IllConditioned(
        f"what would be left after forgetting is lost in rounding: {why}",
        expected=f"a remainder exact to {TOLERANCE:g}; train again from the rows that stay, or with a larger ridge",
    )


def refit(
    base: BaseLayer,
    kept: Statistics,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    feature_space: str | None,
    labels: Sequence[str | int] | None = None,
) -> Fit:
    """The closed form as if the rows of `data` had been there from the beginning, and its `gone_*` rows never.

    Raises `IllConditioned` where rounding could show, and `Diverged` as `solve` does.
    """
    kept = kept.to(base.device)
    data = data.to(base.device)
    parts = data.parts(None, CHUNK_ROWS)
    statistics = kept.plus(accumulate(base, ((part.inputs_NI, part.targets, part.weights_N) for part in parts)))
    gone = data.gone
    if gone is not None:
        parts = gone.parts(None, CHUNK_ROWS)
        forgotten = accumulate(base, ((part.inputs_NI, part.targets, part.weights_N) for part in parts))
        statistics = forget(
            statistics, forgotten, ridge=spec.ridge, bias=spec.bias, rank=spec.rank, prior_OI=data.prior
        )
    factors = solve(
        statistics, rank=spec.rank, scaling=spec.scaling, ridge=spec.ridge, bias=spec.bias, prior_OI=data.prior
    )
    bare = float(statistics.square) / (statistics.weight * base.out_features)
    loss = loss_of_factors(statistics, factors, scaling=spec.scaling)
    losses = {"train_loss": loss, "base_train_loss": bare, "validation_loss": None, "base_validation_loss": None}
    names = None if labels is None else tuple(labels)
    adapter = Adapter(factors.a_OR, factors.b_RI, factors.bias_O, spec.alpha, spec.rslora, feature_space, names)
    evaluation = Evaluation(losses=losses, rows=statistics.rows)
    return Fit(adapter, evaluation, [(0, bare), (1, loss)], spec, statistics)
