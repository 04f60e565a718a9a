"""Training by gradient descent: AdamW and plain SGD, on mini-batches."""

# N rows · I in_features · O out_features · R rank · K rows of a batch
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from adapters.base_layer import BaseLayer
from adapters.errors import Diverged
from adapters.training.data import TrainingData
from adapters.training.losses import loss_of
from adapters.training.spec import HISTORY_LENGTH, Init, Method, TrainingSpec

History = list[tuple[int, float]]
"""Step, and the loss of its batch before its update."""
Report = Callable[[int, float, History], None]
"""Told after every step."""


def start_factors(
    base: BaseLayer, data: TrainingData, spec: TrainingSpec, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A (O, R) and B (R, I), float32 on the CPU, as `spec.init` says."""
    a_OR = torch.zeros(base.out_features, spec.rank)
    b_RI = torch.empty(spec.rank, base.in_features)
    if spec.init is Init.FACTORS:
        assert data.start_OR is not None
        assert data.start_RI is not None
        return data.start_OR.clone(), data.start_RI.clone()
    if spec.init is Init.RANDN:
        return a_OR.normal_(generator=generator), b_RI.normal_(generator=generator)
    # Kaiming-uniform with a = √5 is uniform within ±1/√in (He et al. 2015, eq. 14; PEFT's default).
    torch.nn.init.kaiming_uniform_(b_RI, a=math.sqrt(5), generator=generator)
    return a_OR, b_RI


def fit_gradient(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    scaling: float,
    *,
    generator: torch.Generator,
    report: Report,
) -> tuple[Tensor, Tensor, History]:
    """A (O, R), B (R, I) and the history. The base is only read. Raises `Diverged`."""
    factors = [factor.to(base.device).requires_grad_() for factor in start_factors(base, data, spec, generator)]
    a_OR, b_RI = factors
    if spec.method is Method.ADAMW:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(factors, lr=spec.learning_rate, weight_decay=0)
    else:
        optimizer = torch.optim.SGD(factors, lr=spec.learning_rate)
    bias_O = None if base.bias_O is None else base.bias_O.float()
    frozen_NO = functional.linear(data.inputs_NI, base.weight_OI.float(), bias_O)
    batch = min(spec.batch_size or data.rows, data.rows)
    steps = spec.epochs * math.ceil(data.rows / batch)
    every = math.ceil(steps / HISTORY_LENGTH)
    history: History = []
    step = 0
    for _ in range(spec.epochs):
        for rows_K in _batches(data.rows, batch, generator, base.device):
            step += 1
            x_KI, frozen_KO, targets = (
                t if rows_K is None else t[rows_K] for t in (data.inputs_NI, frozen_NO, data.targets)
            )
            y_KO = torch.addmm(frozen_KO, x_KI @ b_RI.T, a_OR.T, alpha=scaling)
            loss = loss_of(spec.loss, y_KO, targets)
            reached = loss.item()
            if not math.isfinite(reached):
                raise Diverged(f"the loss of step {step} is not finite", step=step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not all(bool(torch.isfinite(factor).all()) for factor in factors):
                raise Diverged(f"the factors are not finite after step {step}", step=step)
            if step % every == 0 or step == steps:
                history.append((step, reached))
            report(step, reached, history)
    return a_OR.detach(), b_RI.detach(), history


def _batches(rows: int, batch: int, generator: torch.Generator, device: torch.device) -> list[Tensor | None]:
    """An epoch's batches of row numbers in random order, the last one perhaps short; None means all rows."""
    if batch == rows:
        return [None]
    return list(torch.randperm(rows, generator=generator).to(device).split(batch))
