"""One adapter by autograd and `torch.optim`, as one writes it: no base layer's answer is kept, nothing is shared."""

# N rows · K rows of a batch · I in_features · O out_features · R rank
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW


def train_alone(
    weight_OI: Tensor,
    inputs_NI: Tensor,
    targets_NO: Tensor,
    *,
    rank: int,
    epochs: int,
    batch_size: int,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return A (O, R) and B (R, I) of the layer x·(W + A·B)ᵀ, trained by AdamW on the squared error from A = 0."""
    generator = torch.Generator().manual_seed(seed)
    a_OR = torch.zeros(weight_OI.shape[0], rank)
    b_RI = torch.empty(rank, weight_OI.shape[1])
    torch.nn.init.kaiming_uniform_(b_RI, a=5**0.5, generator=generator)
    a_OR.requires_grad_()
    b_RI.requires_grad_()
    optimizer = AdamW([a_OR, b_RI], lr=learning_rate, weight_decay=0.0)
    rows = len(inputs_NI)
    for _ in range(epochs):
        # A batch of all rows needs no order.
        order_N = torch.randperm(rows, generator=generator) if batch_size < rows else None
        for begin in range(0, rows, batch_size):
            if order_N is None:
                x_KI, targets_KO = inputs_NI, targets_NO
            else:
                rows_K = order_N[begin : begin + batch_size]
                x_KI, targets_KO = inputs_NI[rows_K], targets_NO[rows_K]
            outputs_KO = x_KI @ weight_OI.T + (x_KI @ b_RI.T) @ a_OR.T
            loss = functional.mse_loss(outputs_KO, targets_KO)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return a_OR.detach(), b_RI.detach()
