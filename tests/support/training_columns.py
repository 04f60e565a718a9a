"""The rows of `training_world` as columns of a data set."""

from typing import Any

import httpx
import pyarrow as pa

from tests.support.data_set_files import arrow_stream
from tests.support.training_oracle import CLASSES, INPUTS, NUMBERS, OUTPUTS, RANK, ROWS, X, Y

HALF = {"by": "rows", "fraction": 0.5}
GROUPS = [row // 4 for row in range(ROWS)]
TIMES = [(7 * row) % ROWS for row in range(ROWS)]
HELD = [row % 3 == 0 for row in range(ROWS)]
COLUMNS: dict[str, Any] = {
    "x": pa.array(X.tolist(), pa.list_(pa.float32(), INPUTS)),
    "y": pa.array(Y.tolist(), pa.list_(pa.float32(), OUTPUTS)),
    "tenant": pa.array([f"t{group}" for group in GROUPS]),
    "time": pa.array(TIMES),
    "when": pa.array([float(time) / 7 for time in TIMES]),
    "held": pa.array(HELD),
    "side": pa.array(["validation" if held else "train" for held in HELD]),
    "kind": pa.array([("ant", "bee", "cow")[number] for number in CLASSES.tolist()]),
    "some": pa.array([[name for name, has in (("ant", 1), ("bee", row % 2)) if has] for row in range(ROWS)]),
}
DATA: dict[str, Any] = {"dataset": "columns@1", "inputs": {"column": "x"}, "targets": {"column": "y"}}
"""A request's words for them."""
UNEVALUATED = "no rows are held out, so nothing is evaluated: live moves to the new version, however good it is"
"""The warning of a job that publishes without an evaluation, although it was not asked to."""


def put(client: httpx.Client, name: str, columns: Any) -> None:
    """Upload them as a data set."""
    kind = {"Content-Type": "application/vnd.apache.arrow.stream"}
    client.put(f"/datasets/{name}", content=arrow_stream(pa.table(columns)), headers=kind).raise_for_status()


def plan_of(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """What a dry run answers to this request, made whole, by adamw if it names no method."""
    body["training"] = {"method": "adamw"} | body.get("training", {})
    answer = client.post("/adapters?dry_run=true", json={"name": "plan", "rank": RANK, "data": NUMBERS} | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def spec_of(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """What a job would show of it."""
    spec: dict[str, Any] = plan_of(client, **body)["spec"]
    return spec
