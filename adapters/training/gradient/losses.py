"""Losses with their gradients, row and class weights, and the outputs of a stack of adapters."""

# G adapters of a stack · K rows of a batch · N rows · O out_features · C classes
import math

import torch
from torch import Tensor
from torch.nn import functional

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors
from adapters.training.closed_form.statistics import base_outputs
from adapters.training.data_file import TrainingData
from adapters.training.settings import BALANCED, Loss, TrainingSpec

_ANALYTIC = (Loss.MSE, Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY)


def row_losses(spec: TrainingSpec, outputs_GOK: Tensor, targets: Tensor, documents_GK: Tensor | None = None) -> Tensor:
    """Return the unweighted loss of each row, (G, K).

    outputs_GOK: (G, O, K), where a row's outputs are a column, because small layers multiply fastest that way.
    targets: (G, O, K), or (G, K) int64 classes. documents_GK: (G, K) int64, for `multiple_negatives` only: equal
    numbers are the same document, and -1 is padding.
    """
    y_GCK = outputs_GOK if spec.classes is None else outputs_GOK[:, : spec.classes]
    match spec.loss:
        case Loss.MSE:
            return (y_GCK - targets).square().mean(dim=1)
        case Loss.HUBER:
            return functional.huber_loss(y_GCK, targets, reduction="none", delta=spec.huber_delta).mean(dim=1)
        case Loss.CROSS_ENTROPY:
            return _cross_entropy(functional.log_softmax(y_GCK, dim=1), targets, spec.label_smoothing)
        case Loss.BINARY_CROSS_ENTROPY:
            return functional.binary_cross_entropy_with_logits(y_GCK, targets, reduction="none").mean(dim=1)
        case Loss.COSINE:
            return 1 - functional.cosine_similarity(y_GCK, _unit_columns(targets), dim=1)
        case Loss.MULTIPLE_NEGATIVES:
            assert documents_GK is not None
            return _multiple_negatives(y_GCK, targets, documents_GK, spec.temperature)


def gradient_scale(spec: TrainingSpec, y_GOK: Tensor, weights_GK: Tensor | None) -> Tensor | float:
    """Return the factor of each row's gradient in the gradient of the weighted mean, (G, 1, K), or one for all rows."""
    O, K = y_GOK.shape[1:]
    by = {Loss.MSE: 2 / O, Loss.BINARY_CROSS_ENTROPY: 1 / O}.get(spec.loss, 1.0)
    if weights_GK is None:
        return 1 / K * by
    # In float64, so that weights of 1 give exactly the factor of rows without weights.
    return (weights_GK * (1 / _weight_sums(weights_GK).double() * by).to(weights_GK.dtype)).unsqueeze(1)


def loss_and_gradient(
    spec: TrainingSpec,
    y_GOK: Tensor,
    targets: Tensor,
    weights_GK: Tensor | None,
    documents_GK: Tensor | None,
    share: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of `row_losses`, (G,), and its gradient in the outputs, (G, O, K).

    The outputs are overwritten. share: `gradient_scale` of these weights, if it is known from an earlier step. The
    common losses have analytic gradients, because autograd costs as much as the rest of a small step.
    """
    if spec.loss not in _ANALYTIC or spec.classes is not None:
        y_GOK.requires_grad_()
        losses_G = weighted_mean(row_losses(spec, y_GOK, targets, documents_GK), weights_GK)
        (gradient_GOK,) = torch.autograd.grad(losses_G.sum(), y_GOK)
        return losses_G.detach(), gradient_GOK
    share = gradient_scale(spec, y_GOK, weights_GK) if share is None else share
    if spec.loss is Loss.MSE:
        gradient_GOK = y_GOK.sub_(targets)
        # Not `square`, which computes a power and takes five times as long.
        losses_GK = (gradient_GOK * gradient_GOK).mean(dim=1)
    elif spec.loss is Loss.BINARY_CROSS_ENTROPY:
        losses_GK = row_losses(spec, y_GOK, targets)
        # Not `sigmoid`, which rounds the last few numbers of a tensor differently from the rest.
        gradient_GOK = y_GOK.neg_().exp_().add_(1).reciprocal_().sub_(targets)
    else:
        log_p_GOK = functional.log_softmax(y_GOK, dim=1)
        losses_GK = _cross_entropy(log_p_GOK, targets, spec.label_smoothing)
        gradient_GOK = log_p_GOK.exp_().sub_(spec.label_smoothing / y_GOK.shape[1])
        own_G1K = torch.full_like(gradient_GOK[:, :1], spec.label_smoothing - 1)
        gradient_GOK.scatter_add_(1, targets.unsqueeze(1), own_G1K)
    return weighted_mean(losses_GK, weights_GK), gradient_GOK.mul_(share)


def _cross_entropy(log_p_GCK: Tensor, classes_GK: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy with smoothed targets: ε/C for each class, and 1 - ε more for the row's own class.

    (Szegedy et al. 2016, section 7.)
    """
    own_GK = -log_p_GCK.gather(1, classes_GK.unsqueeze(1)).squeeze(1)
    return own_GK if smoothing == 0 else (1 - smoothing) * own_GK - smoothing * log_p_GCK.mean(dim=1)


def _multiple_negatives(y_GOK: Tensor, targets_GOK: Tensor, documents_GK: Tensor, temperature: float) -> Tensor:
    """Return -log softmax over j of cos(yᵢ, tⱼ)/temperature at j = i, without equal targets (Henderson 2017, eq. 5)."""
    y_GOK, targets_GOK = functional.normalize(y_GOK, dim=1), _unit_columns(targets_GOK)
    logits_GKK = y_GOK.transpose(1, 2) @ targets_GOK / temperature
    same_GKK = documents_GK.unsqueeze(-1) == documents_GK.unsqueeze(-2)
    itself_KK = torch.eye(logits_GKK.shape[-1], dtype=torch.bool, device=logits_GKK.device)
    left_out_GKK = (same_GKK | (documents_GK < 0).unsqueeze(-2)) & ~itself_KK
    logits_GKK = logits_GKK.masked_fill(left_out_GKK, -torch.inf)
    return -functional.log_softmax(logits_GKK, dim=-1).diagonal(dim1=-2, dim2=-1)


def _unit_columns(targets_GOK: Tensor) -> Tensor:
    """Return columns of length 1, without underflow for short ones; 0 stays 0."""
    targets_GOK = targets_GOK / targets_GOK.abs().amax(dim=1, keepdim=True).clamp_min(
        torch.finfo(targets_GOK.dtype).tiny
    )
    return functional.normalize(targets_GOK, dim=1)


def weighted_mean(losses_GK: Tensor, weights_GK: Tensor | None) -> Tensor:
    """Return Σ w·loss / Σ w over rows, (G,); 0 if all weights are 0."""
    if weights_GK is None:
        return losses_GK.mean(dim=-1)
    return (losses_GK * weights_GK).sum(dim=-1) / _weight_sums(weights_GK)[:, 0]


def _weight_sums(weights_GK: Tensor) -> Tensor:
    """Return the sums of weights, (G, 1), at least the smallest normal number."""
    return weights_GK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights_GK.dtype).tiny)


