"""What a job says of the rows that it holds out, of its columns and of its labels."""

# N rows
import json
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.integration.training.conftest import Running
from tests.support import training_oracle as world
from tests.support.service import train
from tests.support.training_columns import COLUMNS, DATA, GROUPS, HALF, TIMES, put, spec_of
from tests.support.training_oracle import CLASSES, INPUTS, LABELS, NUMBERS, OUTPUTS, RANK, ROWS, X, Y


@pytest.fixture(scope="module")
def data(running: Running) -> dict[str, Any]:
    """The rows as columns of a data set, the first of them as another's, and a request's words for the first."""
    put(running[0], "columns", COLUMNS)
    put(running[0], "apart", pa.table(COLUMNS)[:6])
    return DATA


def test_a_fraction_and_a_split_by_rows_hold_out_the_same(trained: httpx.Client) -> None:
    one = spec_of(trained, training={"validation_fraction": 0.3, "seed": 4})["split"]
    other = spec_of(trained, split={"by": "rows", "fraction": 0.3}, training={"seed": 4})["split"]
    assert one == other
    sides = {"train": {"rows": 17}, "held_out": {"rows": 7}}
    assert one == {"by": "rows", "fraction": 0.3, "stratify": False} | sides


def test_stratified_sides_have_the_fraction_of_each_class(trained: httpx.Client) -> None:
    split = {"by": "rows", "fraction": 0.5, "stratify": True}
    shown = spec_of(trained, data=LABELS, split=split, training={"loss": "cross_entropy"})["split"]
    counts = torch.bincount(CLASSES).tolist()
    wanted = {str(number): int(np.floor(count / 2 + 0.5)) for number, count in enumerate(counts)}
    assert shown["held_out"] == {"rows": sum(wanted.values()), "classes": wanted}
    assert shown["train"]["classes"] == {str(n): count - wanted[str(n)] for n, count in enumerate(counts)}


def test_groups_are_counted_on_their_side(trained: httpx.Client) -> None:
    split = {"by": "group", "fraction": 0.3}
    shown = spec_of(trained, data=NUMBERS | {"groups": GROUPS}, split=split)["split"]
    # Groups of 4: two of them are nearer to 7.2 of 24 rows than one or three.
    assert shown == split | {"train": {"rows": 16, "groups": 4}, "held_out": {"rows": 8, "groups": 2}}


@pytest.mark.parametrize(("wanted", "warned"), [(8, False), (7, True)])
def test_a_side_that_is_more_than_half_off_for_large_groups_is_warned_of(
    trained: httpx.Client, wanted: int, warned: bool
) -> None:
    data = NUMBERS | {"groups": [row % 2 for row in range(ROWS)]}
    spec = spec_of(trained, data=data, split={"by": "group", "fraction": wanted / ROWS})
    assert spec["split"]["held_out"]["rows"] == 12
    detail = f"12 rows are held out instead of {wanted}, because whole groups are held out and they are large"
    assert spec.get("warnings", []) == [detail] * warned


def test_rows_that_are_on_both_sides_are_warned_of(trained: httpx.Client) -> None:
    twice = X.clone()
    twice[1::2] = twice[::2]
    data = {"inputs": twice.tolist(), "targets": Y.tolist(), "groups": [row % 2 for row in range(ROWS)]}
    shown = spec_of(trained, data=data, split={"by": "group", "fraction": 0.5})
    assert shown["warnings"] == [f"{ROWS // 2} held-out rows have the inputs of a row that is trained on"]
    assert "warnings" not in spec_of(
        trained, data=data | {"inputs": X.tolist()}, split={"by": "group", "fraction": 0.5}
    )


@pytest.mark.parametrize("column", ["held", "side"])
def test_a_column_says_which_rows_are_held_out(trained: httpx.Client, data: dict[str, Any], column: str) -> None:
    shown = spec_of(trained, data=data, split={"by": "column", "column": column})["split"]
    assert shown == {"by": "column", "column": column, "train": {"rows": 16}, "held_out": {"rows": 8}}


@pytest.mark.parametrize("column", ["time", "when"])
def test_the_latest_rows_are_held_out(trained: httpx.Client, data: dict[str, Any], column: str) -> None:
    latest = np.argsort(TIMES)[-6:]
    groups = {f"t{GROUPS[row]}" for row in latest}
    split = {"by": "time", "column": column, "fraction": 0.25}
    shown = spec_of(trained, data=data | {"group": "tenant"}, split=split)["split"]
    assert {name: shown[name] for name in split} == split
    assert shown["held_out"] == {"rows": 6, "groups": len(groups)}


def test_a_data_set_that_is_held_out_is_named_with_its_version(trained: httpx.Client, data: dict[str, Any]) -> None:
    shown = spec_of(trained, data=data, split={"dataset": "apart"})
    digest = trained.get("/datasets/apart/versions/1").json()["digest"]
    assert shown["split"] == {
        "dataset": "apart@1",
        "dataset_digest": digest,
        "train": {"rows": ROWS},
        "held_out": {"rows": 6},
    }
    assert shown["warnings"] == ["6 held-out rows have the inputs of a row that is trained on"]
    job = train(trained, name="apart", rank=RANK, data=data, split={"dataset": "apart"}, training={"epochs": 1})
    assert job["metrics"]["held_out"]["rows"] == 6
    version = trained.get("/adapters/apart/versions/1").json()
    assert version["lineage"]["split"] == {"dataset": "apart@1", "dataset_digest": digest}


