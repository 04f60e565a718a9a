"""What the held-out rows decide: the rank, the ridge, the learning rate."""

# O out_features · I in_features
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapters.base_layer import BaseLayer
from adapters.training.data import TrainingData
from adapters.training.ridge_search import HAIR, default_ridges, search, search_in_turn
from adapters.training.spec import TrainingSpec
from adapters.training.statistics import Statistics, gather

if TYPE_CHECKING:
    from adapters.training.fit import Sides

TRIAL_STEPS = 200
"""Steps of a trial: enough to tell learning rates and ranks apart, a fraction of a training."""
_PATIENCE = 20
_PARTS = 10
_ROWS_AT_ONCE = 8192
Note = Callable[[str], None]


def choose_exactly(
    base: BaseLayer, sides: "Sides", spec: TrainingSpec, training: Statistics, *, prior_OI: Tensor | None, note: Note
) -> TrainingSpec:
    """The spec with ridge and rank decided, where they are open: by the held-out rows, or where there are none by each
    tenth of the rows in turn."""
    if not (spec.try_ranks or spec.try_ridges):
        return spec
    ranks_tried = spec.try_ranks or (spec.rank,)
    ridges_tried = default_ridges(training, bias=spec.bias) if spec.try_ridges else (spec.ridge,)
    tried: dict[str, Any] = {"ranks": ranks_tried, "ridges": ridges_tried, "bias": spec.bias, "prior_OI": prior_OI}
    if sides.held is None:
        chosen = search_in_turn(list(_parts_of(base, sides.training, spec)), **tried)
        told = "loss of each tenth of the rows, held out in turn,"
    else:
        chunks = (
            (part.inputs_NI, part.targets, part.weights_N) for part in sides.held.parts(sides.held_K, _ROWS_AT_ONCE)
        )
        chosen, told = search(training, gather(base, chunks), **tried), "held-out loss,"
    ranks, ridges = (sorted({tried[place] for tried in chosen.table}) for place in (1, 0))
    note(
        f"rank {chosen.rank} of {_several(ranks)} and ridge {chosen.ridge:g} of {_several(ridges)}: the smallest rank "
        f"whose {told} {chosen.loss:.6g}, is within {HAIR:.1%} of the least"
    )
    return _with_rank(replace(spec, ridge=chosen.ridge), chosen.rank)


def _parts_of(base: BaseLayer, data: TrainingData, spec: TrainingSpec) -> Iterator[Statistics]:
    """The rows that count, at least two, in ten parts that the seed draws."""
    rows_K = torch.arange(data.rows) if data.weights_N is None else data.weights_N.cpu().nonzero()[:, 0]
    order_K = rows_K[torch.randperm(len(rows_K), generator=torch.Generator().manual_seed(spec.seed))]
    for some_K in order_K.tensor_split(min(_PARTS, len(order_K))):
        part = data.take(some_K)
        yield gather(base, [(part.inputs_NI, part.targets, part.weights_N)])


def choose_by_trials(spec: TrainingSpec, trial: Callable[[TrainingSpec], float], *, note: Note) -> TrainingSpec:
    """The spec with learning rate and rank decided, by short trainings, where they are open.

    `trial` trains as it is told and returns the held-out loss.
    """
    short = replace(spec, max_steps=min(spec.max_steps or TRIAL_STEPS, TRIAL_STEPS), max_seconds=None)
    short = replace(short, patience=spec.patience or _PATIENCE, try_rates=(), try_ranks=())
    if spec.try_rates:
        losses = {rate: trial(replace(short, learning_rate=rate)) for rate in spec.try_rates}
        rate = min(losses, key=lambda each: (losses[each], each))
        note(f"learning_rate {rate:g}: the least held-out loss after {short.max_steps} steps ({_told(losses)})")
        spec, short = replace(spec, learning_rate=rate), replace(short, learning_rate=rate)
    if spec.try_ranks:
        losses = {rank: trial(_with_rank(short, rank)) for rank in spec.try_ranks}
        least = min(losses.values())
        rank = min(each for each in losses if losses[each] <= least * (1 + HAIR) or not math.isfinite(least))
        note(
            f"rank {rank}: the smallest whose held-out loss after {short.max_steps} steps is within {HAIR:.1%} of the "
            f"least ({_told(losses)})"
        )
        spec = _with_rank(spec, int(rank))
    return replace(spec, try_rates=(), try_ranks=())


def _with_rank(spec: TrainingSpec, rank: int) -> TrainingSpec:
    alpha = float(rank) if spec.alpha_is_rank else spec.alpha
    return replace(spec, rank=rank, alpha=alpha, try_ranks=(), try_ridges=False)


def _several(tried: Sequence[float]) -> str:
    return f"{tried[0]:g}" if len(tried) == 1 else f"{len(tried)} from {tried[0]:g} to {tried[-1]:g}"


def _told(losses: Mapping[float, float]) -> str:
    return ", ".join(f"{tried:g}: {loss:.6g}" for tried, loss in losses.items())
