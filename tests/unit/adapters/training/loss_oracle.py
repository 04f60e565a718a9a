"""The losses as their papers write them, row by row in float64, and training by them with autograd and torch.optim."""

# N rows · K rows of a batch · I in_features · O out_features · R rank · C classes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.settings import Loss, Method, TrainingSpec


def losses_of_rows(spec: TrainingSpec, y_KO: Tensor, targets: Tensor) -> Tensor:
    """(K,): the loss of each row of a batch."""
    y_KO = y_KO[:, : spec.classes]
    if spec.loss is Loss.MULTIPLE_NEGATIVES:
        return torch.stack([_among(row, y_KO, targets, spec.temperature) for row in range(len(y_KO))])
    of_row: Callable[[TrainingSpec, Tensor, Tensor], Tensor] = {
        Loss.MSE: _squared,
        Loss.HUBER: _huber,
        Loss.CROSS_ENTROPY: _smoothed,
        Loss.BINARY_CROSS_ENTROPY: _logistic,
        Loss.COSINE: lambda _spec, y_O, t_O: 1 - _cosine(y_O, t_O),
    }[spec.loss]
    return torch.stack([of_row(spec, y_O, target) for y_O, target in zip(y_KO, targets, strict=True)])


def _cosine(y_O: Tensor, t_O: Tensor) -> Tensor:
    return y_O @ t_O / ((y_O @ y_O) * (t_O @ t_O)).sqrt()


def _squared(_spec: TrainingSpec, y_O: Tensor, t_O: Tensor) -> Tensor:
    return ((y_O - t_O) ** 2).sum() / len(y_O)


def _huber(spec: TrainingSpec, y_O: Tensor, t_O: Tensor) -> Tensor:
    apart_O, delta = (y_O - t_O).abs(), spec.huber_delta
    return torch.where(apart_O <= delta, apart_O**2 / 2, delta * (apart_O - delta / 2)).sum() / len(y_O)


def _smoothed(spec: TrainingSpec, y_C: Tensor, own: Tensor) -> Tensor:
    wanted_C = torch.full_like(y_C, spec.label_smoothing / len(y_C))
    wanted_C[own] += 1 - spec.label_smoothing
    return -(wanted_C * (y_C.exp() / y_C.exp().sum()).log()).sum()


def _logistic(_spec: TrainingSpec, y_O: Tensor, t_O: Tensor) -> Tensor:
    p_O = 1 / (1 + (-y_O).exp())
    return -(t_O * p_O.log() + (1 - t_O) * (1 - p_O).log()).sum() / len(y_O)


def _among(row: int, y_KO: Tensor, targets_KO: Tensor, temperature: float) -> Tensor:
    others = [k for k in range(len(y_KO)) if k == row or not torch.equal(targets_KO[k], targets_KO[row])]
    odds = {other: (_cosine(y_KO[row], targets_KO[other]) / temperature).exp() for other in others}
    return -(odds[row] / torch.stack(list(odds.values())).sum()).log()


def mean_of_rows(losses_K: Tensor, weights_K: Tensor | None) -> Tensor:
    """The weighted mean."""
    return losses_K.mean() if weights_K is None else (losses_K * weights_K).sum() / weights_K.sum()


@dataclass
class Descended:
    """Where training by hand has come: its factors after each step, from 0 on, and each step's loss."""

    factors: list[list[Tensor]]
    losses: list[float]


def descend_by_hand(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    start: tuple[Tensor, Tensor],
    batches: Sequence[Tensor],
    rate: Callable[[int], float] | None = None,
) -> Descended:
    """Autograd, torch.optim and float64; one step a batch, the rate of step k (from 1) being `rate(k)`."""
    factors = [each.double().clone().requires_grad_() for each in (*start, torch.zeros(base.out_features))]
    trained = factors if spec.bias else factors[:2]
    optimizer: torch.optim.Optimizer
    if spec.method is Method.ADAMW:
        optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            trained, lr=spec.learning_rate, weight_decay=spec.weight_decay, momentum=spec.momentum
        )
    done = Descended([[each.detach().clone() for each in factors]], [])
    for step, rows_K in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = spec.learning_rate if rate is None else rate(step)
        optimizer.zero_grad()
        y_KO = outputs_by_hand(base, data.inputs_NI[rows_K], factors, spec.scaling)
        weights_K = None if data.weights_N is None else data.weights_N[rows_K].double()
        targets = data.targets[rows_K]
        targets = targets.double() if targets.is_floating_point() else targets
        loss = mean_of_rows(losses_of_rows(spec, y_KO, targets), weights_K)
        loss.backward()
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, spec.clip_norm)
        optimizer.step()
        done.losses.append(float(loss.detach()))
        done.factors.append([each.detach().clone() for each in factors])
    return done


def outputs_by_hand(base: BaseLayer, x_KI: Tensor, factors: Sequence[Tensor], scaling: float) -> Tensor:
    """(K, O) float64: `x·(W + s·A·B)ᵀ + b + s·bias`."""
    a_OR, b_RI, bias_O = factors
    shift_O = scaling * bias_O if base.bias_O is None else base.bias_O.double() + scaling * bias_O
    return x_KI.double() @ (base.weight_OI.double() + scaling * a_OR @ b_RI).T + shift_O