def test_columns_are_shown_as_they_were_chosen(trained: httpx.Client, data: dict[str, Any]) -> None:
    shown = spec_of(trained, data=data | {"group": "tenant"}, split={"by": "group"})["data"]
    digest = trained.get("/datasets/columns/versions/1").json()["digest"]
    assert shown == data | {
        "group": "tenant",
        "dataset_digest": digest,
        "rows": ROWS,
        "digest": spec_of(trained)["data"]["digest"],
    }


@pytest.mark.parametrize("inline", [True, False])
def test_labels_are_found_sorted_or_as_given(trained: httpx.Client, data: dict[str, Any], inline: bool) -> None:
    kinds = COLUMNS["kind"].to_pylist()
    rows = {"inputs": X.tolist(), "targets": kinds} if inline else data | {"targets": {"column": "kind"}}
    training = {"loss": "cross_entropy"}
    found = spec_of(trained, data=rows, training=training, split=HALF)
    assert found["labels"] == ["ant", "bee", "cow"]
    assert found["split"]["train"]["classes"].keys() <= {"ant", "bee", "cow"}
    given = ["cow", "ant", "bee"]
    assert spec_of(trained, data=rows | {"labels": given}, training=training)["labels"] == given


@pytest.mark.parametrize("inline", [True, False])
def test_labels_that_a_row_lists_are_found_sorted(trained: httpx.Client, data: dict[str, Any], inline: bool) -> None:
    several = COLUMNS["some"].to_pylist()
    rows = {"inputs": X.tolist(), "targets": several} if inline else data | {"targets": {"column": "some"}}
    assert spec_of(trained, data=rows, training={"loss": "binary_cross_entropy"})["labels"] == ["ant", "bee"]


@pytest.mark.parametrize("inline", [True, False])
def test_labels_name_the_shares_of_a_row_in_their_order(
    trained: httpx.Client, data: dict[str, Any], inline: bool
) -> None:
    shares = [[int("bee" in names), int("ant" in names)] for names in COLUMNS["some"].to_pylist()]
    listed = {"inputs": X.tolist(), "targets": COLUMNS["some"].to_pylist(), "labels": ["bee", "ant"]}
    rows = listed | {"targets": shares}
    if not inline:
        table = pa.table({"x": COLUMNS["x"], "p_0": [bee for bee, _ in shares], "p_1": [ant for _, ant in shares]})
        put(trained, "shares", table)
        rows = data | {"dataset": "shares", "targets": {"prefix": "p_"}, "labels": ["bee", "ant"]}
    body = {"rank": RANK, "training": {"loss": "binary_cross_entropy", "epochs": 2}}
    one, other = (train(trained, name="shares", data=each, **body)["result"] for each in (rows, listed))
    assert one["digest"] == other["digest"]
    assert trained.get("/adapters/shares/versions/1").json()["labels"] == ["bee", "ant"]


def test_floats_that_are_seconds_since_1970_are_ordered_to_the_tenth(trained: httpx.Client) -> None:
    rows = 40
    late_first = 1.7e9 + 0.1 * np.arange(rows)[::-1]
    lines = [
        json.dumps(
            {"x": [1.5 * row, *[0.5] * (INPUTS - 1)], "y": [float(row < 8)] * OUTPUTS, "t": late_first[row] + 0.05}
        )
        for row in range(rows)
    ]
    headers = {"Content-Type": "application/x-ndjson"}
    assert trained.put("/datasets/late-first", content="\n".join(lines), headers=headers).status_code == 201
    data = {"dataset": "late-first", "inputs": {"column": "x"}, "targets": {"column": "y"}}
    split = {"by": "time", "column": "t", "fraction": 0.2}
    settings = {"method": "closed_form", "ridge": 1}
    job = train(trained, name="late-first", rank=RANK, data=data, split=split, training=settings)
    base = world.outputs(x_NI=torch.tensor([[1.5 * row, *[0.5] * (INPUTS - 1)] for row in range(8)]))
    assert job["metrics"]["base_validation_loss"] == pytest.approx(float((base - 1).square().mean()), rel=1e-6)


def test_whole_numbers_in_lists_are_labels(trained: httpx.Client) -> None:
    lines = [json.dumps({"x": [1.5] * INPUTS, "y": [10] if row % 2 else [10, 20]}) for row in range(6)]
    headers = {"Content-Type": "application/x-ndjson"}
    assert trained.put("/datasets/tagged", content="\n".join(lines), headers=headers).status_code == 201
    data = {"dataset": "tagged", "inputs": {"column": "x"}, "targets": {"column": "y"}}
    training = {"loss": "binary_cross_entropy", "epochs": 1}
    assert spec_of(trained, data=data, training=training)["labels"] == [10, 20]
    assert spec_of(trained, data=data | {"labels": [20, 30, 10]}, training=training)["labels"] == [20, 30, 10]
