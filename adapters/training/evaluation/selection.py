"""Choice of rank, ridge and learning rate by held-out rows."""

# O out_features · I in_features
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.ridge_search import (
    LOSS_TOLERANCE,
    cross_validate_ridge,
    default_ridges,
    search_ridge,
)
from adapters.training.closed_form.statistics import Statistics, accumulate_data
from adapters.training.data_file import TrainingData
from adapters.training.settings import TrainingSpec

if TYPE_CHECKING:
    from adapters.training.fit import Sides

# Steps of a trial: enough to compare learning rates and ranks, and a fraction of a training.
TRIAL_STEPS = 200
_FOLDS = 10
AddNote = Callable[[str], None]


def choose_ridge_and_rank(
    base: BaseLayer, sides: "Sides", spec: TrainingSpec, training: Statistics, *, prior_OI: Tensor | None, note: AddNote
) -> TrainingSpec:
    """Return the spec with ridge and rank chosen, if they are open.

    They are chosen by the held-out rows, or by tenfold cross-validation without any.
    """
    if not (spec.try_ranks or spec.try_ridges):
        return spec
    ranks_tried = spec.try_ranks or (spec.rank,)
    ridges_tried = default_ridges(training, bias=spec.bias) if spec.try_ridges else (spec.ridge,)
    tried: dict[str, Any] = {"ranks": ranks_tried, "ridges": ridges_tried, "bias": spec.bias, "prior_OI": prior_OI}
    if sides.held is None:
        chosen = cross_validate_ridge(list(_folds(base, sides.training.data, spec)), **tried)
        label = "loss of each tenth of the rows, held out in turn,"
    else:
        chosen = search_ridge(training, accumulate_data(base, sides.held.data, sides.held.rows_K), **tried)
        label = "held-out loss,"
    ranks, ridges = (sorted({candidate[index] for candidate in chosen.table}) for index in (1, 0))
    note(
        f"rank {chosen.rank} of {_describe_range(ranks)} and ridge {chosen.ridge:g} of {_describe_range(ridges)}: "
        f"the smallest rank whose {label} {chosen.loss:.6g}, is within {LOSS_TOLERANCE:.1%} of the least"
    )
    return _with_rank(replace(spec, ridge=chosen.ridge), chosen.rank)


def _folds(base: BaseLayer, data: TrainingData, spec: TrainingSpec) -> Iterator[Statistics]:
    """Yield the statistics of up to ten random parts of the rows with a weight; there are at least two such rows."""
    rows_K = torch.arange(data.rows) if data.weights_N is None else data.weights_N.cpu().nonzero()[:, 0]
    order_K = rows_K[torch.randperm(len(rows_K), generator=torch.Generator().manual_seed(spec.seed))]
    for fold_K in order_K.tensor_split(min(_FOLDS, len(order_K))):
        yield accumulate_data(base, data, fold_K)


class TrialLoss(NamedTuple):
    """Held-out loss of a short training."""

    loss: float
    error: float
    """Standard error of the loss."""


def choose_rate_and_rank(
    spec: TrainingSpec, trial: Callable[[TrainingSpec], TrialLoss], *, note: AddNote
) -> TrainingSpec:
    """Return the spec with learning rate and rank chosen by short trainings, if they are open.

    The learning rate is the smallest within one standard error of the best (Breiman et al. 1984, section 3.4.3),
    because few held-out rows do not distinguish more, and a large rate overshoots. The rank is chosen as in
    `search_ridge`.
    """
    # A trial's last step counts, not its best one. With few held-out rows, the best of many evaluations is chance, and
    # the largest rate, whose loss varies most, gains most from it.
    steps = min(spec.max_steps or TRIAL_STEPS, TRIAL_STEPS)
    short = replace(spec, max_steps=steps, max_seconds=None, patience=None, try_rates=(), try_ranks=())
    if spec.try_rates:
        tried = {rate: trial(replace(short, learning_rate=rate)) for rate in spec.try_rates}
        best = min(tried.values())
        rate = min(rate for rate in tried if tried[rate].loss <= best.loss + best.error)
        note(
            f"learning_rate {rate:g}: the smallest whose held-out loss after {short.max_steps} steps is within a "
            f"standard error, {best.error:.2g}, of the least ({_describe_losses(tried)})"
        )
        spec, short = replace(spec, learning_rate=rate), replace(short, learning_rate=rate)
    if spec.try_ranks:
        by_rank = {rank: trial(_with_rank(short, rank)) for rank in spec.try_ranks}
        least = min(by_rank.values()).loss
        rank = min(rank for rank in by_rank if by_rank[rank].loss <= least * (1 + LOSS_TOLERANCE))
        note(
            f"rank {rank}: the smallest whose held-out loss after {short.max_steps} steps is within "
            f"{LOSS_TOLERANCE:.1%} of the least ({_describe_losses(by_rank)})"
        )
        spec = _with_rank(spec, rank)
    return replace(spec, try_rates=(), try_ranks=())


def _with_rank(spec: TrainingSpec, rank: int) -> TrainingSpec:
    alpha = float(rank) if spec.alpha_is_rank else spec.alpha
    return replace(spec, rank=rank, alpha=alpha, try_ranks=(), try_ridges=False)


def _describe_range(tried: Sequence[float]) -> str:
    return f"{tried[0]:g}" if len(tried) == 1 else f"{len(tried)} from {tried[0]:g} to {tried[-1]:g}"


def _describe_losses(tried: Mapping[int, TrialLoss] | Mapping[float, TrialLoss]) -> str:
    return ", ".join(f"{value:g}: {trial.loss:.6g}" for value, trial in tried.items())
