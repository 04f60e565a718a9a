"""`POST /adapters` with data sets and columns that are not there, or are not what they are taken for."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import NewFolder
from tests.integration.hostile.bodies import NOT_NUMBERS, ROW
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.data_set_cases import HALVES, ROWS, X, of_columns, stored_data_sets
from tests.integration.hostile.test_references import INVALID_NAMES, INVALID_REFERENCES
from tests.integration.hostile.training_cases import BINARY, CROSS


@pytest.fixture(scope="module")
def stored(new_folder: NewFolder) -> Iterator[Target]:
    with stored_data_sets(new_folder("stored")) as target:
        yield target


def _selected(part: str) -> list[Case]:
    """What is wrong for inputs and targets alike."""
    bad: list[tuple[str, str, str, tuple[str, ...], Any]] = [
        ("nothing", "missing_field", "", (), {}),
        ("null", "wrong_type", "", ("null",), None),
        ("a name", "wrong_type", "", ("x",), "x"),
        ("a list", "wrong_type", "", (), ["x"]),
        ("rows", "wrong_type", "", (), [ROW]),
        ("a column and a prefix", "invalid_combination", "", ("column and prefix",), {"column": "x", "prefix": "p_"}),
        ("an unknown choice", "unknown_field", ".regex", ("regex",), {"regex": "p_.*"}),
        ("a column of no name", "wrong_type", ".column", ("null",), {"column": None}),
        ("a column that is not there", "invalid_input", "", ("nowhere",), {"column": "nowhere"}),
        ("no columns", "out_of_range", ".columns", (), {"columns": []}),
        ("a column twice", "out_of_range", ".columns", ("p_a",), {"columns": ["p_a", "p_a"]}),
        ("columns of numbers", "wrong_type", ".columns", (), {"columns": [1]}),
        ("an empty prefix", "out_of_range", ".prefix", (), {"prefix": ""}),
        ("a prefix that nothing has", "invalid_input", "", ("zz",), {"prefix": "zz"}),
        ("text", "wrong_type", "", ("string",), {"column": "name"}),
        ("too little", "wrong_shape", "", ("1 numbers",), {"column": "narrow"}),
        ("lists as columns", "wrong_type", "", ("list",), {"columns": ["x", "y"]}),
    ]
    return [
        of_columns(f"take {title} for {part}", code, *says, field=f"data.{part}{inner}", **{part: value})
        for title, code, inner, says, value in bad
    ]


REFERENCES = [
    *(
        of_columns(f"read {name}", code, text[:90], field="data.dataset", dataset=text)
        for table, code in ((INVALID_NAMES, "invalid_name"), (INVALID_REFERENCES, "invalid_reference"))
        for name, text in table.items()
    ),
    *(
        of_columns(f"read the data set {title}", "wrong_type", field="data.dataset", dataset=value)
        for title, value in (NOT_NUMBERS | {"null": None, "7": 7}).items()
        if type(value) is not str
    ),
    of_columns(
        "read a data set that is not there", "dataset_not_found", "nowhere", field="data.dataset", dataset="nowhere"
    ),
    of_columns("read a version that is not there", "version_not_found", "9", field="data.dataset", dataset="rows@9"),
    of_columns("read an adapter as a data set", "dataset_not_found", "acme", field="data.dataset", dataset="acme"),
    of_columns("read rows beside a data set", "wrong_type", field="data.inputs", inputs=X),
    of_columns("take inline weights beside a data set", "unknown_field", field="data.weights", weights=[1] * ROWS),
    of_columns("take inline groups beside a data set", "unknown_field", field="data.groups", groups=HALVES),
]

ROW_BY_ROW = [
    of_columns(
        "train on rows with holes", "bad_rows", "null", field="data.targets", row=1, targets={"column": "holes"}
    ),
    *(
        of_columns(f"weigh rows by {title}", code, *says, field="data.weight", row=row, weight=column)
        for title, code, says, row, column in (
            ("null", "wrong_type", ["null"], None, None),
            ("a number", "wrong_type", ["1"], None, 1),
            ("a column that is not there", "invalid_input", ["nowhere"], None, "nowhere"),
            ("text", "wrong_type", ["string"], None, "name"),
            ("lists", "wrong_shape", ["10 numbers"], None, "x"),
            ("less than 0", "bad_rows", ["2 weights"], 2, "minus"),
            ("nothing but 0", "out_of_range", ["every weight is 0"], None, "zero"),
            ("nothing in one row", "bad_rows", ["null"], 1, "gap"),
        )
    ),
    *(
        of_columns(f"{title} by {column}", code, field=f"data.{name}", row=row, **{name: column})
        for title, name in (("keep rows together", "group"), ("train an adapter", "group_by"))
        for column, code, row in (
            ("nowhere", "invalid_input", None),
            ("x", "wrong_type", None),
            ("gap", "bad_rows", 1),
            ("half", "bad_rows", 1),
            (None, "wrong_type", None),
            (7, "wrong_type", None),
        )
    ),
]

CLASSES = [
    *(
        of_columns(
            f"take {title} for classes", code, *says, field="data.targets", row=row, training=CROSS, targets=targets
        )
        for title, code, says, row, targets in (
            ("a prefix", "wrong_type", ["one column"], None, {"prefix": "p_"}),
            ("columns", "wrong_type", ["one column"], None, {"columns": ["class"]}),
            ("lists", "wrong_type", ["list"], None, {"column": "y"}),
            ("halves", "bad_rows", [], 1, {"column": "half"}),
            ("nulls", "bad_rows", ["null"], 1, {"column": "gap"}),
            ("numbers past the outputs", "out_of_range", ["2"], 5, {"column": "far"}),
        )
    ),
    of_columns(
        "name too many classes",
        "out_of_range",
        "3 different labels",
        field="data.targets",
        training=CROSS,
        targets={"column": "animal"},
    ),
    of_columns(
        "name one class",
        "out_of_range",
        "1 different labels",
        field="data.targets",
        training=CROSS,
        targets={"column": "slash"},
    ),
    of_columns(
        "train on a class that has no label",
        "bad_rows",
        "cow",
        field="data.targets",
        row=5,
        training=CROSS,
        targets={"column": "animal"},
        labels=["cat", "dog"],
    ),
    of_columns("name classes of numbers", "invalid_combination", "mse", field="data.labels", labels=["cat", "dog"]),
    of_columns(
        "train on a label that is not among them",
        "bad_rows",
        "cow",
        field="data.targets",
        row=4,
        training=BINARY,
        targets={"column": "tags"},
        labels=["cat", "dog"],
    ),
    of_columns(
        "find too many labels",
        "out_of_range",
        "3 different labels",
        field="data.targets",
        training=BINARY,
        targets={"column": "tags"},
    ),
    of_columns(
        "train on too many shares",
        "wrong_shape",
        "3 numbers",
        field="data.targets",
        training=BINARY,
        targets={"column": "wide"},
    ),
    of_columns(
        "train on shares below 0",
        "out_of_range",
        "-1.0",
        field="data.targets",
        row=2,
        training=BINARY,
        targets={"column": "minus"},
    ),
    of_columns(
        "name two shares by one label",
        "out_of_range",
        "1 entries",
        field="data.labels",
        training=BINARY,
        targets={"prefix": "p_"},
        labels=["cat"],
    ),
    of_columns(
        "name one share by two labels",
        "wrong_shape",
        "2 labels",
        field="data.targets",
        training=BINARY,
        targets={"columns": ["p_a"]},
        labels=["cat", "dog"],
    ),
]


@pytest.mark.parametrize(
    "case", _selected("inputs") + _selected("targets") + REFERENCES + ROW_BY_ROW + CLASSES, ids=lambda case: case.name
)
def test_training_refuses_to(stored: Target, case: Case) -> None:
    stored.refuses(case)
