"""Data sets to train on, and a service that has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.integration.hostile.bodies import IN, LEFT_OUT, ROW
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import settings_for
from tests.integration.hostile.training_cases import case
from tests.support.data_set_files import arrow_stream
from tests.support.service import serving

ROWS = 6
CROSSWISE, HALVES = [0, 1] * (ROWS // 2), ["a", "b"] * (ROWS // 2)
X = [ROW] * ROWS
COLUMNS: dict[str, Any] = {
    "x": pa.array(X, pa.list_(pa.float32())),
    "y": pa.array([[1.0, 0.5]] * ROWS, pa.list_(pa.float32())),
    "narrow": pa.array([[1.0]] * ROWS, pa.list_(pa.float32())),
    "wide": pa.array([[0.0, 1.0, 0.0]] * ROWS, pa.list_(pa.float32())),
    "holes": pa.array([[1.0, 0.5], None, [1.0, 0.5], [1.0, 0.5], [1.0], [1.0, 0.5]], pa.list_(pa.float32())),
    "number": pa.array([0.5] * ROWS, pa.float64()),
    "class": pa.array(CROSSWISE),
    "name": pa.array(HALVES),
    "animal": pa.array(["cat", "dog", "cat", "dog", "cat", "cow"]),
    "tags": pa.array([["cat"], ["dog"], [], ["cat", "dog"], ["cow"], []], pa.list_(pa.string())),
    "far": pa.array([*CROSSWISE[1:], 2]),
    "minus": pa.array([1.0, 1.0, -1.0, 1.0, 1.0, -2.0]),
    "zero": pa.array([0.0] * ROWS),
    "gap": pa.array([1, None, 1, 0, 1, 0]),
    "half": pa.array([0.0, 0.5, 1.0, 0.0, 1.0, 0.0]),
    "ones": pa.array([1] * ROWS),
    "p_a": pa.array([0.0, 1.0] * (ROWS // 2)),
    "p_b": pa.array([1.0, 0.0] * (ROWS // 2)),
    "slash": pa.array(["a/b"] * ROWS),
}
OTHER: dict[str, Any] = {
    "x": COLUMNS["x"],
    "y": COLUMNS["y"],
    "p_a": COLUMNS["p_a"],
    "name": pa.array(["a", "z"] * (ROWS // 2)),
}
DATA: dict[str, Any] = {"dataset": "rows", "inputs": {"column": "x"}, "targets": {"column": "y"}}


@contextmanager
def stored_data_sets(folder: Path) -> Iterator[Target]:
    """One worker with an adapter, and COLUMNS and OTHER as data sets: no case may change it."""
    kind = {"Content-Type": "application/vnd.apache.arrow.stream"}
    with serving(settings_for(folder, max_groups=2)) as (client, service):
        client.put("/adapters/acme", json={"A": [[1.0], [0.5]], "B": [[1.0] * IN]}).raise_for_status()
        for name, table in (("rows", COLUMNS), ("other", OTHER)):
            client.put(f"/datasets/{name}", content=arrow_stream(pa.table(table)), headers=kind).raise_for_status()
        target = Target(client, service, ["acme"])
        yield target
        target.is_untouched()


def of_columns(
    title: str,
    code: str,
    /,
    *says: str,
    field: str,
    row: int | None = None,
    training: Any = LEFT_OUT,
    split: Any = LEFT_OUT,
    **data: Any,
) -> Case:
    """Good columns, but for these."""
    return case(title, code, *says, field=field, row=row, training=training, split=split, data=DATA | data)
