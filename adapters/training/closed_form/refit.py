"""Refit from stored statistics: add rows, and remove rows with a bound on the rounding error.

Sums after a subtraction are exact only to rounding of the largest sums before it. If little is left in some direction,
that error is no longer small. `forget` subtracts, and then checks what remains. Each check relies on those before it:

1. XᵀX has no negative eigenvalue (`_check_gram`). Otherwise some rows were never in the sums, which the later checks
   would report as rounding.
2. No free direction owes its small eigenvalue to rounding (`_check_free_directions`). The later checks use G⁻¹ along
   the other directions only, so they cannot see an error there.
3. The fit explains no more than there is to explain (`_check_explained`). Otherwise XᵀR does not belong to these rows,
   and the solution whose error is estimated next is meaningless.
4. Rounding moves ΔW by at most `TOLERANCE` of its size (`_check_solution`).

With G = XᵀX + ridge·1, the movement is estimated to first order: δΔWᵀ = G⁻¹·(δ(XᵀR) − δ(XᵀX)·ΔWᵀ). Entry i, j of δ(XᵀX)
is about ε·√(pᵢ·pⱼ) for the peaks p (Higham 2002, section 7.2, with roots of sums of squares in place of sums, because
roundings are independent). `_Noise` has this model in full.
"""

# I in_features · J = I + 1 · O out_features · K directions kept · 2 near and far
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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
from adapters.training.closed_form.statistics import Statistics, Sums, accumulate_data
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.evaluate import Evaluation
from adapters.training.fit import Fit
from adapters.training.settings import TrainingSpec

# Largest relative difference of ΔW from that of a training without the removed rows.
TOLERANCE = 1e-6
_EPSILON = torch.finfo(torch.float64).eps
# Safety factor of the estimates. Measured errors were up to 9 times the estimate.
_MARGIN = 32.0
# Strength, relative to the strongest direction, below which an error of a direction has no visible effect on ΔW.
_WEAK_DIRECTION = 1e-9


class _Noise(NamedTuple):
    """Rounding errors ε·p for the peaks p of each column's sum of squares: near, and far (zeros if there is no far).

    Entry i, j of a sum of products of two columns has an error of about √(nearᵢ·nearⱼ) + √(nearᵢ·farⱼ) + √(farᵢ·nearⱼ).
    For sums about means, near has the peaks about the means, and far those about zero: the second and third term are
    the error from the rounding of the means. Sums about zero have the first term only, with the peaks about zero.
    """

    columns_2I: Tensor
    """Of each column of x."""
    residuals_2: Tensor
    """Of the residuals, summed over the outputs."""


def forget(
    kept: Statistics,
    gone: Statistics,
    *,
    ridge: float,
    bias: bool,
    rank: int | None = None,
    prior_OI: Tensor | None = None,
) -> Statistics:
    """Return `kept` without the rows of `gone`, exact enough for `solve` with this ridge, bias and prior.

    With `rank`, the choice of directions is checked too: if the last chosen one and the first one left out have nearly
    equal strength, rounding decides between them. Raises `IllConditioned` if rounding could change ΔW by more than
    `TOLERANCE`, if no rows would remain, or if the remainder cannot be a sum over rows, because some rows were never in
    it. (Most such mistakes cannot be detected.) Raises `InvalidCombination` if the shapes differ.
    """
    rest = kept.minus(gone)
    if gone.rows == 0:
        return kept
    # The sum of n weights has a rounding error of up to n·ε times itself. A remainder within it has no exact digit.
    if rest.rows <= 0 or rest.weight <= _EPSILON * kept.weight * kept.rows:
        raise IllConditioned(
            f"no rows would remain: {gone.rows} are to be forgotten of {kept.rows}",
            given=f"{gone.rows} rows",
            expected="some rows that stay; to forget all of them, delete the adapter",
        )
    noise = _noise(kept, rest, bias=bias)
    # Not `sums_for`, which treats a column whose sum of squares has become negative as constant.
    sums = Sums(rest.gram_II, rest.cross_IO, rest.spread) if bias else rest.about_zero()
    _check_gram(sums, noise)
    decomposition = spectrum(sums.gram_II, sums.gram_II.new_tensor(ridge))
    _check_free_directions(sums, decomposition, noise, ridge=ridge)
    _check_solution(sums, decomposition, noise, ridge=ridge, rank=rank, prior_OI=prior_OI)
    return rest


