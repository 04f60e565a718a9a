"""On real data: as good as PEFT in a plain torch loop, with the same optimiser and the same number of steps."""

# N rows · I in_features · O out_features
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.data_file import TrainingData
from adapters.training.fit import fit
from adapters.training.settings import Loss, TrainingSpec
from tests.support.dense_oracle import answer
from tests.support.peft_model import uses_peft

pytestmark = uses_peft

# All rows a step, to the end: on mini-batches one seed is up to eight points from another, with PEFT as with ours.
RANK, BATCH, EPOCHS, RATE = 4, 900, 400, 0.02
SEEDS = (0, 1, 2, 3)


class Net(nn.Module):
    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.linear = nn.Linear(base.in_features, base.out_features)
        assert base.bias_O is not None
        self.linear.load_state_dict({"weight": base.weight_OI, "bias": base.bias_O})

    def forward(self, x_NI: Tensor) -> Any:
        return self.linear(x_NI)


@pytest.fixture(scope="module")
def base() -> BaseLayer:
    return load_base_layer("digits", device="cpu")


@pytest.fixture(scope="module")
def digits() -> tuple[TrainingData, TrainingData]:
    """The tenant's scanner turns by 90° and inverts; rows 0 to 899 are for training."""
    images_NI, labels_N = load_digits(return_X_y=True)
    seen_NI = 16 - np.rot90(images_NI.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    inputs_NI, targets_N = torch.from_numpy(seen_NI.copy()).float(), torch.from_numpy(labels_N)
    return TrainingData(inputs_NI[:900], targets_N[:900]), TrainingData(inputs_NI[900:], targets_N[900:])


def _with_peft(base: BaseLayer, data: TrainingData, held_out: TrainingData, seed: int) -> float:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(Net(base), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0)
    for _ in range(EPOCHS):
        for rows_K in torch.randperm(data.rows).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.inputs_NI[rows_K]), data.targets[rows_K]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(held_out.inputs_NI).argmax(dim=1) == held_out.targets).float().mean())


def _with_ours(base: BaseLayer, data: TrainingData, held_out: TrainingData, seed: int) -> float:
    spec = TrainingSpec(
        rank=RANK, alpha=RANK, loss=Loss.CROSS_ENTROPY, epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE, seed=seed
    )
    adapter = fit(base, data, spec).adapter
    answers_NO = answer(base, held_out.inputs_NI, adapter)
    return float((answers_NO.argmax(axis=1) == held_out.targets.numpy()).mean())


def test_turned_and_inverted_digits_are_learned_as_well_as_with_peft(
    base: BaseLayer, digits: tuple[TrainingData, TrainingData]
) -> None:
    data, held_out = digits
    without = float((answer(base, held_out.inputs_NI, None).argmax(axis=1) == held_out.targets.numpy()).mean())
    assert without < 0.2
    peft, ours = (np.mean([way(base, data, held_out, seed) for seed in SEEDS]) for way in (_with_peft, _with_ours))
    print(f"held-out accuracy over {len(SEEDS)} seeds: base {without:.4f}, PEFT {peft:.4f}, ours {ours:.4f}")
    assert abs(ours - peft) < 0.01
    assert ours > 0.8
