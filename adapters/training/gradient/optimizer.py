"""Optimizers of gradient descent: AdamW, and SGD with momentum, for a stack of adapters, and their learning rates."""

# G adapters of a stack · P numbers of the factors, padded
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.training.settings import Method, Schedule, TrainingSpec

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


def learning_rate(spec: TrainingSpec, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 1, of `steps`: its warm-up, then its schedule."""
    if step <= spec.warmup_steps:
        return spec.learning_rate * step / spec.warmup_steps
    if spec.schedule is Schedule.CONSTANT:
        return spec.learning_rate
    done = (step - spec.warmup_steps - 1) / max(1, steps - spec.warmup_steps)
    share = 1 - done if spec.schedule is Schedule.LINEAR else (1 + math.cos(math.pi * done)) / 2
    return spec.learning_rate * share


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), or SGD with momentum (Sutskever et al. 2013, as in torch).

    AdamW's weight decay is decoupled; that of SGD is part of the gradient.
    """

    def __init__(self, spec: TrainingSpec, factors_GP: Tensor) -> None:
        self._spec = spec
        moments = 2 if spec.method is Method.ADAMW else 1 if spec.momentum > 0 else 0
        # Moments of earlier gradients, (G, P) each.
        self.state: Sequence[Tensor] = [torch.zeros_like(factors_GP) for _ in range(moments)]

    def keep(self, positions_G: Tensor) -> None:
        """Drop the state of all adapters but these."""
        self.state = [moment[positions_G] for moment in self.state]

    def update(self, factors_GP: Tensor, gradients_GP: Tensor, rates_G1: Tensor | float, *, step: int) -> None:
        """Update the factors in place; `gradients_GP` may be overwritten. `step` counts from 1.

        rates_G1: the learning rates, (G, 1) float64, or one for all adapters.
        """
        spec = self._spec
        if spec.clip_norm is not None:
            norms_G1 = torch.linalg.vector_norm(gradients_GP, dim=1, keepdim=True)
            gradients_GP.mul_((spec.clip_norm / (norms_G1 + 1e-6)).clamp_max(1.0))
        if spec.method is Method.ADAMW:
            first_GP, second_GP = self.state
            if spec.weight_decay > 0:
                factors_GP.mul_(_to_dtype_of(1 - rates_G1 * spec.weight_decay, factors_GP))
            first_GP.lerp_(gradients_GP, 1 - _BETA1)
            second_GP.mul_(_BETA2).addcmul_(gradients_GP, gradients_GP, value=1 - _BETA2)
            root_GP = second_GP.sqrt().div_((1 - _BETA2**step) ** 0.5).add_(_EPS)
            corrected = 1 / (1 - _BETA1**step)
            if isinstance(rates_G1, float):
                factors_GP.addcdiv_(first_GP, root_GP, value=-rates_G1 * corrected)
            else:
                # Rounded at the same point as in `addcdiv`, so that both branches give the same bits.
                factors_GP.add_(first_GP.mul(_to_dtype_of(-rates_G1 * corrected, factors_GP)).div_(root_GP))
            return
        if spec.weight_decay > 0:
            gradients_GP.add_(factors_GP, alpha=spec.weight_decay)
        if spec.momentum > 0:
            (velocity_GP,) = self.state
            # The first velocity is the first gradient, as in torch.optim.SGD.
            gradients_GP = velocity_GP.mul_(spec.momentum if step > 1 else 0.0).add_(gradients_GP)
        factors_GP.sub_(gradients_GP * _to_dtype_of(rates_G1, factors_GP))


def _to_dtype_of(numbers_G1: Tensor | float, like: Tensor) -> Tensor | float:
    """Return numbers in the dtype of `like`; a Python float as it is."""
    return numbers_G1.to(like.dtype) if isinstance(numbers_G1, Tensor) else numbers_G1
