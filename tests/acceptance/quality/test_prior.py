"""A tenant with ten rows: starting from what the fleet has learned, or from nothing."""

# N rows · I in_features · O out_features
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.data_file import TrainingData
from adapters.training.fit import fit
from adapters.training.settings import Method, TrainingSpec
from tests.acceptance.quality.real_data import Split, classes

pytestmark = pytest.mark.slow

TEN = 10
RIDGES = (20.0, 200.0, 2000.0)
SPEC = TrainingSpec(rank=10, alpha=10.0, method=Method.CLOSED_FORM, bias=True, ridge=2000.0)


@pytest.fixture(scope="module")
def base() -> BaseLayer:
    return load_base_layer("zeros:64,10", device="cpu")


def _one_hot(split: Split) -> TrainingData:
    return TrainingData(torch.from_numpy(split.inputs), torch.eye(10)[torch.from_numpy(split.targets)])


def test_ten_rows_and_the_fleets_adapter_beat_ten_rows_alone(base: BaseLayer) -> None:
    """The tenant's scanner turns and inverts as all do, at half the contrast: what it needs is near what there is."""
    fleet, others = classes("digits", 0), classes("digits", 1)
    learned = fit(base, _one_hot(fleet), SPEC).adapter
    faded = replace(others, inputs=others.inputs / 2 + 8, test_inputs=others.test_inputs / 2 + 8)
    with_prior, alone = {}, {}
    for ridge in RIDGES:
        spec = replace(SPEC, ridge=ridge)
        found = []
        for seed in range(5):
            rows_K = np.random.default_rng(seed).choice(len(faded.inputs), TEN, replace=False)
            few = _one_hot(faded).take(torch.from_numpy(rows_K))
            from_fleet = replace(few, prior_OR=learned.a_OR * learned.scaling, prior_RI=learned.b_RI)
            found.append([faded.accuracy(base, fit(base, data, spec).adapter) for data in (from_fleet, few)])
        with_prior[ridge], alone[ridge] = np.mean(found, axis=0)
    print(f"accuracy by ridge: with the prior {with_prior}, alone {alone}")
    assert all(with_prior[ridge] > alone[ridge] + 0.1 for ridge in RIDGES)
    # Whatever ridge either would have taken.
    assert max(with_prior.values()) > max(alone.values()) + 0.3
