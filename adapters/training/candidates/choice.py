"""Choice of a combination for each group of a fleet: by its own left-out rows, and by those of the other groups.

Beside its own rows, a group counts some rows with the mean loss of the other groups, so that a tiny group does not
choose by noise.
"""

# G groups of a stack · N rows of a group, padded · E fits of `small` · X combinations
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.training.candidates.small import Candidates, Search, Stack
from adapters.training.settings import Candidate

# Rows with the mean loss of the other groups that count beside a group's own.
PSEUDO_ROWS = 100
# Gain of the other groups, in right answers per row, below which the base layer is kept.
_MIN_GAIN = 0.02
# Standard errors by which a group's own loss must be lower to leave the base layer: in a fleet, and alone.
_CLEAR, _CLEAR_ALONE = 3.0, 0.5
# Most units of loss of a group of numbers that count for other groups.
_MAX_UNITS = 4.0
# Stacks of a large fleet, of small and of large groups, that decide what is compared for all.
_DECIDING_STACKS = 2


class Others(NamedTuple):
    """Means over the rows of all other groups, for each group of a stack."""

    losses_GX: Tensor
    """Mean loss of left-out rows."""
    gains_GX: Tensor
    """Mean gain over the base layer, less its standard error; for classes, in right answers per row.

    Rows that several groups have do not count: what a group starts from has seen them, although they are left out.
    """


def choose(search: Search, others: Others | None, *, can_keep_base: bool, is_regression: bool) -> Tensor:
    """Return the combination with the lowest loss for each fit, (G, E) int64.

    can_keep_base: whether the first combination is the base layer. For classes, it is then kept unless the other groups
    gain right answers by the combination, or the loss of the group's own rows is lower by several standard errors.
    """
    losses_GEX, weights_GE1 = search.losses_GEX, search.weights_GE[..., None]
    means_GEX = losses_GEX / weights_GE1.clamp_min(1e-300)
    if others is not None:
        means_GEX = (losses_GEX + PSEUDO_ROWS * others.losses_GX[:, None]) / (weights_GE1 + PSEUDO_ROWS)
    chosen_GE = means_GEX.argmin(-1)
    if not can_keep_base or is_regression:
        return chosen_GE
    chosen_GE1 = chosen_GE[..., None]
    rows_GE = search.weights_GE.clamp_min(1.0)
    gain_GE = (losses_GEX[..., 0] - losses_GEX.gather(-1, chosen_GE1)[..., 0]) / rows_GE
    squares_GE = search.squares_GEX.gather(-1, chosen_GE1)[..., 0] / rows_GE
    error_GE = ((squares_GE - gain_GE.square()).clamp_min(0) / rows_GE).sqrt()
    is_clear_GE = gain_GE > (_CLEAR_ALONE if others is None else _CLEAR) * error_GE
    if others is not None:
        is_clear_GE = is_clear_GE | (others.gains_GX.gather(1, chosen_GE) >= _MIN_GAIN)
    return torch.where(is_clear_GE, chosen_GE, 0)


class _Gains(NamedTuple):
    """Gains over the first combination in outer folds, as sums over the rows that only one group has, float64."""

    sums_GX: Tensor
    squares_GX: Tensor
    weights_G1: Tensor

    @classmethod
    def of(cls, search: Search, stack: Stack) -> "_Gains":
        """Return those of each group of a stack."""
        gains_GXN = (search.errors_GXN[:, :1] - search.errors_GXN).double()
        return cls.sums(gains_GXN, stack.weights_GN * ~stack.is_shared_GN)

    @classmethod
    def sums(cls, gains_GXN: Tensor, weights_GN: Tensor) -> "_Gains":
        """Return the sums of the gains of rows."""
        sums_GX, squares_GX = ((part @ weights_GN[..., None])[..., 0] for part in (gains_GXN, gains_GXN.square()))
        return cls(sums_GX, squares_GX, weights_GN.sum(-1, keepdim=True))

    def total(self) -> "_Gains":
        """Return the sums over the groups."""
        return _Gains(*(part.sum(0, keepdim=True) for part in self))

    def least(self, errors: float = 1.0) -> Tensor:
        """Return the means less some of their standard errors, (G, X); 0 without rows."""
        rows_G1 = self.weights_G1.clamp_min(1.0)
        mean_GX = self.sums_GX / rows_G1
        return mean_GX - errors * ((self.squares_GX / rows_G1 - mean_GX.square()).clamp_min(0) / rows_G1).sqrt()


def chosen_errors(search: Search, chosen_GE: Tensor, folds_GN: Tensor) -> Tensor:
    """Return the error of each row by the combination that the rows outside its fold chose, (G, N) float64."""
    combination_GN = chosen_GE.gather(1, folds_GN.clamp_min(0))
    return search.errors_GXN.gather(1, combination_GN[:, None])[:, 0].double()


