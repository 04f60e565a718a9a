"""`POST /adapters` with labels that name no classes, and classes that have no label."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import NOT_FINITE
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.training_cases import BINARY, CROSS, NEGATIVES, rows

LABELS = ["cat", "dog"]
TWO = [["cat"], ["dog"], []]
NUMERIC: dict[str, dict[str, Any]] = {
    "mse": {"loss": "mse"},
    "huber": {"loss": "huber"},
    "cosine": {"loss": "cosine"},
    "multiple_negatives": NEGATIVES,
}
NOT_LABELS: dict[str, Any] = {"null": None, "a string": "cat", "a number": 2, "an object": {"0": "cat"}}


def _classes(
    title: str, code: str, /, *says: str, field: str = "data.targets", row: int | None = None, **data: Any
) -> Case:
    return rows(title, code, *says, field=field, row=row, training=CROSS, **data)


def _shares(
    title: str, code: str, /, *says: str, field: str = "data.targets", row: int | None = None, **data: Any
) -> Case:
    return rows(title, code, *says, field=field, row=row, training=BINARY, **data)


LABEL_LISTS = [
    *(
        _classes(f"take {title} for labels", "wrong_type", field="data.labels", targets=[0, 1, 0], labels=value)
        for title, value in NOT_LABELS.items()
    ),
    _classes("name no class", "out_of_range", "0 entries", field="data.labels", targets=[0, 1, 0], labels=[]),
    _classes(
        "name one class", "out_of_range", "1 entries", field="data.labels", targets=LABELS[:1] * 3, labels=["cat"]
    ),
    _classes(
        "name more classes than there are outputs",
        "out_of_range",
        "3 entries",
        field="data.labels",
        targets=["cat"] * 3,
        labels=[*LABELS, "horse"],
    ),
    _classes(
        "find more classes than there are outputs",
        "out_of_range",
        "3 different labels",
        field="data.targets",
        targets=list("abc"),
    ),
    _classes("find one class", "out_of_range", "1 different labels", field="data.targets", targets=["cat"] * 3),
    _classes(
        "name a class twice",
        "invalid_combination",
        "cat",
        field="data.labels",
        targets=LABELS[:1] * 3,
        labels=["cat"] * 2,
    ),
    _classes(
        "name classes by a string and a number",
        "invalid_combination",
        "1",
        field="data.labels",
        targets=LABELS[:1] * 3,
        labels=["cat", 1],
    ),
    _classes("name a class nothing", "out_of_range", field="data.labels", targets=LABELS[:1] * 3, labels=["cat", ""]),
    _classes(
        "find a class with half a character", "wrong_type", field="data.targets", targets=["cat", "cat", "\ud800"]
    ),
    *(
        rows(f"name classes of {loss}", "invalid_combination", loss, field="data.labels", training=also, labels=LABELS)
        for loss, also in NUMERIC.items()
    ),
]

NAMED = [
    _classes(
        "train on a label that is not among them",
        "bad_rows",
        "horse",
        row=1,
        targets=["cat", "horse", "dog"],
        labels=LABELS,
    ),
    _classes("train on an index where classes are named", "bad_rows", "0", row=0, targets=[0, 1, 0], labels=LABELS),
    _classes("train on a name among indices", "wrong_type", "dog", row=1, targets=[0, "dog", 1]),
    _classes(
        "train on a named class that is null", "wrong_type", "null", row=2, targets=[*LABELS, None], labels=LABELS
    ),
    _classes("train on a named class that is a list", "wrong_type", row=0, targets=[["cat"], *LABELS], labels=LABELS),
    _classes("train on a named class that is true", "wrong_type", row=0, targets=[True, 1, 2], labels=[1, 2]),
    _classes(
        "train on a named class that is NaN", "not_finite", row=0, targets=[NOT_FINITE["NaN"], 1, 2], labels=[1, 2]
    ),
    _classes("train on fewer names than rows", "wrong_shape", "2 rows", targets=LABELS, labels=LABELS),
    _classes("train on one name for all rows", "wrong_type", "cat", targets="cat", labels=LABELS),
]

SEVERAL = [
    _shares("train on a share of 2", "out_of_range", "2.0", row=1, targets=[[0, 1], [2, 0], [0, 0]]),
    _shares("train on a share of -0.1", "out_of_range", row=2, targets=[[0, 1], [1, 0], [0, -0.1]]),
    _shares("train on a share that is NaN", "not_finite", row=0, targets=[[0, NOT_FINITE["NaN"]], [1, 0], [0, 0]]),
    _shares("train on a share that is true", "wrong_type", row=0, targets=[[True, 0], [1, 0], [0, 0]]),
    _shares("train on more shares than there are outputs", "wrong_shape", "3 numbers", targets=[[0, 1, 0]] * 3),
    _shares("train on shares of two lengths", "wrong_shape", "1 numbers", row=1, targets=[[0, 1], [1], [0, 0]]),
    _shares("train on no shares at all", "wrong_shape", "0 numbers", row=0, targets=[[], [], []]),
    _shares("train on fewer shares than rows", "wrong_shape", "2 rows", targets=[[0, 1]] * 2),
    _shares("train on one class a row", "wrong_type", row=0, targets=[0, 1, 0]),
    _shares("train on a string of labels", "wrong_type", "cat", row=1, targets=[["cat", "dog"], "cat", []]),
    _shares("train on a name among shares", "wrong_type", "0.5", row=0, targets=[["cat", 0.5], ["dog"], []]),
    _shares(
        "find one label", "out_of_range", "1 different labels", field="data.targets", targets=[["cat"], [], ["cat"]]
    ),
    _shares("find names and numbers", "invalid_combination", field="data.targets", targets=[["cat"], [1], []]),
    _shares(
        "train on labels that are not among them", "bad_rows", "cow", row=0, targets=[["cow"], *TWO[1:]], labels=LABELS
    ),
    _shares(
        "train on fewer shares than labels",
        "wrong_shape",
        "1 numbers",
        "2 labels",
        targets=[[1], [0], [1]],
        labels=LABELS,
    ),
    _shares(
        "train on listed labels that are NaN", "not_finite", row=1, targets=[["cat"], [NOT_FINITE["NaN"]], ["dog"]]
    ),
]


@pytest.mark.parametrize("case", LABEL_LISTS + NAMED + SEVERAL, ids=lambda case: case.name)
def test_training_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)
