"""What training reads of a stored data set."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from adapters.datasets.columns import ColumnSelector, parse_selector
from adapters.datasets.table import Table
from adapters.errors import BadRows, BlobCorrupt, InvalidInput, LoraplexError, OutOfRange, WrongType
from tests.support.data_set_files import lists, table_of

ROWS = 20_000
"""More than two batches."""


def _bad(caught: pytest.ExceptionInfo[BadRows]) -> list[tuple[int, str | None, str]]:
    return [(row.row, row.column, row.reason) for row in caught.value.rows]


def test_columns_of_every_numeric_type_are_float32_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x_N, k_N, b_N = rng.standard_normal(ROWS), rng.integers(-5, 5, ROWS), rng.random(ROWS) < 0.5
    table = table_of(tmp_path, pa.table({"x": x_N, "k": k_N, "b": b_N, "f": x_N.astype(np.float32), "t": ["a"] * ROWS}))
    selection = ColumnSelector(columns=("b", "x", "f", "k"))
    expected = np.stack([b_N, x_N, x_N, k_N], axis=1).astype(np.float32)
    got = table.numbers(selection, field="inputs")
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        table.numbers(selection, field="inputs", begin=8000, end=17_001), expected[8000:17_001]
    )
    assert table.numbers(selection, field="inputs", begin=5, end=5).shape == (0, 4)
    assert table.width(selection, field="inputs") == 4
    assert table.rows == ROWS


@pytest.mark.parametrize("value_type", [pa.float32(), pa.float64(), pa.int64()])
def test_a_column_of_lists_is_float32_rows(tmp_path: Path, value_type: Any) -> None:
    x_NC = np.random.default_rng(0).integers(0, 99, (ROWS, 5))
    column = pa.FixedSizeListArray.from_arrays(pa.array(x_NC.reshape(-1)).cast(value_type), 5)
    table = table_of(tmp_path, pa.table({"e": column, "y": np.arange(ROWS)}))
    assert table.width(ColumnSelector(column="e"), field="inputs") == 5
    np.testing.assert_array_equal(table.numbers(ColumnSelector(column="e"), field="inputs"), x_NC.astype(np.float32))
    np.testing.assert_array_equal(
        table.numbers(ColumnSelector(column="e"), field="inputs", begin=9_999, end=10_001), x_NC[9_999:10_001]
    )
    assert table.numbers(ColumnSelector(column="y"), field="inputs").shape == (ROWS, 1)


def test_a_prefix_takes_its_columns_in_the_order_of_the_file(tmp_path: Path) -> None:
    table = table_of(tmp_path, pa.table({"f10": [1], "g": [2], "f9": [3]}))
    assert table.numbers(ColumnSelector(prefix="f"), field="inputs").tolist() == [[1, 3]]
    assert table.width(ColumnSelector(prefix="f"), field="inputs") == 2


@pytest.mark.parametrize(
    ("selection", "error", "says"),
    [
        (ColumnSelector(column="z"), InvalidInput, "no column of the data set is called 'z'; there are: x, t, e"),
        (ColumnSelector(columns=("x", "z")), InvalidInput, "called 'z'"),
        (ColumnSelector(prefix="q"), InvalidInput, "begins with 'q'"),
        (ColumnSelector(column="t"), WrongType, "'t' is of the type string"),
        (ColumnSelector(columns=("x", "e")), WrongType, r"'e' is of the type list<float64>"),
        (ColumnSelector(prefix="t"), WrongType, "'t' is of the type string"),
    ],
)
def test_columns_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, selection: ColumnSelector, error: type[LoraplexError], says: str
) -> None:
    table = table_of(tmp_path, pa.table({"x": [1], "t": ["a"], "e": [[1.5, 2.5]]}))
    for call in (table.width, table.numbers, table.check_numbers):
        with pytest.raises(error, match=says) as caught:
            call(selection, field="data.inputs")
        assert caught.value.field == "data.inputs"


def test_bad_numbers_are_named_by_their_row_in_the_table(tmp_path: Path) -> None:
    x_N, y_N = np.arange(ROWS, dtype=float), np.arange(ROWS, dtype=float)
    x_N[[9_000, 15_000]] = [np.nan, 1e39]
    y_N[9_000] = -np.inf
    table = table_of(tmp_path, pa.table({"x": x_N, "y": pa.array(y_N, mask=np.arange(ROWS) == 12_000)}))
    both = ColumnSelector(columns=("x", "y"))
    expected = [
        (9_000, "x", "NaN"),
        (9_000, "y", "-Infinity"),
        (12_000, "y", "null"),
        (15_000, "x", "not finite as float32: 1e+39"),
    ]
    for call in (table.numbers, table.check_numbers):
        with pytest.raises(BadRows, match="row 9000, column 'x': NaN") as caught:
            call(both, field="inputs")
        assert _bad(caught) == expected
    with pytest.raises(BadRows) as caught:
        table.numbers(both, field="inputs", begin=9_001, end=15_000)
    assert _bad(caught) == [expected[2]]
    assert table.numbers(both, field="inputs", begin=12_001, end=15_000).shape == (2_999, 2)


def test_of_many_bad_rows_the_first_twenty_are_named(tmp_path: Path) -> None:
    table = table_of(tmp_path, pa.table({"x": np.full(ROWS, np.nan)}))
    with pytest.raises(BadRows) as caught:
        table.check_numbers(ColumnSelector(column="x"), field="inputs")
    assert [row for row, _, _ in _bad(caught)] == list(range(20))


def test_lists_that_are_all_empty_are_bad_rows_of_one_number(tmp_path: Path) -> None:
    table, scores = (
        table_of(tmp_path, pa.table({"scores": lists([[], []], pa.float64())})),
        ColumnSelector(column="scores"),
    )
    assert table.width(scores, field="targets") == 1
    with pytest.raises(BadRows):
        table.check_numbers(scores, field="targets")


def test_lists_of_another_width_are_bad_rows(tmp_path: Path) -> None:
    rows: list[list[float] | None] = [[1.0, 2.0]] * 10_000 + [[3.0], None, [4.0, float("inf")]] + [[5.0, 6.0]] * 10
    table = table_of(tmp_path, pa.table({"e": lists(rows, pa.float64())}))
    assert table.width(ColumnSelector(column="e"), field="inputs") == 2
    with pytest.raises(BadRows) as caught:
        table.numbers(ColumnSelector(column="e"), field="inputs")
    assert _bad(caught) == [
        (10_000, "e", "1 numbers, where most rows have 2"),
        (10_001, "e", "null"),
        (10_002, "e", "element 1 is Infinity"),
    ]
    np.testing.assert_array_equal(
        table.numbers(ColumnSelector(column="e"), field="inputs", begin=10_003), [[5.0, 6.0]] * 10
    )


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "ä", "b", "B"] * 4000, ["B", "a", "b", "ä"]),
        ([10, -1, 9, 10, 2**60] * 4000, [-1, 9, 10, 2**60]),
        ([2.0, 1.0, 2.0] * 6000, [1, 2]),
        ([True, False, True] * 6000, [0, 1]),
    ],
)
def test_codes_are_positions_in_the_sorted_values(tmp_path: Path, values: list[Any], labels: list[Any]) -> None:
    table = table_of(tmp_path, pa.table({"y": values}))
    codes_N, got = table.codes("y", field="targets")
    assert got == labels
    assert [type(label) for label in got] == [type(label) for label in labels]
    assert codes_N.dtype == np.int64
    assert [labels[code] for code in codes_N] == values


@pytest.mark.parametrize(
    ("column", "error", "says"),
    [
        (pa.array(["a", None]), BadRows, "row 1, column 'y': null"),
        (pa.array([1.0, 1.5]), BadRows, "row 1, column 'y': not a whole number: 1.5"),
        (pa.array([1.0, float("nan")]), BadRows, "row 1, column 'y': not a whole number: nan"),
        (pa.array([1.0, 1e300]), BadRows, "row 1"),
        (pa.array([[1], [2]]), WrongType, "'y' is of the type list<int64>"),
    ],
)
def test_what_is_no_class_is_refused(tmp_path: Path, column: Any, error: type[LoraplexError], says: str) -> None:
    table = table_of(tmp_path, pa.table({"y": column}))
    with pytest.raises(error, match=says) as caught:
        table.codes("y", field="targets")
    assert caught.value.field == "targets"


@pytest.mark.parametrize("rows", [[["a", "b"], [], ["c"]], [[1], [], [2, 3]], [[1, 2], [3, 4]]])
def test_lists_of_labels_are_lists(tmp_path: Path, rows: list[list[Any]]) -> None:
    table = table_of(tmp_path, pa.table({"y": rows}))
    assert _lists(table) == rows


@pytest.mark.parametrize(
    ("column", "error", "says"),
    [
        (pa.array([["a"], None]), BadRows, "row 1, column 'y': null"),
        (pa.array([[1.5]]), WrongType, "list<float64>"),
        (pa.array(["a"]), WrongType, "string"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(
    tmp_path: Path, column: Any, error: type[LoraplexError], says: str
) -> None:
    table = table_of(tmp_path, pa.table({"y": column}))
    with pytest.raises(error, match=says):
        table.listed("y", field="targets")


def test_a_preview_is_json_ready_and_reaches_across_batches(tmp_path: Path) -> None:
    table = table_of(
        tmp_path, pa.table({"x": [1.5, float("nan"), None] * 5000, "e": [[1.0, float("inf")], None, [3.0, 4.0]] * 5000})
    )
    assert table.preview(8190, 4) == [
        {"x": 1.5, "e": [1.0, None]},
        {"x": None, "e": None},
        {"x": None, "e": [3.0, 4.0]},
        {"x": 1.5, "e": [1.0, None]},
    ]
    assert len(table.preview(14_999, 10)) == 1
    assert table.preview(15_000, 10) == []
    assert table.preview(2**60, 10) == []


def test_a_preview_of_large_rows_stops_early_but_shows_one(tmp_path: Path) -> None:
    table = table_of(tmp_path, pa.table({"t": ["x" * 2**22, "y" * 15_000_000, "z"]}))
    assert len(table.preview(0, 3)) == 1
    assert len(table.preview(1, 3)) == 1
    assert table.preview(2, 3) == [{"t": "z"}]


def test_a_file_that_is_missing_or_damaged_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(BlobCorrupt):
        Table.open(tmp_path / "missing")
    (tmp_path / "cut").write_bytes(b"ARROW1\0\0")
    with pytest.raises(BlobCorrupt):
        Table.open(tmp_path / "cut")


@pytest.mark.parametrize(
    ("value", "selection"),
    [
        ({"column": "x"}, ColumnSelector(column="x")),
        ({"columns": ["x", "y"]}, ColumnSelector(columns=("x", "y"))),
        ({"prefix": "f_"}, ColumnSelector(prefix="f_")),
    ],
)
def test_a_selection_says_one_column_some_or_a_prefix(value: object, selection: ColumnSelector) -> None:
    assert parse_selector(value, field="inputs") == selection
    assert selection.to_json() == value


@pytest.mark.parametrize(
    ("value", "code", "field"),
    [
        ("x", "wrong_type", "inputs"),
        (None, "wrong_type", "inputs"),
        ({}, "missing_field", "inputs"),
        ({"column": "x", "prefix": "y"}, "invalid_combination", "inputs"),
        ({"col": "x"}, "unknown_field", "inputs.col"),
        ({"column": 1}, "wrong_type", "inputs.column"),
        ({"prefix": ""}, "out_of_range", "inputs.prefix"),
        ({"columns": "x"}, "wrong_type", "inputs.columns"),
        ({"columns": []}, "out_of_range", "inputs.columns"),
        ({"columns": ["x", 1]}, "wrong_type", "inputs.columns"),
        ({"columns": ["x", "x"]}, "out_of_range", "inputs.columns"),
    ],
)
def test_other_selections_are_refused(value: object, code: str, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_selector(value, field=field.partition(".")[0])
    assert (caught.value.code, caught.value.field) == (code, field)


def _lists(table: Table) -> list[list[str | int]]:
    rows_K, codes_K, values = table.listed("y", field="targets")
    assert values == sorted(values)
    found: list[list[str | int]] = [[] for _ in range(table.rows)]
    for row, code in zip(rows_K.tolist(), codes_K.tolist(), strict=True):
        found[row].append(values[code])
    return found


def test_times_are_ordered_in_float64(tmp_path: Path) -> None:
    seconds = 1.7e9 + np.array([0.3, 0.1, 0.2, 0.1])
    table = table_of(tmp_path, pa.table({"t": seconds}))
    assert table.order("t", field="split.column").tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize("bad", [None, math.nan])
def test_a_row_without_a_time_is_bad(tmp_path: Path, bad: float | None) -> None:
    table = table_of(tmp_path, pa.table({"t": pa.array([1.5, bad, 2.5], pa.float64())}))
    with pytest.raises(BadRows) as caught:
        table.order("t", field="split.column")
    assert [row.row for row in caught.value.rows] == [1]


def test_texts_that_are_too_long_for_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.datasets.table._MAX_TEXT_BYTES", 100)
    table = table_of(tmp_path, pa.table({"y": ["a name of some length"] * 10, "z": [["a name of some length"]] * 10}))
    with pytest.raises(OutOfRange, match="100 bytes"):
        table.codes("y", field="data.group")
    with pytest.raises(OutOfRange, match="100 bytes"):
        table.listed("z", field="data.targets")
