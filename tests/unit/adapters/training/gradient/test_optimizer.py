"""One update of each adapter of a stack is the one that torch.optim makes of it alone."""

# G adapters of a stack · P numbers of one adapter's factors
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters.training.gradient.optimizer import Optimizer
from adapters.training.settings import Method, TrainingSpec

G, P, STEPS = 4, 11, 25
SPEC = TrainingSpec(rank=1, alpha=1.0)
SPECS = {
    "adamw": SPEC,
    "adamw, decay": replace(SPEC, weight_decay=0.3),
    "adamw, clipped": replace(SPEC, clip_norm=1.5),
    "adamw, decay, clipped": replace(SPEC, weight_decay=0.3, clip_norm=1.5),
    "sgd": replace(SPEC, method=Method.SGD),
    "sgd, momentum": replace(SPEC, method=Method.SGD, momentum=0.9),
    "sgd, decay": replace(SPEC, method=Method.SGD, weight_decay=0.3),
    "sgd, momentum, decay, clipped": replace(SPEC, method=Method.SGD, momentum=0.9, weight_decay=0.3, clip_norm=1.5),
}


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Norms from far below the clip to far above it.
SLOPES = _numbers(STEPS, G, P, seed=1) * torch.tensor([0.01, 0.4, 1.0, 30.0], dtype=torch.float64)[:, None]
START = _numbers(G, P, seed=2)


def _with_torch(spec: TrainingSpec, group: int, rates: list[float]) -> Tensor:
    parameter = START[group].clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    if spec.method is Method.ADAMW:
        optimizer = torch.optim.AdamW([parameter], weight_decay=spec.weight_decay)
    else:
        optimizer = torch.optim.SGD([parameter], momentum=spec.momentum, weight_decay=spec.weight_decay)
    for gradients_GP, rate in zip(SLOPES, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradients_GP[group].clone()
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], spec.clip_norm)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("own_rates", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_updates_are_torch_s(name: str, own_rates: bool) -> None:
    spec = SPECS[name]
    factors_GP = START.clone()
    optimizer = Optimizer(spec, factors_GP)
    rates = [[0.1 / step * (1 + own_rates * group) for group in range(G)] for step in range(1, STEPS + 1)]
    for step, (gradients_GP, of_step) in enumerate(zip(SLOPES, rates, strict=True), start=1):
        given = torch.tensor(of_step, dtype=torch.float64).unsqueeze(1) if own_rates else of_step[0]
        optimizer.update(factors_GP, gradients_GP.clone(), given, step=step)
    for group in range(G):
        wanted_P = _with_torch(spec, group, [of_step[group] for of_step in rates])
        torch.testing.assert_close(factors_GP[group], wanted_P, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_adapters_that_stay_go_on_as_if_the_others_had_never_been_there(name: str) -> None:
    spec, stay_G = SPECS[name], torch.tensor([0, 3])
    all_of_them, those_alone = START.clone(), START[stay_G].clone()
    together, alone = Optimizer(spec, all_of_them), Optimizer(spec, those_alone)
    for step, gradients_GP in enumerate(SLOPES, start=1):
        if step == 10:
            all_of_them = all_of_them[stay_G]
            together.keep(stay_G)
        together.update(all_of_them, (gradients_GP if step < 10 else gradients_GP[stay_G]).clone(), 0.05, step=step)
        alone.update(those_alone, gradients_GP[stay_G].clone(), 0.05, step=step)
    assert all_of_them.equal(those_alone)