def class_weights(spec: TrainingSpec, classes_N: Tensor, weights_N: Tensor | None, outputs: int) -> Tensor | None:
    """Return the weight of each class, (C,) float32, or None if all are equal.

    Balanced weights are w_c = n / (k·n_c) over the k classes that have rows (King & Zeng 2001, section 4.1), where n is
    the sum of the row weights.
    """
    if spec.class_weights is None:
        return None
    if spec.class_weights != BALANCED:
        return torch.tensor(spec.class_weights, dtype=torch.float32, device=classes_N.device)
    weights_N = torch.ones(classes_N.shape, device=classes_N.device) if weights_N is None else weights_N
    counts_C = torch.bincount(classes_N, weights_N.double(), minlength=spec.classes or outputs)
    is_present_C = counts_C > 0
    return torch.where(is_present_C, counts_C.sum() / (is_present_C.sum() * counts_C), 1.0).float()


def row_weights(data: TrainingData, weights_C: Tensor | None) -> Tensor | None:
    """Return the weight of each row times that of its class, (N,) float32, or None if all are 1.

    Only ratios matter in a mean, so the weights are scaled to about 1 by a power of two, which rounds nothing.
    """
    if weights_C is None and data.weights_N is None:
        return None
    weights_N = torch.ones(data.rows, dtype=torch.float64, device=data.inputs_NI.device)
    weights_N = weights_N if data.weights_N is None else weights_N * data.weights_N
    weights_N = weights_N if weights_C is None else weights_N * weights_C[data.targets]
    largest = float(weights_N.max())
    return (weights_N * 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else weights_N).float()


def document_ids(spec: TrainingSpec, targets_NO: Tensor) -> Tensor | None:
    """Return equal numbers for equal rows of targets, (N,) int64; None for a loss that does not compare targets."""
    return torch.unique(targets_NO, dim=0, return_inverse=True)[1] if spec.loss is Loss.MULTIPLE_NEGATIVES else None


def target_columns(targets: Tensor) -> Tensor:
    """Return targets as `row_losses` takes them: (G, K, O) -> (G, O, K); classes (G, K) as they are."""
    return targets.transpose(1, 2) if targets.dim() == 3 else targets


def compute_outputs(base: BaseLayer, inputs_NI: Tensor, factors: Factors | None, scaling: float) -> Tensor:
    """Return the outputs with these factors, or of the base layer alone, (N, I) -> (N, O) float64."""
    y_NO = base_outputs(base, inputs_NI.double())
    if factors is None:
        return y_NO
    a_OR, b_RI, own_bias_O = factors.map(lambda part: part.to(y_NO))
    y_NO = y_NO + (inputs_NI.double() @ b_RI.T) @ (a_OR * scaling).T
    return y_NO if own_bias_O is None else y_NO + scaling * own_bias_O


def add_low_rank_stack(base_GOK: Tensor, x_GKI: Tensor, factors: Factors, scaling: float) -> Tensor:
    """Return each adapter's outputs, (G, O, K), from those of the base layer; all tensors have one dtype."""
    a_GOR, b_GRI, bias_GO = factors
    y_GOK = torch.baddbmm(base_GOK, a_GOR, b_GRI @ x_GKI.transpose(1, 2), alpha=scaling)
    return y_GOK if bias_GO is None else y_GOK.add_(bias_GO.unsqueeze(2), alpha=scaling)
