"""The losses, and what an adapter reaches on rows, in float64."""

# N rows · I in_features · O out_features · R rank
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from adapters.base_layer import BaseLayer
from adapters.training.data import TrainingData
from adapters.training.spec import Loss

_CHUNK_ROWS = 8192


def loss_of(loss: Loss, outputs_NO: Tensor, targets: Tensor) -> Tensor:
    """A scalar: the mean over all elements (mse), or over rows (cross-entropy)."""
    if loss is Loss.MSE:
        return functional.mse_loss(outputs_NO, targets)
    return functional.cross_entropy(outputs_NO, targets)


def evaluate(
    base: BaseLayer, data: TrainingData, loss: Loss, *, a_OR: Tensor, b_RI: Tensor, scaling: float
) -> Mapping[str, float]:
    """`loss` and, for classes, `accuracy` of the adapted layer on all rows; float64, a chunk of rows at a time."""
    weight_OI = base.weight_OI.double()
    bias_O = None if base.bias_O is None else base.bias_O.double()
    left_OR, right_RI = a_OR.double() * scaling, b_RI.double()
    total, right = 0.0, 0
    for begin in range(0, data.rows, _CHUNK_ROWS):
        x_NI = data.inputs_NI[begin : begin + _CHUNK_ROWS].double()
        targets = data.targets[begin : begin + _CHUNK_ROWS]
        y_NO = functional.linear(x_NI, weight_OI, bias_O) + (x_NI @ right_RI.T) @ left_OR.T
        if loss is Loss.MSE:
            targets = targets.double()
        else:
            right += int((y_NO.argmax(dim=1) == targets).sum())
        total += float(loss_of(loss, y_NO, targets)) * x_NI.shape[0]
    reached = {"loss": total / data.rows}
    return reached if loss is Loss.MSE else reached | {"accuracy": right / data.rows}
