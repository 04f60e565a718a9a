"""Regression on real rows: scikit-learn's ridge to the sixth digit, and a ridge and a rank as good as a search's."""

# N rows · I in_features · O out_features · R rank
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score

from adapters.lora.base_layer import load_base_layer
from adapters.training.data_file import TrainingData
from adapters.training.fit import Fit, fit
from adapters.training.gradient.sampling import Sampler
from adapters.training.planning.split import Split as HoldOut
from adapters.training.settings import Method, TrainingSpec
from tests.acceptance.quality.real_data import Array, Split, numbers
from tests.support.dense_oracle import answer

pytestmark = pytest.mark.slow

RANKS = (1, 2, 4, 8, 16, 32)


def _spec(rank: int, **more: object) -> TrainingSpec:
    values = {"rank": rank, "alpha": float(rank), "method": Method.CLOSED_FORM, "bias": True, "alpha_is_rank": True}
    return TrainingSpec(**(values | more))  # type: ignore[arg-type]


def _fit(data: TrainingData, spec: TrainingSpec) -> Fit:
    return fit(load_base_layer(f"zeros:{data.inputs_NI.shape[1]},{data.targets.shape[1]}", device="cpu"), data, spec)


def _predictions(split: Split, done: Fit) -> Array:
    base = load_base_layer(f"zeros:{split.inputs.shape[1]},{split.targets.shape[1]}", device="cpu")
    return answer(base, torch.from_numpy(split.test_inputs), done.adapter)


