"""Loss of a request that leaves it open: of classes, of lists of labels, or of numbers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest

from adapters.arrays import NumberTable, TruncatedList
from adapters.datasets.columns import parse_selector
from adapters.datasets.table import Table
from adapters.training.planning.targets import infer_loss, infer_loss_of_columns
from adapters.training.settings import Loss


@pytest.mark.parametrize(
    ("targets", "outputs", "has_labels", "loss"),
    [
        (["ant", "bee"], 3, False, Loss.CROSS_ENTROPY),
        (["ant", None], 3, False, Loss.CROSS_ENTROPY),
        # One whole number per row cannot be the numbers of three outputs, but can be that of one.
        ([0, 2], 3, False, Loss.CROSS_ENTROPY),
        ([0, 2], 1, False, Loss.MSE),
        ([0, 2], 3, True, Loss.CROSS_ENTROPY),
        ([0.5, 2], 3, False, Loss.MSE),
        ([True, False], 3, False, Loss.MSE),
        ([[0, 1, 0]], 3, False, Loss.MSE),
        ([[0, 1, 0]], 3, True, Loss.BINARY_CROSS_ENTROPY),
        ([["ant"], []], 3, False, Loss.BINARY_CROSS_ENTROPY),
        ([[], ["ant"]], 3, False, Loss.BINARY_CROSS_ENTROPY),
        ([[], []], 3, False, Loss.MSE),
        (TruncatedList([[0.0, 1.0]], 9, NumberTable()), 2, False, Loss.MSE),
        ([], 3, False, Loss.MSE),
        ("ant", 3, False, Loss.MSE),
    ],
    ids=repr,
)
def test_the_targets_of_a_request_decide_the_loss(targets: Any, outputs: int, has_labels: bool, loss: Loss) -> None:
    assert infer_loss(targets, has_labels=has_labels, outputs=outputs) is loss


COLUMNS = {
    "text": (["a", "b"], Loss.CROSS_ENTROPY, Loss.CROSS_ENTROPY),
    "whole": ([3, 1], Loss.CROSS_ENTROPY, Loss.MSE),
    "flag": ([True, False], Loss.CROSS_ENTROPY, Loss.MSE),
    "real": ([0.5, 1.0], Loss.MSE, Loss.MSE),
    "names": ([["a"], []], Loss.BINARY_CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY),
    "numbers": ([[1, 0], [0, 1]], Loss.MSE, Loss.MSE),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_type_of_a_column_decides_the_loss(name: str, tmp_path: Path) -> None:
    values, of_several_outputs, of_one_output = COLUMNS[name]
    table = pa.table({name: values})
    with ipc.new_file(str(tmp_path / "table"), table.schema) as writer:
        writer.write_table(table)
    stored = Table.open(tmp_path / "table")

    def loss(selector: dict[str, Any], *, outputs: int, has_labels: bool = False) -> Loss:
        selection = parse_selector(selector, field="t")
        return infer_loss_of_columns(stored, selection, has_labels=has_labels, outputs=outputs, field="t")

    assert loss({"column": name}, outputs=3) is of_several_outputs
    assert loss({"column": name}, outputs=1) is of_one_output
    assert loss({"prefix": name[0]}, outputs=3) is Loss.MSE
    lists = name in ("names", "numbers")
    assert loss({"column": name}, outputs=3, has_labels=True) is (
        Loss.BINARY_CROSS_ENTROPY if lists else Loss.CROSS_ENTROPY
    )
