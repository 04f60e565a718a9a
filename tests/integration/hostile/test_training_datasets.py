"""`POST /adapters` on data sets: splits by their columns, held-out data sets, documents, and fleets."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import NewFolder
from tests.integration.hostile.bodies import OUT
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.data_set_cases import DATA, of_columns, stored_data_sets
from tests.integration.hostile.training_cases import BINARY, CROSS, NEGATIVES, case


@pytest.fixture(scope="module")
def stored(new_folder: NewFolder) -> Iterator[Target]:
    with stored_data_sets(new_folder("stored")) as target:
        yield target


SPLITS = [
    *(
        of_columns(
            f"hold out by {column}",
            code,
            *says,
            field="split.column",
            row=row,
            split={"by": "column", "column": column},
        )
        for column, code, says, row in (
            ("nowhere", "invalid_input", ("nowhere",), None),
            ("animal", "wrong_type", ("cat",), None),
            ("far", "wrong_type", ("2",), None),
            ("minus", "wrong_type", ("-2",), None),
            ("ones", "out_of_range", ("every row", "1"), None),
            ("x", "wrong_type", ("list",), None),
            ("half", "bad_rows", (), 1),
            ("gap", "bad_rows", ("null",), 1),
        )
    ),
    *(
        of_columns(
            f"order rows by {column}",
            code,
            *says,
            field="split.column",
            row=row,
            split={"by": "time", "column": column},
        )
        for column, code, says, row in (
            ("nowhere", "invalid_input", ("nowhere",), None),
            ("x", "wrong_type", ("list",), None),
            ("gap", "bad_rows", ("null",), 1),
        )
    ),
    of_columns(
        "leave no latest row",
        "out_of_range",
        "0 to validate",
        field="split",
        split={"by": "time", "column": "number", "fraction": 0.01},
    ),
    of_columns(
        "keep one group on both sides",
        "out_of_range",
        "0 to validate",
        field="split",
        split={"by": "group"},
        group="ones",
    ),
    of_columns("split by a group that it does not know", "missing_field", field="data.group", split={"by": "group"}),
    *(
        of_columns(f"hold out the data set {title}", code, *says, field="split.dataset", split={"dataset": value})
        for title, code, says, value in (
            ("7", "wrong_type", ("7",), 7),
            ("of a bad name", "invalid_name", ("../x",), "../x"),
            ("that is not there", "dataset_not_found", ("nowhere",), "nowhere"),
            ("of a later version", "version_not_found", ("9",), "other@9"),
        )
    ),
    of_columns(
        "hold out a data set without the columns",
        "invalid_input",
        "number",
        field="split.weight",
        split={"dataset": "other"},
        weight="number",
    ),
    of_columns(
        "hold out a class that has no label",
        "bad_rows",
        "'z'",
        field="split.targets",
        row=1,
        training=CROSS,
        split={"dataset": "other"},
        targets={"column": "name"},
    ),
    of_columns(
        "hold out fewer shares than it trains on",
        "wrong_shape",
        "1 targets",
        field="split.dataset",
        training=BINARY,
        split={"dataset": "other"},
        targets={"prefix": "p_"},
    ),
]

BAD_DOCUMENTS: list[tuple[str, str, str, str, Any]] = [
    ("null", "wrong_type", "null", "", None),
    ("rows of the request", "wrong_type", "", "", [[1.0] * OUT]),
    ("nothing", "missing_field", "", ".dataset", {}),
    ("no column", "missing_field", "", ".documents", {"dataset": "rows"}),
    (
        "an unknown field",
        "unknown_field",
        "",
        ".inputs",
        {"dataset": "rows", "documents": {"column": "y"}, "inputs": 1},
    ),
    ("nowhere", "dataset_not_found", "nowhere", ".dataset", {"dataset": "nowhere", "documents": {"column": "y"}}),
    ("narrow", "wrong_shape", "1 numbers", ".documents", {"dataset": "rows", "documents": {"column": "narrow"}}),
    ("names", "wrong_type", "string", ".documents", {"dataset": "rows", "documents": {"column": "name"}}),
]
DOCUMENTS = [
    *(
        of_columns(f"search {title}", code, says, field=f"data.corpus{inner}", training=NEGATIVES, corpus=corpus)
        for title, code, says, inner, corpus in BAD_DOCUMENTS
    ),
    of_columns(
        "search holes",
        "bad_rows",
        "null",
        field="data.corpus.documents",
        row=1,
        training=NEGATIVES,
        corpus={"dataset": "rows", "documents": {"column": "holes"}},
    ),
]

BAD_FLEETS: list[tuple[str, str, tuple[str, ...], str, dict[str, Any]]] = [
    ("acme-{name}", "missing_field", ("acme-{name}",), "data.group_by", {}),
    ("acme-{group}", "invalid_name", ("acme-{group}",), "name", {"group_by": "name"}),
    ("acme/{slash}", "invalid_name", ("a/b",), "name", {"group_by": "slash"}),
    ("acme-{far}", "out_of_range", ("3 groups", "2"), "data", {"group_by": "far"}),
]
FLEETS = [
    of_columns("train a fleet under one name", "invalid_combination", "{name}", field="name", group_by="name"),
    *(
        case(f"train {name} of {list(by.values())}", code, *says, field=field, name=name, data=DATA | by)
        for name, code, says, field, by in BAD_FLEETS
    ),
    case(
        "hold out a data set of a fleet",
        "invalid_combination",
        field="split.dataset",
        name="acme-{name}",
        data=DATA | {"group_by": "name"},
        split={"dataset": "other"},
    ),
]


@pytest.mark.parametrize("case", SPLITS + DOCUMENTS + FLEETS, ids=lambda case: case.name)
def test_training_refuses_to(stored: Target, case: Case) -> None:
    stored.refuses(case)


@pytest.mark.parametrize(
    "split",
    [None, {"dataset": "other"}, {"by": "column", "column": "class"}, {"by": "time", "column": "half"}],
    ids=str,
)
def test_the_good_columns_are_good(stored: Target, split: Any) -> None:
    body: dict[str, Any] = {"name": "fresh", "rank": 2, "data": DATA} | ({} if split is None else {"split": split})
    answer = stored.client.post("/adapters?dry_run=true", json=body)
    assert answer.status_code == 200, answer.text