def _noise(kept: Statistics, rest: Statistics, *, bias: bool) -> _Noise:
    """Return the noise of the sums of `rest`, about the means with a bias, else about zero."""
    about_means_J, about_zero_J = _EPSILON * rest.peak_2J
    noise_2J = torch.stack([about_means_J, about_zero_J] if bias else [about_zero_J, torch.zeros_like(about_zero_J)])
    # A column that was always constant, or always 0, has no rounding error.
    is_exact_I = sums_for(kept, bias=bias).gram_II.diagonal() <= 0
    noise_2J = noise_2J.masked_fill(functional.pad(is_exact_I, (0, 1)), 0.0)
    return _Noise(columns_2I=noise_2J[:, :-1], residuals_2=noise_2J[:, -1])


def _error_norm(total_2: Tensor) -> float:
    """Return a bound on the Frobenius norm of a matrix of errors, from the totals of near and far, (2,).

    With uᵢ = √nearᵢ and vᵢ = √farᵢ, the errors are u·uᵀ + u·vᵀ + v·uᵀ. Their norm is at most ‖u‖² + 2·‖u‖·‖v‖, and the
    totals are ‖u‖² and ‖v‖².
    """
    near, far = total_2
    return float(near + 2 * (near * far).sqrt())


def _check_gram(sums: Sums, noise: _Noise) -> None:
    """Raise `IllConditioned` if XᵀX has a negative eigenvalue beyond rounding, unlike any sum over rows.

    An error E moves no eigenvalue by more than ‖E‖ (Weyl's inequality), so the bound is the norm of the error, times
    the margin. Both are taken after scaling to unit diagonal, so that small columns count as much as large ones.
    """
    # A column with less than its own noise is scaled by that noise, so that its rounding is not scaled up to 1.
    diagonal_I = torch.maximum(sums.gram_II.diagonal(), noise.columns_2I[0])
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
    least = torch.linalg.eigvalsh(scale_I[:, None] * sums.gram_II * scale_I)[0]
    if float(least) < -_MARGIN * _error_norm(noise.columns_2I @ scale_I.square()):
        raise _not_in_sums()


def _check_free_directions(sums: Sums, decomposition: Spectrum, noise: _Noise, *, ridge: float) -> None:
    """Raise `IllConditioned` if rounding could have hidden a small eigenvalue among the free directions.

    Columns of zeros are free exactly. Any other free direction has an eigenvalue below the cutoff of the solver. If the
    norm of the error is above the cutoff, the eigenvalue may have been above it too. The bound has no margin, because
    without a subtraction the near terms of the norm are at most I·ε, which the cutoff is never below.
    """
    zero_columns = int((sums.gram_II.diagonal() + ridge == 0).sum())
    has_other_free_directions = int((~decomposition.kept_I).sum()) > zero_columns
    error_norm = _error_norm(noise.columns_2I @ decomposition.scale_I.square())
    if has_other_free_directions and error_norm > float(eigenvalue_cutoff(decomposition.values_I)):
        raise _ill_conditioned("in some direction nothing but rounding is left")


