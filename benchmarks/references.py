"""What one would use instead of an adapter from `auto`: scikit-learn's heads, PEFT with a tuned rate, one candidate."""

# N rows · K rows of one tenant · T test rows · I in_features · O out_features · C classes
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from torch import Tensor, nn

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.candidates.auto_fit import fit_fleet_auto
from adapters.training.data_file import TrainingData
from adapters.training.settings import Candidate, Loss, TrainingSpec
from benchmarks.worlds import Classes, Inputs, Tenant, World

HEAD_STRENGTHS = (1.0, 10.0, 100.0)
"""C of the heads; all tenants of a world get the one that is best for their mean on the test rows."""
RATES = (0.0003, 0.001, 0.003, 0.01)
_EPOCHS, _BATCH = 50, 64
_HELD_OUT = 0.2


def own_heads(tenants: Sequence[Tenant]) -> list[Classes]:
    """Return the classes (T,) that a logistic regression on each tenant's own rows predicts."""
    by_strength = [[_head(tenant, strength) for tenant in tenants] for strength in HEAD_STRENGTHS]

    def mean_accuracy(predicted: list[Classes]) -> float:
        pairs = zip(predicted, tenants, strict=True)
        return float(np.mean([(classes_T == tenant.test_classes_T).mean() for classes_T, tenant in pairs]))

    return max(by_strength, key=mean_accuracy)


def _head(tenant: Tenant, strength: float) -> Classes:
    if len(set(tenant.classes_K)) == 1:
        return np.full(len(tenant.test_classes_T), tenant.classes_K[0])
    with warnings.catch_warnings():
        # It warns if almost every row has a class of its own.
        warnings.simplefilter("ignore", UserWarning)
        head = LogisticRegression(C=strength, max_iter=1_000).fit(tenant.inputs_KI, tenant.classes_K)
    predicted_T: Classes = head.predict(tenant.test_inputs_TI)
    return predicted_T


def tuned_head(inputs_NI: Inputs, classes_N: Classes, test_inputs_TI: Inputs) -> Classes:
    """Return the classes (T,) that scikit-learn's LogisticRegressionCV predicts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        head = LogisticRegressionCV(Cs=np.logspace(-1, 3, 5), cv=5, max_iter=500).fit(inputs_NI, classes_N)
    predicted_T: Classes = head.predict(test_inputs_TI)
    return predicted_T


def candidate_alone(world: World, candidate: Candidate) -> list[Classes]:
    """Return the classes (T,) that each tenant's adapter predicts if a fleet has only this candidate."""
    base = base_layer(world.weight_CI, world.bias_C)
    inputs_NI = np.concatenate([tenant.inputs_KI for tenant in world.tenants])
    classes_N = np.concatenate([tenant.classes_K for tenant in world.tenants])
    groups_N = np.repeat(np.arange(len(world.tenants)), [len(tenant.classes_K) for tenant in world.tenants])
    inputs, targets, groups = map(torch.from_numpy, (inputs_NI, classes_N, groups_N))
    data = TrainingData(inputs, targets, groups_N=groups)
    fits = fit_fleet_auto(base, data, closed_form_spec(base, (candidate,)), labels=world.labels)
    adapters = {fit.position: fit.adapter for fit in chain.from_iterable(fits)}
    return [
        outputs_of(base, adapters[position], tenant.test_inputs_TI).argmax(1)
        for position, tenant in enumerate(world.tenants)
    ]


def closed_form_spec(base: BaseLayer, candidates: tuple[Candidate, ...]) -> TrainingSpec:
    """Return what `auto` plans for classes, with these candidates."""
    rank = min(base.in_features, base.out_features)
    return TrainingSpec(
        rank=rank,
        alpha=rank,
        alpha_is_rank=True,
        loss=Loss.CROSS_ENTROPY,
        candidates=candidates,
        try_bias=True,
        try_ridges=True,
    )


def base_layer(weight_OI: Inputs, bias_O: Inputs | None) -> BaseLayer:
    """Return the layer as the service loads it."""
    bias = None if bias_O is None else torch.from_numpy(bias_O)
    norm = float(np.linalg.norm(weight_OI.astype(np.float64)))
    return BaseLayer(torch.from_numpy(weight_OI), bias, "benchmark", fingerprint="benchmark", weight_norm=norm)


def outputs_of(base: BaseLayer, adapter: Adapter | None, inputs_TI: Inputs) -> NDArray[np.float32]:
    """Return (T, O), the outputs of the layer with the adapter; None is the base layer alone."""
    x_TI = torch.from_numpy(inputs_TI)
    outputs_TO = x_TI @ base.weight_OI.T
    if base.bias_O is not None:
        outputs_TO = outputs_TO + base.bias_O
    if adapter is not None:
        change_TO = (x_TI @ adapter.b_RI.T) @ adapter.a_OR.T
        outputs_TO = outputs_TO + adapter.scaling * (
            change_TO if adapter.bias_O is None else change_TO + adapter.bias_O
        )
    return outputs_TO.numpy()


def tuned_peft(
    base: BaseLayer, inputs_NI: Inputs, classes_N: Classes, test_inputs_TI: Inputs, *, seed: int
) -> tuple[Classes, float]:
    """Return the classes (T,) that PEFT's layer predicts, trained by AdamW, and the rate.

    A fifth of the rows chooses the rate; then all rows are trained on.
    """
    x_NI, y_N, x_TI = torch.from_numpy(inputs_NI), torch.from_numpy(classes_N), torch.from_numpy(test_inputs_TI)
    held = int(_HELD_OUT * len(y_N))

    def held_out_accuracy(rate: float) -> float:
        outputs = _train_peft(base, x_NI[held:], y_N[held:], rate, seed)(x_NI[:held])
        return float((outputs.argmax(1) == y_N[:held]).float().mean())

    rate = max(RATES, key=held_out_accuracy)
    return _train_peft(base, x_NI, y_N, rate, seed)(x_TI).argmax(1).numpy(), rate


def _train_peft(base: BaseLayer, x_NI: Tensor, y_N: Tensor, rate: float, seed: int) -> LoraLinear:
    """Train at full rank, with a bias, for 50 epochs in batches of 64 rows."""
    torch.manual_seed(seed)
    linear = nn.Linear(base.in_features, base.out_features, bias=base.bias_O is not None)
    linear.load_state_dict({"weight": base.weight_OI} | ({} if base.bias_O is None else {"bias": base.bias_O}))
    rank = min(base.in_features, base.out_features)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_bias=True)
    layer = LoraLinear(linear, "adapter", config, r=rank, lora_alpha=rank)
    trained = [parameter for name, parameter in layer.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for rows_K in _batches(len(y_N)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x_NI[rows_K]), y_N[rows_K]).backward()
        optimizer.step()
    return layer.eval()


def _batches(rows: int) -> Iterator[Tensor]:
    for _ in range(_EPOCHS):
        yield from torch.randperm(rows).split(_BATCH)
