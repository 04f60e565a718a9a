"""What the held-out rows decide: the rank, the ridge, the learning rate."""

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
from adapters.training.closed_form.statistics import Statistics, accumulate
from adapters.training.data_file import TrainingData
from adapters.training.limits import CHUNK_ROWS
from adapters.training.settings import TrainingSpec

if TYPE_CHECKING:
    from adapters.training.fit import Sides

TRIAL_STEPS = 200
"""Steps of a trial: enough to tell learning rates and ranks apart, a fraction of a training."""
_FOLDS = 10
AddNote = Callable[[str], None]


def choose_ridge_and_rank(
    base: BaseLayer, sides: "Sides", spec: TrainingSpec, training: Statistics, *, prior_OI: Tensor | None, note: AddNote
) -> TrainingSpec:
    """The spec with ridge and rank decided, where they are open: by the held-out rows, or where there are none by each
    tenth of the rows in turn."""
    if not (spec.try_ranks or spec.try_ridges):
        return spec
    ranks_tried = spec.try_ranks or (spec.rank,)
    ridges_tried = default_ridges(training, bias=spec.bias) if spec.try_ridges else (spec.ridge,)
    tried: dict[str, Any] = {"ranks": ranks_tried, "ridges": ridges_tried, "bias": spec.bias, "prior_OI": prior_OI}
    if sides.held is None:
        chosen = cross_validate_ridge(list(_folds(base, sides.training, spec)), **tried)
        told = "loss of each tenth of the rows, held out in turn,"
    else:
        chunks = ((part.inputs_NI, part.targets, part.weights_N) for part in sides.held.parts(sides.held_K, CHUNK_ROWS))
        chosen, told = search_ridge(training, accumulate(base, chunks), **tried), "held-out loss,"
    ranks, ridges = (sorted({tried[place] for tried in chosen.table}) for place in (1, 0))
    note(
        f"rank {chosen.rank} of {_describe_range(ranks)} and ridge {chosen.ridge:g} of {_describe_range(ridges)}: "
        f"the smallest rank whose {told} {chosen.loss:.6g}, is within {LOSS_TOLERANCE:.1%} of the least"
    )
    return _with_rank(replace(spec, ridge=chosen.ridge), chosen.rank)


def _folds(base: BaseLayer, data: TrainingData, spec: TrainingSpec) -> Iterator[Statistics]:
    """The rows that count, at least two, in ten parts that the seed draws."""
    rows_K = torch.arange(data.rows) if data.weights_N is None else data.weights_N.cpu().nonzero()[:, 0]
    order_K = rows_K[torch.randperm(len(rows_K), generator=torch.Generator().manual_seed(spec.seed))]
    for some_K in order_K.tensor_split(min(_FOLDS, len(order_K))):
        part = data.take(some_K)
        yield accumulate(base, [(part.inputs_NI, part.targets, part.weights_N)])


class TrialLoss(NamedTuple):
    """What a short training reaches on the held-out rows."""

    loss: float
    error: float
    """The loss's standard error."""


def choose_rate_and_rank(
    spec: TrainingSpec, trial: Callable[[TrainingSpec], TrialLoss], *, note: AddNote
) -> TrainingSpec:
    """The spec with learning rate and rank decided, by short trainings, where they are open.

    Of the rates the smallest is taken that is within one standard error of the best (Breiman et al. 1984, section
    3.4.3): few held-out rows do not tell more, and a large rate overshoots. Of the ranks as `search_ridge` does.
    """
    short = replace(spec, max_steps=min(spec.max_steps or TRIAL_STEPS, TRIAL_STEPS), max_seconds=None)
    # Their end counts, not the best on the way: of few held-out rows the best of many looks is luck, and the largest
    # rate, which swings most, has most of it.
    short = replace(short, patience=None, try_rates=(), try_ranks=())
    if spec.try_rates:
        tried = {rate: trial(replace(short, learning_rate=rate)) for rate in spec.try_rates}
        best = min(tried.values())
        rate = min(each for each in tried if tried[each].loss <= best.loss + best.error)
        note(
            f"learning_rate {rate:g}: the smallest whose held-out loss after {short.max_steps} steps is within a "
            f"standard error, {best.error:.2g}, of the least ({_describe_losses(tried)})"
        )
        spec, short = replace(spec, learning_rate=rate), replace(short, learning_rate=rate)
    if spec.try_ranks:
        by_rank = {rank: trial(_with_rank(short, rank)) for rank in spec.try_ranks}
        least = min(by_rank.values()).loss
        rank = min(each for each in by_rank if by_rank[each].loss <= least * (1 + LOSS_TOLERANCE))
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
    return ", ".join(f"{value:g}: {each.loss:.6g}" for value, each in tried.items())