@pytest.mark.parametrize("ridge", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", ["diabetes", "linnerud"])
def test_at_full_rank_the_held_out_r2_is_scikit_learns(name: str, ridge: float) -> None:
    split = numbers(name, seed=1)
    rank = min(split.inputs.shape[1], split.targets.shape[1])
    ours = _predictions(split, _fit(split.data, _spec(rank, ridge=ridge)))
    theirs = Ridge(alpha=ridge).fit(split.inputs.astype(float), split.targets).predict(split.test_inputs.astype(float))
    score = r2_score(split.test_targets, theirs.reshape(ours.shape))
    assert r2_score(split.test_targets, ours) == pytest.approx(score, abs=1e-6)


def test_below_full_rank_it_is_what_a_minimiser_finds_by_itself() -> None:
    split = numbers("linnerud", seed=0)
    x_NI, y_NO = split.inputs.astype(float), split.targets.astype(float)

    def loss(flat: Array, rank: int = 1) -> float:
        a_OR, b_RI, bias_O = flat[: 3 * rank].reshape(3, rank), flat[3 * rank : 6 * rank].reshape(rank, 3), flat[-3:]
        delta_OI = a_OR @ b_RI
        return float(((x_NI @ delta_OI.T + bias_O - y_NO) ** 2).sum() + 0.5 * (delta_OI**2).sum())

    draw = np.random.default_rng(0)
    found = min(minimize(loss, draw.standard_normal(9), tol=1e-14).fun for _ in range(8))
    adapter = _fit(split.data, _spec(1, ridge=0.5)).adapter
    assert adapter.bias_O is not None
    ours = loss(
        np.concatenate([part.double().numpy().ravel() for part in (adapter.a_OR, adapter.b_RI, adapter.bias_O)])
    )
    assert ours == pytest.approx(found, rel=1e-6)


def test_an_open_ridge_is_as_good_as_a_fine_search_on_the_same_rows() -> None:
    data = numbers("diabetes", seed=2, test=0.5).data
    spec = _spec(1, try_ridges=True, split=HoldOut())
    draws = Sampler(spec, data.rows)
    assert draws.held_K is not None
    x_NI, y_NO = data.inputs_NI.double().numpy(), data.targets.double().numpy()
    train_K, held_K = draws.training_K.numpy(), draws.held_K.numpy()

    def held_out_loss(ridge: float) -> float:
        predicted = Ridge(alpha=ridge).fit(x_NI[train_K], y_NO[train_K]).predict(x_NI[held_K])
        return float(((predicted.reshape(len(held_K), -1) - y_NO[held_K]) ** 2).mean())

    best = min(map(held_out_loss, np.logspace(-4, 5, 300)))
    done = _fit(data, spec)
    assert done.metrics["validation_loss"] == pytest.approx(held_out_loss(done.spec.ridge), rel=1e-5)
    assert best <= done.metrics["validation_loss"] < 1.005 * best


def _ridge_by_strength(x_NI: Array, y_NO: Array, ridge: float) -> tuple[Array, Array]:
    """The full-rank solution (I, O) and the (O, O) directions in which it answers most, strongest first."""
    padded = np.vstack([x_NI, np.sqrt(ridge) * np.eye(x_NI.shape[1])])
    solution_IO = np.linalg.solve(padded.T @ padded, x_NI.T @ y_NO)
    return solution_IO, np.linalg.svd(padded @ solution_IO, full_matrices=False)[2].T


def test_an_open_rank_is_the_smallest_that_a_search_finds_as_good() -> None:
    """The lower half of a digit from its upper half: 32 numbers from 32, which a small rank nearly gives."""
    images_NI = load_digits().data.astype(np.float32)[:400]
    data = TrainingData(torch.from_numpy(images_NI[:, :32].copy()), torch.from_numpy(images_NI[:, 32:].copy()))
    spec = _spec(32, ridge=100.0, try_ranks=RANKS, split=HoldOut())
    draws = Sampler(spec, data.rows)
    assert draws.held_K is not None
    x_NI, y_NO = images_NI[:, :32].astype(float), images_NI[:, 32:].astype(float)
    train_K, held_K = draws.training_K.numpy(), draws.held_K.numpy()
    mean_I, mean_O = x_NI[train_K].mean(axis=0), y_NO[train_K].mean(axis=0)
    full_IO, right_OO = _ridge_by_strength(x_NI[train_K] - mean_I, y_NO[train_K] - mean_O, 100.0)
    losses = {}
    for rank in RANKS:
        projected_IO = full_IO @ right_OO[:, :rank] @ right_OO[:, :rank].T
        losses[rank] = float((((x_NI[held_K] - mean_I) @ projected_IO + mean_O - y_NO[held_K]) ** 2).mean())
    least = min(losses.values())
    done = _fit(data, spec)
    assert done.spec.rank == min(rank for rank, loss in losses.items() if loss <= 1.001 * least)
    assert 1 < done.spec.rank < 32
    assert done.metrics["validation_loss"] == pytest.approx(losses[done.spec.rank], rel=1e-5)


def test_of_a_few_dozen_rows_an_open_ridge_is_as_good_as_leave_one_out() -> None:
    """Nothing is held out: each tenth has its turn. On other rows that is better than keeping a fifth away for good."""
    ours: list[float] = []
    theirs: list[float] = []
    kept_away: list[float] = []
    for seed in range(20):
        split = numbers("diabetes", seed, test=0.93)
        assert len(split.inputs) < 40
        in_turn, by_fifth = (
            _predictions(split, _fit(split.data, _spec(1, try_ridges=True, seed=seed, split=hold_out)))
            for hold_out in (None, HoldOut())
        )
        reference = RidgeCV(np.logspace(-3, 4, 30)).fit(split.inputs, split.targets).predict(split.test_inputs)
        for losses, predicted in ((ours, in_turn), (kept_away, by_fifth), (theirs, reference.reshape(in_turn.shape))):
            losses.append(float(((predicted - split.test_targets) ** 2).mean()))
    print(
        f"mean squared error: ours {np.mean(ours):.4f}, RidgeCV {np.mean(theirs):.4f}, a fifth {np.mean(kept_away):.4f}"
    )
    assert np.mean(ours) < 1.03 * np.mean(theirs)
    assert np.mean(ours) < np.mean(kept_away)
