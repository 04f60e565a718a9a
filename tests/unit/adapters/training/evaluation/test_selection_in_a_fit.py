"""What the held-out rows decide in a training is what trying everything by hand decides."""

# N rows · I in_features · O out_features · R rank
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from adapters.errors import Diverged
from adapters.training.data_file import TrainingData
from adapters.training.evaluation.selection import TRIAL_STEPS
from adapters.training.fit import Fit, Watcher, fit
from adapters.training.planning.split import Split
from adapters.training.settings import Loss, Method, TrainingSpec
from tests.support.dense_oracle import Float64, answer, layer

O, I, ROWS = 5, 8, 90
DRAW = torch.Generator().manual_seed(3)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
INPUTS = torch.randn(ROWS, I, generator=DRAW) + 1
TRUTH = torch.randn(I, 2, generator=DRAW) @ torch.randn(2, O, generator=DRAW)
TARGETS = INPUTS @ (BASE.weight_OI.T + TRUTH) + 2 * torch.randn(ROWS, O, generator=DRAW) + 1
DATA = TrainingData(INPUTS, TARGETS, weights_N=torch.rand(ROWS, generator=DRAW) + 0.2)
CLASSES = replace(DATA, targets=TARGETS.argmax(dim=1))
SPLIT = Split(fraction=0.4)
EXACT = TrainingSpec(rank=5, alpha=5.0, method=Method.CLOSED_FORM, split=SPLIT, alpha_is_rank=True)
DESCENT = TrainingSpec(rank=2, alpha=2.0, split=SPLIT, alpha_is_rank=True, batch_size=20, epochs=3, learning_rate=0.01)


class _Side(NamedTuple):
    x_NI: Float64
    r_NO: Float64
    """What the base layer leaves over."""
    w_N: Float64


def _sides(spec: TrainingSpec) -> tuple[_Side, _Side]:
    """Those of the split's seed; with a bias about the training rows' means."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(spec.seed))
    held = order[: round(ROWS * 0.4)].sort().values
    training = order[round(ROWS * 0.4) :].sort().values
    residuals_NO = TARGETS.double().numpy() - answer(BASE, INPUTS, None)
    assert DATA.weights_N is not None
    sides = [
        _Side(INPUTS[rows].double().numpy(), residuals_NO[rows], DATA.weights_N[rows].double().numpy())
        for rows in (training, held)
    ]
    if spec.bias:
        x_I, r_O = (np.average(each, axis=0, weights=sides[0].w_N) for each in (sides[0].x_NI, sides[0].r_NO))
        sides = [_Side(side.x_NI - x_I, side.r_NO - r_O, side.w_N) for side in sides]
    return sides[0], sides[1]


def _held_loss(training: _Side, held: _Side, rank: int, ridge: float) -> float:
    """Of the reduced-rank ridge regression of one side, on the other."""
    gram_II = training.x_NI.T * training.w_N @ training.x_NI + ridge * np.eye(I)
    full_IO = np.linalg.solve(gram_II, training.x_NI.T * training.w_N @ training.r_NO)
    v_OR = np.linalg.svd(np.linalg.cholesky(gram_II).T @ full_IO)[2][:rank].T
    misfit_NO = held.x_NI @ full_IO @ v_OR @ v_OR.T - held.r_NO
    return float(np.average((misfit_NO**2).mean(1), weights=held.w_N))


def _of_all(table: dict[tuple[int, float], float]) -> tuple[int, float]:
    """The smallest rank within a thousandth of the least, and its best ridge."""
    rank = min(rank for (rank, _), loss in table.items() if loss <= min(table.values()) * 1.001)
    return rank, min((loss, ridge) for (tried, ridge), loss in table.items() if tried == rank)[1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ranks", "ridges"), [((1, 2, 3, 5), True), ((1, 2, 3, 5), False), ((), True), ((4, 2), True)])
def test_rank_and_ridge_are_those_of_trying_every_pair(
    ranks: tuple[int, ...], ridges: bool, seed: int, bias: bool
) -> None:
    spec = replace(EXACT, try_ranks=ranks, try_ridges=ridges, ridge=3.0, seed=seed, bias=bias)
    training, held = _sides(spec)
    middle = (training.x_NI**2 * training.w_N[:, None]).sum(0).mean()
    tried = [0.0, *(middle * 10 ** (half / 2) for half in range(-10, 5))] if ridges else [3.0]
    table = {(rank, ridge): _held_loss(training, held, rank, ridge) for rank in ranks or (5,) for ridge in tried}
    rank, ridge = _of_all(table)
    told: list[str] = []
    done = fit(BASE, DATA, spec, watcher=Watcher(note=told.append))
    assert done.spec == replace(
        spec, rank=rank, alpha=float(rank), ridge=done.spec.ridge, try_ranks=(), try_ridges=False
    )
    assert done.spec.ridge == pytest.approx(ridge, rel=1e-9)
    assert (done.adapter.rank, done.adapter.alpha) == (rank, float(rank))
    assert done.metrics["validation_loss"] == pytest.approx(table[rank, ridge], rel=1e-5)
    assert len(told) == 1
    assert told[0].startswith(f"rank {rank} of ")
    assert f"and ridge {done.spec.ridge:g} of " in told[0]


def test_without_rows_held_out_a_given_alpha_stays_and_nothing_is_chosen_that_is_not_open() -> None:
    told: list[str] = []
    done = fit(BASE, DATA, replace(EXACT, split=None, ridge=2.0), watcher=Watcher(note=told.append))
    assert (done.spec.rank, done.spec.ridge, told) == (5, 2.0, [])
    own_alpha = fit(BASE, DATA, replace(EXACT, try_ranks=(1, 2), alpha=7.0, alpha_is_rank=False))
    assert own_alpha.adapter.alpha == 7.0


def _short(spec: TrainingSpec, data: TrainingData) -> tuple[float, float]:
    """The held-out loss at the end of a trial of this spec, and its standard error, from the adapter's answers."""
    steps = min(TRIAL_STEPS, spec.max_steps or TRIAL_STEPS)
    try:
        adapter = fit(BASE, data, replace(spec, try_rates=(), try_ranks=(), max_steps=steps, patience=None)).adapter
    except Diverged:
        return math.inf, 0.0
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(spec.seed))
    held = order[: round(ROWS * 0.4)]
    y_NO = answer(BASE, INPUTS[held], adapter)
    assert data.weights_N is not None
    targets, w_N = data.targets[held].numpy(), data.weights_N[held].double().numpy()
    if spec.loss is Loss.CROSS_ENTROPY:
        losses_N = logsumexp(y_NO, axis=1) - y_NO[np.arange(len(y_NO)), targets]
    else:
        losses_N = ((y_NO - targets) ** 2).mean(1)
    mean = np.average(losses_N, weights=w_N)
    spread = np.average((losses_N - mean) ** 2, weights=w_N)
    return float(mean), float(np.sqrt(spread * (w_N**2).sum()) / w_N.sum())


