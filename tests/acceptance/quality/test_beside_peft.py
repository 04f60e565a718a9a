"""Mini-batches with weight decay, a warm-up and a cosine schedule: the loss that PEFT reaches with torch's AdamW."""

# N rows · I in_features · O out_features
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.data_file import TrainingData
from adapters.training.fit import fit
from adapters.training.settings import Loss, Schedule, TrainingSpec
from tests.acceptance.quality.real_data import classes

pytestmark = pytest.mark.slow

RANK, BATCH, EPOCHS, RATE, DECAY, WARMUP = 4, 64, 30, 0.02, 0.1, 20
SEEDS = (0, 1, 2)
SPEC = TrainingSpec(
    rank=RANK,
    alpha=2.0 * RANK,
    loss=Loss.CROSS_ENTROPY,
    epochs=EPOCHS,
    batch_size=BATCH,
    learning_rate=RATE,
    weight_decay=DECAY,
    schedule=Schedule.COSINE,
    warmup_steps=WARMUP,
)


class Net(nn.Module):
    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.linear = nn.Linear(base.in_features, base.out_features)
        assert base.bias_O is not None
        self.linear.load_state_dict({"weight": base.weight_OI, "bias": base.bias_O})

    def forward(self, x_NI: Tensor) -> Any:
        return self.linear(x_NI)


def _with_peft(base: BaseLayer, data: TrainingData, seed: int) -> float:
    """Its own start and its own order of rows, of the same distributions."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["linear"])
    model = get_peft_model(Net(base), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * math.ceil(data.rows / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: (
            (done + 1) / WARMUP if done < WARMUP else (1 + math.cos(math.pi * (done - WARMUP) / (steps - WARMUP))) / 2
        ),
    )
    for _ in range(EPOCHS):
        for rows_K in torch.randperm(data.rows).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.inputs_NI[rows_K]), data.targets[rows_K]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(data.inputs_NI), data.targets))


def test_as_many_steps_bring_the_loss_as_far_down_as_with_peft() -> None:
    """Both over several seeds: neither a start nor an order of rows decides."""
    base = load_base_layer("random:30,2,7", device="cpu")
    data = classes("cancer", 0).data
    theirs = [_with_peft(base, data, seed) for seed in SEEDS]
    done = [fit(base, data, replace(SPEC, seed=seed)) for seed in SEEDS]
    ours = [each.metrics["train_loss"] for each in done]
    print(f"training loss over {len(SEEDS)} seeds: ours {np.mean(ours):.5f}, PEFT {np.mean(theirs):.5f}")
    assert np.mean(ours) < 0.15 * done[0].metrics["base_train_loss"]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.01)