def _check_solution(
    sums: Sums, decomposition: Spectrum, noise: _Noise, *, ridge: float, rank: int | None, prior_OI: Tensor | None
) -> None:
    """Raise `IllConditioned` if the solution explains too much, or if rounding could move it beyond the tolerance."""
    # The minimiser of full rank, from which that of the given rank is a projection.
    (solution_IO,), (basis_OO,) = reduced_rank(
        sums.gram_II[None], sums.cross_IO[None], ridge=ridge, rank=sums.cross_IO.shape[1], prior_OI=prior_OI
    )
    directions_IK = decomposition.kept().whitening()
    # Row i of δ(XᵀR) − δ(XᵀX)·ΔWᵀ has the errors of products of column i with one column whose noise is this.
    combined_2 = noise.columns_2I @ solution_IO.square().sum(1) + noise.residuals_2
    _check_explained(sums, directions_IK, combined_2)
    movement = _MARGIN * _movement(directions_IK, noise, combined_2)
    if rank is not None:
        pulled_IO = sums.cross_IO if prior_OI is None else sums.cross_IO + ridge * prior_OI.to(sums.cross_IO).T
        movement = movement * _amplification(directions_IK.T @ pulled_IO, rank)
    size = torch.linalg.matrix_norm(solution_IO @ basis_OO[:, :rank])
    # Also true if the movement is NaN.
    if not float(movement) <= TOLERANCE * float(size):
        raise _ill_conditioned(f"rounding could move the solution by {float(movement / size):.1e} of its size")


def _check_explained(sums: Sums, directions_IK: Tensor, combined_2: Tensor) -> None:
    """Raise `IllConditioned` if the fit explains more than the sum of squared residuals, unlike any fit to rows.

    The fit explains tr((XᵀR)ᵀ·G⁻¹·XᵀR), which is a sum over K directions. The bound allows an error of the combined
    noise for each of them, times the margin.
    """
    explained = (directions_IK.T @ sums.cross_IO).square().sum()
    if float(explained - sums.square) > _MARGIN * len(directions_IK) * _error_norm(combined_2):
        raise _not_in_sums()


def _movement(directions_IK: Tensor, noise: _Noise, combined_2: Tensor) -> Tensor:
    """Return the estimate of ‖G⁻¹·(δ(XᵀR) − δ(XᵀX)·ΔWᵀ)‖, without the margin.

    Row i of the difference is multiplied by column i of G⁻¹. Its squared norm is the sum, over the three terms of the
    error, of the noise of column i times the combined noise.
    """
    near, far = combined_2
    # Σᵢ noiseᵢ·‖column i of G⁻¹‖², where G⁻¹ = directions·directionsᵀ.
    inverse_near, inverse_far = (
        torch.linalg.matrix_norm(directions_IK @ (directions_IK.T * noise_I.sqrt())).square()
        for noise_I in noise.columns_2I
    )
    squared_norm: Tensor = inverse_near * near + inverse_far * near + inverse_near * far
    return squared_norm.sqrt()


def _amplification(whitened_KO: Tensor, rank: int) -> Tensor:
    """Return how much a truncation amplifies an error: σᵣ / (σᵣ − σᵣ₊₁), from its first derivative.

    σ are the singular values of G^½·ΔWᵀ, (K, O), whose leading right singular vectors the solver keeps. The result is 1
    if nothing of visible effect is truncated, and infinite if rounding decides which direction is the last one.
    """
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
    """Return the closed-form fit with the rows of `data` added to the statistics, and its `gone_*` rows removed.

    Raises `IllConditioned` as `forget` does, and `Diverged` as `solve` does.
    """
    kept = kept.to(base.device)
    data = data.to(base.device)
    statistics = kept.plus(accumulate_data(base, data))
    settings: dict[str, Any] = {"ridge": spec.ridge, "bias": spec.bias, "rank": spec.rank, "prior_OI": data.prior}
    if data.gone is not None:
        statistics = forget(statistics, accumulate_data(base, data.gone), **settings)
    factors = solve(statistics, scaling=spec.scaling, **settings)
    bare = float(statistics.square) / (statistics.weight * base.out_features)
    loss = loss_of_factors(statistics, factors, scaling=spec.scaling)
    losses = {"train_loss": loss, "base_train_loss": bare, "validation_loss": None, "base_validation_loss": None}
    adapter = Adapter(*factors, spec.alpha, spec.rslora, feature_space, None if labels is None else tuple(labels))
    evaluation = Evaluation(losses=losses, rows=statistics.rows)
    return Fit(adapter, evaluation, [(0, bare), (1, loss)], spec, statistics)
