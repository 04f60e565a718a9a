"""Groups of a fleet on their way to adapters: their rows and choices, and the errors by which each is judged."""

# G groups of a stack · N rows of a group, padded · K rows of one group · C outputs of the task
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapters.errors import LoraplexError
from adapters.lora.adapter import Adapter
from adapters.training.candidates import small
from adapters.training.candidates.composed import Composed
from adapters.training.candidates.descent import Descent
from adapters.training.candidates.fit_result import Tried, stack_metrics
from adapters.training.candidates.small import Stack
from adapters.training.candidates.task import FitTask, Sides
from adapters.training.evaluation.row_errors import replace_trained_errors


@dataclass(slots=True, eq=False)
class Group:
    """State of the fit of one adapter: its rows, the choice, and its errors."""

    position: int
    rows_K: Tensor
    sides: Sides
    fold_errors_K: Tensor | None = None
    """Errors of the training rows in outer folds."""
    composed: Composed | None = None
    """Of many rows."""
    descent: Descent | None = None
    tried: Tried | None = None
    read_adapter: Callable[[], Adapter] | None = None
    """Reader of the adapter; None without one."""
    error: LoraplexError | None = None
    left_out_NC: Tensor | None = None
    """Outputs of all rows, each by a fit of the choice without the row; for the suspects only."""
    errors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter | None:
        """Return the adapter; None without one."""
        return None if self.read_adapter is None else self.read_adapter()


def compare_with_base(task: FitTask, part: Sequence[Group], stack: Stack) -> None:
    """Take the errors of the base layer and of the trivial guess on rows in outer folds, for a stack at once."""
    few = [index for index, group in enumerate(part) if group.sides.is_cross_validated]
    if not few:
        return
    sizes = [len(part[index].sides.training_K) for index in few]
    base_errors = task.base_errors(task.data.take(torch.cat([part[index].sides.training_K for index in few])))
    guess_GN = torch.zeros_like(stack.weights_GN)
    for fold in range(small.FOLDS):
        is_held_GN = stack.folds_GN == fold
        guess_G1C = task.scores.guess(stack.y_GNC, stack.weights_GN * ~is_held_GN)
        errors_GN = task.scores.errors(guess_G1C.expand_as(stack.y_GNC), stack.y_GNC)
        guess_GN = torch.where(is_held_GN, errors_GN, guess_GN)
    for index, size, base_K in zip(few, sizes, base_errors.split(sizes), strict=True):
        group = part[index]
        # A view of a stack would keep all of it in memory.
        group.errors = {"weights": stack.weights_GN[index, :size].clone(), "base": base_K}
        assert group.fold_errors_K is not None
        group.errors |= {"adapter": group.fold_errors_K, "guess": guess_GN[index, :size]}


def measure_errors(task: FitTask, group: Group) -> None:
    """Compute the errors of the adapter, the base layer, the guess and the live version on the same rows.

    The rows are the held-out ones or, if the adapter is cross-validated, all training rows in their outer folds.
    """
    sides, adapter = group.sides, group.adapter
    assert adapter is not None
    table = sides.held
    if table is not None:
        weights_K = torch.ones(table.rows) if table.weights_N is None else table.weights_N
        group.errors = {"weights": weights_K.double(), "base": task.base_errors(table)}
        group.errors["adapter"] = task.live_errors(adapter, table)
        group.errors["guess"] = task.guess_errors(task.data, sides.training_K, table)
    live = task.live.get(group.position)
    if group.errors and live is not None and live.adapter is not None:
        table = table or task.data.take(sides.training_K)
        group.errors["live"] = task.live_errors(live.adapter, table)
        group.errors = replace_trained_errors(group.errors, live, table, None, task.labels)


def metrics_of_stack(task: FitTask, part: Sequence[Group]) -> dict[int, dict[str, Any]]:
    """Return the metrics of the adapters of a stack, by position, as far as they are measured together."""
    together = {
        group.position: (adapter, group.sides.training_K)
        for group in part
        if (adapter := group.adapter) is not None
        and group.descent is None
        and group.error is None
        and group.sides.read_held is None
    }
    if not together:
        return {}
    adapters, rows = zip(*together.values(), strict=True)
    return dict(zip(together, stack_metrics(task, adapters, rows), strict=True))