def choose_all(candidates: Candidates, stacks: Sequence[Stack], searches: Sequence[Search]) -> Iterator[Tensor]:
    """Yield for each stack the combination that each fit of each group chooses, (G, E) int64."""
    is_regression = candidates.scores.is_regression
    can_keep_base = candidates.candidate(candidates.combinations[0]) is Candidate.BASE
    units = [_loss_units(search, is_regression=is_regression) for search in searches]
    losses = [
        _losses_in_units(search, own, is_regression=is_regression) for search, own in zip(searches, units, strict=True)
    ]
    gains = [_Gains.of(search, stack) for search, stack in zip(searches, stacks, strict=True)]
    total_X = torch.stack([losses_GX.sum(0) for losses_GX in losses]).sum(0)
    total = _Gains(*map(torch.cat, zip(*(own.total() for own in gains), strict=True))).total()
    weight = sum(float(search.weights_GE[:, -1].sum()) for search in searches)
    has_others = sum(len(stack.groups) for stack in stacks) > 1
    for search, units_G1, losses_GX, own in zip(searches, units, losses, gains, strict=True):
        others = None
        if has_others:
            rest_G1 = (weight - search.weights_GE[:, -1:]).clamp_min(1e-300)
            gains_GX = _Gains(*(sums - part for sums, part in zip(total, own, strict=True))).least()
            others = Others(units_G1 * (total_X - losses_GX) / rest_G1, gains_GX)
        yield choose(search, others, can_keep_base=can_keep_base, is_regression=is_regression)


def worth_their_risk(
    errors: Sequence[Tensor], stacks: Sequence[Stack], searches: Sequence[Search], *, is_regression: bool
) -> Iterator[Tensor]:
    """Yield for each stack whether the update of each group is worth its risk over the base layer, (G,) bool.

    errors: errors of the rows in outer folds by the update that is published, (G, N), for each stack.
    """
    own_gains, other_gains = [], []
    for errors_GN, stack, search in zip(errors, stacks, searches, strict=True):
        gains_G1N = (search.errors_GXN[:, 0].double() - errors_GN)[:, None]
        own_gains.append(_Gains.sums(gains_G1N, stack.weights_GN))
        other_gains.append(_Gains.sums(gains_G1N, stack.weights_GN * ~stack.is_shared_GN))
    total = _Gains(*map(torch.cat, zip(*other_gains, strict=True))).total()
    has_others = sum(len(stack.groups) for stack in stacks) > 1
    for own, part in zip(own_gains, other_gains, strict=True):
        if is_regression:
            yield own.least(0)[:, 0] >= 0
            continue
        is_worth_G = own.least(_CLEAR if has_others else _CLEAR_ALONE)[:, 0] > 0
        if has_others:
            rest = _Gains(*(sums - mine for sums, mine in zip(total, part, strict=True)))
            is_worth_G = is_worth_G | (rest.least()[:, 0] >= _MIN_GAIN)
        yield is_worth_G


def search_all(
    candidates: Candidates, stacks: Sequence[Stack], list_of: Callable[[Iterable[Search]], Sequence[Search]]
) -> tuple[Candidates, Sequence[Search]]:
    """Return what was compared for the groups of all stacks, and their losses and errors as a list by `list_of`.

    Comparing all combinations takes most of the time of a large fleet. There, some of the stacks decide which are
    compared for all: those that one of their groups chooses in any of its fits, and the best of each candidate.
    """
    every = len(stacks) // _DECIDING_STACKS
    if every < 2:
        return candidates, list_of(candidates.search(stack) for stack in stacks)
    deciding = range(every // 2, len(stacks), every)
    searches = {number: candidates.search(stacks[number]) for number in deciding}
    kept = _worth_comparing(candidates, [stacks[number] for number in deciding], list(searches.values()))
    narrowed = replace(candidates, combinations=[candidates.combinations[index] for index in kept])
    return narrowed, list_of(
        searches[number].of(kept) if number in searches else narrowed.search(stack)
        for number, stack in enumerate(stacks)
    )


def _worth_comparing(candidates: Candidates, stacks: Sequence[Stack], searches: Sequence[Search]) -> list[int]:
    """Return the first combination, those that a group chooses, and the best of each candidate."""
    kept = {0}
    for chosen_GE in choose_all(candidates, stacks, searches):
        kept.update(chosen_GE.unique().tolist())
    losses_X = torch.stack([search.losses_GEX[:, -1].sum(0) for search in searches]).sum(0).tolist()
    best: dict[Candidate, int] = {}
    for index, combination in enumerate(candidates.combinations):
        name = candidates.candidate(combination)
        if name not in best or losses_X[index] < losses_X[best[name]]:
            best[name] = index
    return sorted(kept.union(best.values()))


def _loss_units(search: Search, *, is_regression: bool) -> Tensor:
    """Return what the losses of each group are counted in for other groups, (G, 1): 1, or its first mean loss."""
    mean_G1 = search.losses_GEX[:, -1, :1] / search.weights_GE[:, -1:].clamp_min(1e-300)
    return torch.where((mean_G1 > 0) & is_regression, mean_G1, 1.0)


def _losses_in_units(search: Search, units_G1: Tensor, *, is_regression: bool) -> Tensor:
    """Return the losses of each group as they count for other groups, (G, X).

    The numbers of two groups may be of different size, and one group's failures must not decide for all.
    """
    losses_GX = search.losses_GEX[:, -1] / units_G1
    return losses_GX.minimum(_MAX_UNITS * search.weights_GE[:, -1:]) if is_regression else losses_GX
