"""Rows on two sides, and what an adapter's answers to them come to."""

# N rows · K rows of one side · I in_features · O out_features
from dataclasses import replace

import torch
from torch import Tensor

from adapters.lora.adapter import Adapter
from adapters.training.data_file import TrainingData
from adapters.training.planning.split import Split
from adapters.training.settings import Loss, Method, TrainingSpec
from tests.support.dense_oracle import answer, layer
from tests.unit.adapters.training.loss_oracle import losses_of_rows, mean_of_rows

O, I, ROWS = 4, 6, 50
DRAW = torch.Generator().manual_seed(0)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
INPUTS = torch.randn(ROWS, I, generator=DRAW)
NUMBERS = INPUTS @ BASE.weight_OI.T + torch.randn(ROWS, O, generator=DRAW)
NUMBERS[::7] = NUMBERS[0]
WEIGHTS = torch.rand(ROWS, generator=DRAW) * 2
WEIGHTS[::9] = 0
CLASSES = torch.cat([torch.zeros(30), torch.ones(12), torch.full((8,), 2.0)]).long()[
    torch.randperm(ROWS, generator=DRAW)
]
LABELS = torch.randint(0, 2, (ROWS, 3), generator=DRAW).float()
SPLIT = Split(fraction=0.4)
SPEC = TrainingSpec(rank=2, alpha=3.0, epochs=3, batch_size=8, learning_rate=0.02, bias=True, split=SPLIT, seed=6)
SPECS = {
    "mse": SPEC,
    "closed form": replace(SPEC, method=Method.CLOSED_FORM, ridge=2.0),
    "huber": replace(SPEC, loss=Loss.HUBER, huber_delta=0.5),
    "cosine": replace(SPEC, loss=Loss.COSINE),
    "cross_entropy": replace(SPEC, loss=Loss.CROSS_ENTROPY),
    "cross_entropy, 3 of 4": replace(SPEC, loss=Loss.CROSS_ENTROPY, classes=3, label_smoothing=0.2),
    "binary_cross_entropy, 3 of 4": replace(SPEC, loss=Loss.BINARY_CROSS_ENTROPY, classes=3),
    "multiple_negatives": replace(SPEC, loss=Loss.MULTIPLE_NEGATIVES, temperature=0.5),
}
TARGETS = {Loss.CROSS_ENTROPY: CLASSES, Loss.BINARY_CROSS_ENTROPY: LABELS}


def data_of(spec: TrainingSpec, weighted: bool) -> TrainingData:
    """What a spec of these is trained on."""
    return TrainingData(INPUTS, TARGETS.get(spec.loss, NUMBERS), weights_N=WEIGHTS if weighted else None)


def held_apart(data: TrainingData) -> TrainingData:
    """The same rows, those that the split would hold out as a table of their own."""
    training, held = (data.take(rows_K) for rows_K in sides())
    return replace(training, held_inputs_NI=held.inputs_NI, held_targets=held.targets, held_weights_N=held.weights_N)


def sides() -> tuple[Tensor, Tensor]:
    """Row numbers to train on and held out, as the seed draws them."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(SPEC.seed))
    return order[20:].sort().values, order[:20].sort().values


def answers_of(rows_K: Tensor, adapter: Adapter | None) -> Tensor:
    """(K, O) float64."""
    return torch.from_numpy(answer(BASE, INPUTS[rows_K], adapter))


def loss_of(spec: TrainingSpec, rows_K: Tensor, adapter: Adapter | None, weights_N: Tensor | None) -> float:
    """The weighted mean over these rows; among negatives in batches of them as they stand."""
    y_KO, targets = answers_of(rows_K, adapter), TARGETS.get(spec.loss, NUMBERS)[rows_K]
    targets = targets.double() if targets.is_floating_point() else targets
    size = 8 if spec.loss is Loss.MULTIPLE_NEGATIVES else len(rows_K)
    losses_K = torch.cat(
        [losses_of_rows(spec, *each) for each in zip(y_KO.split(size), targets.split(size), strict=True)]
    )
    return float(mean_of_rows(losses_K, None if weights_N is None else weights_N[rows_K].double()))
