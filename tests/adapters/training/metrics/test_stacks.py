"""Many groups at once agree with each alone."""

import pytest
import torch

from adapters.training.metrics import Task, measure
from adapters.training.metrics.stacks import accuracy_stack, cosine_stack, rmse_stack
from tests.adapters.training.metrics.rows import Rows, held_out, plain

SIZES = (7, 1, 12)


def _stacked(groups: list[Rows]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, targets and weights, padded to the largest group."""
    pads = [
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
        for parts, value in (
            ([group.outputs_NO for group in groups], 99.0),
            ([group.targets for group in groups], 1),
            ([group.weights_N + 1 for group in groups], 0),
        )
    ]
    return pads[0], pads[1], pads[2]


def test_each_group_has_its_own_accuracy() -> None:
    groups = [held_out(Task.CLASSIFICATION, rows=size, seed=size) for size in SIZES]
    alone = [measure(group.task, group.outputs_NO, group.targets, weights_N=group.weights_N + 1) for group in groups]
    reached = accuracy_stack(*_stacked(groups))
    assert reached.tolist() == pytest.approx([plain(metrics, "accuracy") for metrics in alone])
    assert len(set(reached.tolist())) > 1


def test_each_group_has_its_own_error_and_cosine() -> None:
    groups = [held_out(Task.REGRESSION, rows=size, seed=size) for size in SIZES]
    alone = [measure(group.task, group.outputs_NO, group.targets, weights_N=group.weights_N + 1) for group in groups]
    for name, stack in (("rmse", rmse_stack), ("cosine", cosine_stack)):
        reached = stack(*_stacked(groups))
        assert reached.dtype == torch.float64
        assert reached.tolist() == pytest.approx([plain(metrics, name) for metrics in alone])


def test_a_group_without_rows_is_not_a_number_and_spoils_no_other() -> None:
    logits, weights = torch.zeros(2, 3, 2), torch.tensor([[0.0, 0, 0], [1, 1, 0]])
    reached = accuracy_stack(logits, torch.zeros(2, 3, dtype=torch.int64), weights)
    assert reached.isnan().tolist() == [True, False]
    assert reached[1] == 1