def _fit(spec: TrainingSpec, data: TrainingData) -> tuple[Fit, list[str]]:
    told: list[str] = []
    return fit(BASE, data, spec, watcher=Watcher(note=told.append)), told


@pytest.mark.parametrize("loss", [Loss.MSE, Loss.CROSS_ENTROPY])
@pytest.mark.parametrize("method", [Method.ADAMW, Method.SGD])
@pytest.mark.parametrize("seed", range(3))
def test_the_rate_and_then_the_rank_are_those_of_training_with_each(seed: int, method: Method, loss: Loss) -> None:
    rates, ranks = (0.0003, 0.003, 0.02, 0.1, 1e9), (1, 2, 4)
    # With seed 0 a training is longer than its trials.
    spec = replace(DESCENT, seed=seed, method=method, loss=loss, try_rates=rates, try_ranks=ranks, epochs=80)
    spec = replace(spec, max_steps=60) if seed else spec
    data = CLASSES if loss is Loss.CROSS_ENTROPY else DATA
    of_rates = {rate: _short(replace(spec, learning_rate=rate), data) for rate in rates}
    assert method is Method.ADAMW or of_rates[1e9][0] == math.inf
    best = min(of_rates.values())
    rate = min(each for each, (reached, _) in of_rates.items() if reached <= sum(best))
    with_rate = replace(spec, learning_rate=rate)
    of_ranks = {rank: _short(replace(with_rate, rank=rank, alpha=float(rank)), data)[0] for rank in ranks}
    rank = min(each for each, reached in of_ranks.items() if reached <= min(of_ranks.values()) * 1.001)
    done, told = _fit(spec, data)
    assert (done.spec.learning_rate, done.spec.rank, done.spec.alpha) == (rate, rank, float(rank))
    assert (done.spec.try_rates, done.spec.try_ranks) == ((), ())
    assert [text.split(":")[0] for text in told] == [f"learning_rate {rate:g}", f"rank {rank}"]
    outright, _ = _fit(
        replace(spec, learning_rate=rate, rank=rank, alpha=float(rank), try_rates=(), try_ranks=()), data
    )
    assert done.adapter.digest == outright.adapter.digest
    assert (done.history, done.metrics) == (outright.history, outright.metrics)
