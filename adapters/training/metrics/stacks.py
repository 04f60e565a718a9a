"""The same for many groups at once: a fleet's outputs, padded to the same number of rows.

Rows of weight 0 are padding, whatever finite numbers they hold. A group without a row that weighs something is NaN.
"""

# G groups · N rows · K classes · O outputs
from torch import Tensor

from adapters.training.metrics.regression import cosine_of


def accuracy_stack(logits_GNK: Tensor, classes_GN: Tensor, weights_GN: Tensor) -> Tensor:
    """(G,) float64: `accuracy` of each group. A group with fewer classes has −inf in the logits of the others."""
    return _mean((logits_GNK.argmax(dim=2) == classes_GN).double(), weights_GN)


def rmse_stack(outputs_GNO: Tensor, targets_GNO: Tensor, weights_GN: Tensor) -> Tensor:
    """(G,) float64: `rmse` of each group. One temporary of the size of the outputs."""
    return _mean((outputs_GNO.double() - targets_GNO).square_().mean(dim=2), weights_GN).sqrt()


def cosine_stack(outputs_GNO: Tensor, targets_GNO: Tensor, weights_GN: Tensor) -> Tensor:
    """(G,) float64: `cosine` of each group."""
    return _mean(cosine_of(outputs_GNO.double(), targets_GNO.double()), weights_GN)


def _mean(values_GN: Tensor, weights_GN: Tensor) -> Tensor:
    return (values_GN * weights_GN).sum(dim=1) / weights_GN.double().sum(dim=1)
