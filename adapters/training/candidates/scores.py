"""Losses, errors and residuals of the outputs of a task, for stacks of groups.

A candidate changes outputs z by one ridge regression on the negative gradient of the loss at z, times a step. For
squared error that is the residual, and the step is 1. For classes it is y - softmax(z), as in gradient boosting
(Friedman 2001, section 4.6); a step of 2 with the whole residual is the one that a bound of the curvature guarantees
to lower the loss (Böhning & Lindsay 1988). So logits need not be brought to the scale of 0 and 1, and every fit stays
linear in its residuals, which exact leave-out formulas need.
"""

# G groups · N rows · C outputs of the task
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapters.training.settings import Loss

LINEAR_LOSSES = (Loss.MSE, Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one task; `loss` is one of `LINEAR_LOSSES`. The leading dimensions of all arguments broadcast."""

    loss: Loss

    @property
    def is_regression(self) -> bool:
        """Return whether the targets are numbers to hit."""
        return self.loss is Loss.MSE

    @property
    def is_shares(self) -> bool:
        """Return whether the targets are shares of labels."""
        return self.loss is Loss.BINARY_CROSS_ENTROPY

    @property
    def metric(self) -> str:
        """Return the name of the figure that `errors` averages to."""
        names = {Loss.MSE: "mse", Loss.CROSS_ENTROPY: "accuracy", Loss.BINARY_CROSS_ENTROPY: "label_accuracy"}
        return names.get(self.loss, "loss")

    @property
    def steps(self) -> tuple[float, ...]:
        """Return the steps to try."""
        return (1.0,) if self.is_regression else (3.0, 10.0)

    @property
    def ridges(self) -> tuple[float, ...]:
        """Return the ridges to try, for features whose mean square is 1."""
        return (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0) if self.is_regression else (0.1, 0.3, 1.0, 3.0, 10.0)

    @property
    def scales(self) -> tuple[float, ...]:
        """Return the scales of the base layer's outputs to try: 1, and less for a base layer that is too sure."""
        return (1.0,) if self.is_regression else (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1)

    def wide(self, targets: Tensor, outputs: int) -> Tensor:
        """Return the targets as numbers, (…, N, C) float64."""
        return functional.one_hot(targets, outputs).double() if self.loss is Loss.CROSS_ENTROPY else targets.double()

    def residuals(self, z_NC: Tensor, y_NC: Tensor, dim: int = -1) -> Tensor:
        """Return the negative gradient of the loss, up to a factor, (…, N, C); y_NC is from `wide`."""
        if self.is_regression:
            return y_NC - z_NC
        return y_NC - (torch.softmax(z_NC, dim=dim) if self.loss is Loss.CROSS_ENTROPY else torch.sigmoid(z_NC))

    def losses(self, z_NC: Tensor, y_NC: Tensor, dim: int = -1) -> Tensor:
        """Return the loss of each row, (…, N); `dim` is the dimension of the outputs."""
        if self.is_regression:
            return (z_NC - y_NC).square().mean(dim)
        if self.loss is Loss.CROSS_ENTROPY:
            # As `torch.logsumexp`, but in place: it takes most of the time of a fleet.
            largest_N1 = z_NC.amax(dim, keepdim=True)
            sums_N = (z_NC - largest_N1).exp_().sum(dim).log_()
            return sums_N + largest_N1.squeeze(dim) - (z_NC * y_NC).sum(dim)
        return (functional.softplus(z_NC) - z_NC * y_NC).mean(dim)

    def errors(self, z_NC: Tensor, y_NC: Tensor, dim: int = -1) -> Tensor:
        """Return the error of each row that a judgement counts, (…, N): wrong or not, or the squared error."""
        if self.is_regression:
            return self.losses(z_NC, y_NC, dim)
        if self.loss is Loss.CROSS_ENTROPY:
            return (_place_of_largest(z_NC, dim) != _place_of_largest(y_NC, dim)).to(z_NC.dtype)
        return ((z_NC > 0) != (y_NC > 0.5)).to(z_NC.dtype).mean(dim)

    def guess(self, y_GNC: Tensor, weights_GN: Tensor) -> Tensor:
        """Return the outputs of the trivial guess from these rows, (…, 1, C)."""
        total = weights_GN.sum(-1)[..., None].clamp_min(1e-300)
        return self.guess_of_mean((y_GNC * weights_GN[..., None]).sum(-2) / total)[..., None, :]

    def guess_of_mean(self, mean_C: Tensor) -> Tensor:
        """Return the outputs of the trivial guess: the mean of the targets, the frequencies, or the log odds."""
        return torch.logit(mean_C, eps=1e-9) if self.is_shares else mean_C


def _place_of_largest(z_NC: Tensor, dim: int) -> Tensor:
    """Return a number for the place of the first of the largest outputs, (…, N); faster than `argmax` for dim -2."""
    if dim == -1:
        return z_NC.argmax(dim)
    place_C1 = torch.arange(z_NC.shape[dim], 0, -1, dtype=z_NC.dtype)[:, None]
    return ((z_NC == z_NC.amax(dim, keepdim=True)) * place_C1).amax(dim)
