"""CSV: what each column becomes, and what is wrong with which row."""

import math
from pathlib import Path

import pytest

from adapters.datasets.ingest import Format
from adapters.datasets.validation import IngestReport
from adapters.errors import BadRows, InvalidDataset
from tests.support.data_set_files import bad, read, types


def _read(folder: Path, text: str | bytes) -> tuple[IngestReport, dict[str, list[object]]]:
    return read(folder, text.encode() if isinstance(text, str) else text, Format.CSV)


def test_each_column_gets_the_narrowest_type_that_holds_all_of_it(tmp_path: Path) -> None:
    report, values = _read(tmp_path, "whole,part,truth,text\n1,1,true,a\n-2,2.5,FALSE,1b\n3,.5e1,True,true\n")
    assert types(report) == {
        "whole": ("int64", None),
        "part": ("float64", None),
        "truth": ("bool", None),
        "text": ("string", None),
    }
    assert values == {
        "whole": [1, -2, 3],
        "part": [1.0, 2.5, 5.0],
        "truth": [True, False, True],
        "text": ["a", "1b", "true"],
    }
    assert (report.rows, report.bad_rows) == (3, ())


def test_a_fraction_far_down_makes_the_whole_column_one_of_fractions(tmp_path: Path) -> None:
    _, values = _read(tmp_path, "x\n" + "1\n" * 300_000 + "0.5\n")
    assert values["x"][0] == 1.0
    assert isinstance(values["x"][0], float)
    assert values["x"][-1] == 0.5


def test_text_among_numbers_is_named_by_row_far_down_too(tmp_path: Path) -> None:
    report, values = _read(tmp_path, "x,y\n1,2\noops,3\n" + "1,2\n" * 300_000 + "1,late\n")
    assert bad(report) == [(1, "x", "not a number: oops"), (300_002, "y", "not a number: late")]
    assert [column.nulls for column in report.columns] == [1, 1]
    assert values["x"][:3] == [1, None, 1]


def test_a_column_that_is_mostly_text_keeps_its_numbers_as_text(tmp_path: Path) -> None:
    report, values = _read(tmp_path, "x\n1\na\nb\n")
    assert values == {"x": ["1", "a", "b"]}
    assert bad(report) == []


def test_an_empty_cell_is_a_null_and_a_quoted_one_is_empty_text(tmp_path: Path) -> None:
    report, values = _read(tmp_path, 'x,t\n1,""\n,\n2,a\n')
    assert values == {"x": [1, None, 2], "t": ["", None, "a"]}
    assert bad(report) == [(1, "x", "null"), (1, "t", "null")]


def test_what_is_not_finite_as_float32_is_named(tmp_path: Path) -> None:
    report, values = _read(tmp_path, "x\n1.5\nNaN\n-inf\n1e39\n1e999\n")
    assert [reason for _, _, reason in bad(report)] == ["NaN", "-Infinity", "not finite as float32: 1e+39", "Infinity"]
    assert report.columns[0].not_finite == 4
    assert math.isnan(float(str(values["x"][1])))


@pytest.mark.parametrize("cell", ["0x10", "1_0", "1,5", "--1", "1e", "٣"])
def test_only_decimal_numbers_are_numbers(tmp_path: Path, cell: str) -> None:
    report, _ = _read(tmp_path, f'x\n1\n"{cell}"\n2\n')
    assert bad(report) == [(1, "x", f"not a number: {cell}")]


def test_blanks_around_numbers_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    _, values = _read(tmp_path, "\ufeffx,y\n 1,\t2.5 \n+3, .5\n")
    assert values == {"x": [1.0, 3.0], "y": [2.5, 0.5]}


def test_whole_numbers_past_64_bits_become_floats(tmp_path: Path) -> None:
    _, values = _read(tmp_path, "x,y\n9223372036854775807,9223372036854775808\n1,2\n")
    assert values == {"x": [2**63 - 1, 1], "y": [2.0**63, 2.0]}


def test_a_quoted_cell_may_hold_commas_and_lines(tmp_path: Path) -> None:
    _, values = _read(tmp_path, '"a, b",c\n"1\n2","x ""y"""\n')
    assert values == {"a, b": ["1\n2"], "c": ['x "y"']}


def test_rows_with_too_few_or_many_cells_are_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(BadRows) as caught:
        _read(tmp_path, "a,b\n1,2\n3\n\n4,5,6\n7,8\n")
    assert [(row.row, row.reason) for row in caught.value.rows] == [
        (1, "1 cells, where there are 2 names"),
        (2, "3 cells, where there are 2 names"),
    ]


def test_of_many_rows_with_too_few_cells_twenty_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRows) as caught:
        _read(tmp_path, "a,b\n" + "1\n" * 1000)
    assert [row.row for row in caught.value.rows] == list(range(20))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "first line"),
        (b"\n\na,b\n1,2\n", "first line"),
        (b"a,b\n", "no rows"),
        (b"a,a\n1,2\n", "two columns are called 'a'"),
        (b"a,\n1,2\n", "column 1"),
        (b"a,b\x07\n1,2\n", "column 1"),
        (b"a\0,b\n1,2\n", "NUL"),
        (b"a," + b"b" * 201 + b"\n1,2\n", "column 1"),
        (b"a,b\n1,\xff\n", "UTF-8"),
        (b"\xff\xfea\0,\0b\0\n\0", "UTF-8"),
        (b'a\n"' + b"x\n" * 2**21, "quote is not closed"),
    ],
)
def test_what_is_not_csv_in_utf_8_is_refused(tmp_path: Path, text: bytes, says: str) -> None:
    with pytest.raises(InvalidDataset, match=says):
        _read(tmp_path, text)


def test_a_byte_that_is_not_utf_8_is_named_by_row_and_column(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="row 2000001, column 'b'") as caught:
        _read(tmp_path, b"a,b\n" + b"1,2\n" * 2_000_001 + b"3,\xff\n")
    assert (caught.value.row, caught.value.field) == (2_000_001, "b")
