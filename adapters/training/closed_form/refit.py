"""Refit from stored statistics: add rows, and remove rows with a bound on the rounding error.

Sums after a subtraction are exact only to rounding of the largest sums before it. If little is left in some direction,
that error is no longer small. How far it moves ΔW is estimated to first order, element by element:
δΔWᵀ = G⁻¹·(δ(XᵀR) − δ(XᵀX)·ΔWᵀ), where δ(XᵀX)ᵢⱼ is about ε·√(pᵢ·pⱼ) for the peaks p (Higham 2002, section 7.2, with
roots of sums of squares in place of sums, because roundings are independent).
"""

# I in_features · J = I + 1 · O out_features · K directions kept
from collections.abc import Sequence
from typing import Any

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
    if rest.rows <= 0 or rest.weight <= _EPSILON * kept.weight * kept.rows:
        raise IllConditioned(
            f"no rows would remain: {gone.rows} are to be forgotten of {kept.rows}",
            given=f"{gone.rows} rows",
            expected="some rows that stay; to forget all of them, delete the adapter",
        )
    noise_2J = _noise(kept, rest, bias=bias)
    # Not `sums_for`, which treats a column whose sum of squares has become negative as constant.
    sums = Sums(rest.gram_II, rest.cross_IO, rest.spread) if bias else rest.about_zero()
    _check_remainder(sums, noise_2J)
    decomposition = spectrum(sums.gram_II, sums.gram_II.new_tensor(ridge))
    _check_free_directions(sums, decomposition, noise_2J, ridge=ridge)
    _check_movement(sums, decomposition, noise_2J, ridge=ridge, rank=rank, prior_OI=prior_OI)
    return rest


def _noise(kept: Statistics, rest: Statistics, *, bias: bool) -> Tensor:
    """Return the rounding errors ε·p of each column of x and, last, of the squared residuals, (2, I + 1): near and far.

    Sums about zero have an error of √(nearᵢ·nearⱼ). Sums about means have that error with the peaks about the means,
    and from the rounding of the means √(nearᵢ·farⱼ) + √(farᵢ·nearⱼ), with the peaks about zero.
    """
    about_means_J, about_zero_J = _EPSILON * rest.peak_2J
    noise_2J = torch.stack([about_means_J, about_zero_J] if bias else [about_zero_J, torch.zeros_like(about_zero_J)])
    # A column that was always constant, or always 0, has no rounding error.
    is_exact_I = sums_for(kept, bias=bias).gram_II.diagonal() <= 0
    return noise_2J.masked_fill(functional.pad(is_exact_I, (0, 1)), 0.0)


def _noise_of_gram(noise_2J: Tensor, scale_I: Tensor) -> float:
    """Return a bound on the norm of the error of scale·G·scale."""
    near, far = noise_2J[:, :-1] @ scale_I.square()
    return float(near + 2 * (near * far).sqrt())


def _check_remainder(sums: Sums, noise_2J: Tensor) -> None:
    """Raise `IllConditioned` if the remainder has a negative eigenvalue beyond rounding, unlike any sum over rows."""
    diagonal_I = torch.maximum(sums.gram_II.diagonal(), noise_2J[0, :-1])
    scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
    least = torch.linalg.eigvalsh(scale_I[:, None] * sums.gram_II * scale_I)[0]
    if float(least) < -_MARGIN * _noise_of_gram(noise_2J, scale_I):
        raise _not_in_sums()


def _check_free_directions(sums: Sums, decomposition: Spectrum, noise_2J: Tensor, *, ridge: float) -> None:
    """Raise `IllConditioned` if rounding could have hidden a small eigenvalue among the free directions."""
    absent = int((sums.gram_II.diagonal() + ridge == 0).sum())
    hidden = int((~decomposition.kept_I).sum()) > absent
    if hidden and _noise_of_gram(noise_2J, decomposition.scale_I) > float(eigenvalue_cutoff(decomposition.values_I)):
        raise _ill_conditioned("in some direction nothing but rounding is left")


def _check_movement(
    sums: Sums, decomposition: Spectrum, noise_2J: Tensor, *, ridge: float, rank: int | None, prior_OI: Tensor | None
) -> None:
    """Raise `IllConditioned` if rounding could move the solution by more than the tolerance."""
    (solution_IO,), (basis_OR,) = reduced_rank(
        sums.gram_II[None], sums.cross_IO[None], ridge=ridge, rank=sums.cross_IO.shape[1], prior_OI=prior_OI
    )
    directions_IK = decomposition.kept().whitening()
    # Squared size of δ(XᵀR) − δ(XᵀX)·ΔWᵀ in row i, divided by its own peak.
    near, far = noise_2J[:, :-1] @ solution_IO.square().sum(1) + noise_2J[:, -1]
    explained = (directions_IK.T @ sums.cross_IO).square().sum()
    if float(explained - sums.square) > _MARGIN * len(directions_IK) * float(near + 2 * (near * far).sqrt()):
        # No fit explains more than the sum of squared residuals.
        raise _not_in_sums()
    inverse_near, inverse_far = (
        torch.linalg.matrix_norm(directions_IK @ (directions_IK.T * noise_I.sqrt())).square()
        for noise_I in noise_2J[:, :-1]
    )
    moved = _MARGIN * (inverse_near * near + inverse_far * near + inverse_near * far).sqrt()
    if rank is not None:
        pulled_IO = sums.cross_IO if prior_OI is None else sums.cross_IO + ridge * prior_OI.to(sums.cross_IO).T
        moved = moved * _amplification(directions_IK.T @ pulled_IO, rank)
    reached = torch.linalg.matrix_norm(solution_IO @ basis_OR[:, :rank])
    if not float(moved) <= TOLERANCE * float(reached):
        raise _ill_conditioned(f"rounding could move the solution by {float(moved / reached):.1e} of its size")


def _amplification(whitened_KO: Tensor, rank: int) -> Tensor:
    """Return how much a truncation amplifies an error: σᵣ / (σᵣ − σᵣ₊₁), from its first derivative."""
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
