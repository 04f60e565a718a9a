"""Classification of real rows: as good as scikit-learn's logistic regression on the same split."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.fit import fit
from adapters.training.planning.split import Split as HoldOut
from adapters.training.settings import Loss, Schedule, TrainingSpec
from tests.acceptance.quality.real_data import Split, classes
from tests.conftest import Serve
from tests.support.service import train

pytestmark = pytest.mark.slow

CLOSE = 0.015
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _with_sklearn(split: Split) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(split.inputs, split.targets).score(split.test_inputs, split.test_targets))


def _with_ours(split: Split, seed: int, base: BaseLayer | None = None) -> float:
    """An adapter of full rank with a bias, on zeros where no layer is given, stopped by a fifth of its rows."""
    rank = len(np.unique(split.targets))
    base = base or load_base_layer(f"zeros:{split.inputs.shape[1]},{rank}", device="cpu")
    spec = TrainingSpec(
        rank=rank,
        alpha=rank,
        loss=Loss.CROSS_ENTROPY,
        bias=True,
        epochs=60,
        learning_rate=0.01,
        schedule=Schedule.COSINE,
        seed=seed,
        split=HoldOut(stratify=True),
        patience=15,
    )
    return split.accuracy(base, fit(base, split.data, spec).adapter)


@pytest.mark.parametrize(("name", "seeds"), [("digits", 3), ("cancer", 5), ("wine", 8)])
def test_full_rank_with_a_bias_is_as_right_as_logistic_regression(name: str, seeds: int) -> None:
    splits = [classes(name, seed) for seed in range(seeds)]
    ours = np.mean([_with_ours(split, seed) for seed, split in enumerate(splits)])
    theirs = np.mean([_with_sklearn(split) for split in splits])
    print(f"{name}, accuracy over {seeds} splits: ours {ours:.4f}, logistic regression {theirs:.4f}")
    assert theirs > 0.9
    assert abs(ours - theirs) < CLOSE


def test_the_bundled_base_learns_what_another_scanner_makes_of_its_digits() -> None:
    base = load_base_layer("digits", device="cpu")
    splits = [classes("digits", seed) for seed in range(3)]
    ours = np.mean([_with_ours(split, seed, base) for seed, split in enumerate(splits)])
    theirs = np.mean([_with_sklearn(split) for split in splits])
    print(f"digits on the bundled base: ours {ours:.4f}, logistic regression {theirs:.4f}")
    assert abs(ours - theirs) < CLOSE


def test_classes_by_name_are_learned_and_answered_as_well(serve: Serve) -> None:
    client, _ = serve(base="zeros:64,10", trainer=True)
    split = classes("digits", 0)
    job = train(
        client,
        name="acme",
        rank=10,
        data={"inputs": split.inputs.tolist(), "targets": [WORDS[each] for each in split.targets]},
        split={"by": "rows", "stratify": True},
        training={
            "loss": "cross_entropy",
            "bias": True,
            "epochs": 60,
            "learning_rate": 0.01,
            "schedule": "cosine",
            "early_stopping": {"patience": 15},
        },
    )
    assert job["error"] is None, job["error"]
    held_out = job["metrics"]["held_out"]
    assert held_out["base"]["accuracy"] < 0.15
    assert held_out["trivial"]["accuracy"] < 0.15
    body = {"adapter": "acme", "inputs": split.test_inputs.tolist(), "return": ["labels"]}
    answers = client.post("/predict", json=body).raise_for_status().json()["labels"]
    right = np.mean([label == WORDS[each] for label, each in zip(answers, split.test_targets, strict=True)])
    assert right > _with_sklearn(split) - CLOSE
    # What the job says of its own held-out rows is what other rows then show.
    assert abs(held_out["adapter"]["accuracy"] - right) < 0.03
