"""JSON lines: what each column becomes, and what is wrong with which line."""

from pathlib import Path

import pytest

from adapters.datasets.ingest import Format
from adapters.datasets.validation import IngestReport
from adapters.errors import BadRows, InvalidDataset
from tests.support.data_set_files import bad, read, types


def _read(folder: Path, *lines: str) -> tuple[IngestReport, dict[str, list[object]]]:
    return read(folder, "\n".join(lines).encode(), Format.JSON_LINES)


def test_values_keep_their_types(tmp_path: Path) -> None:
    line = '{"n": 1, "f": 2.5, "t": "a: b", "b": true, "e": [1.5, 2], "k": [1, 2], "l": ["x"]}'
    report, values = _read(tmp_path, line, "", line, "")
    assert types(report) == {
        "n": ("int64", None),
        "f": ("float64", None),
        "t": ("string", None),
        "b": ("bool", None),
        "e": ("list<float64>", 2),
        "k": ("list<int64>", 2),
        "l": ("list<string>", None),
    }
    assert (report.rows, report.bad_rows) == (2, ())
    assert values == {
        "n": [1, 1],
        "f": [2.5, 2.5],
        "t": ["a: b"] * 2,
        "b": [True, True],
        "e": [[1.5, 2.0]] * 2,
        "k": [[1, 2]] * 2,
        "l": [["x"]] * 2,
    }


def test_a_key_that_a_line_lacks_or_that_comes_late_is_a_null(tmp_path: Path) -> None:
    report, values = _read(tmp_path, '{"a": 1}', '{"b": 2}')
    assert values == {"a": [1, None], "b": [None, 2]}
    assert bad(report) == [(0, "b", "null"), (1, "a", "null")]


def test_a_column_is_of_what_most_of_it_is(tmp_path: Path) -> None:
    report, values = _read(tmp_path, '{"x": 1}', '{"x": "one"}', '{"x": true}', '{"x": 2.5}', '{"x": 3}', '{"x": [1]}')
    assert values == {"x": [1.0, None, None, 2.5, 3.0, None]}
    assert bad(report) == [(1, "x", "not a number: one"), (2, "x", "not a number: true"), (5, "x", "not a number: [1]")]


def test_lists_of_floats_of_another_width_are_bad_rows(tmp_path: Path) -> None:
    report, values = _read(tmp_path, '{"x": [1.5, 2]}', '{"x": [3]}', '{"x": [1, 2]}', '{"x": []}', '{"x": [1, null]}')
    assert types(report) == {"x": ("list<float64>", 2)}
    assert values["x"] == [[1.5, 2.0], [3.0], [1.0, 2.0], [], None]
    assert bad(report) == [
        (1, "x", "1 numbers, where most rows have 2"),
        (3, "x", "0 numbers, where most rows have 2"),
        (4, "x", "not a list of numbers: there is null in it"),
    ]


def test_lists_of_whole_numbers_or_of_text_may_be_of_any_length(tmp_path: Path) -> None:
    report, values = _read(tmp_path, '{"k": [1, 2], "t": []}', '{"k": [], "t": ["a", "b"]}')
    assert types(report) == {"k": ("list<int64>", None), "t": ("list<string>", None)}
    assert values == {"k": [[1, 2], []], "t": [[], ["a", "b"]]}
    assert bad(report) == []


def test_numbers_too_large_are_not_finite(tmp_path: Path) -> None:
    report, _ = _read(tmp_path, '{"x": 1.5}', '{"x": 1e400}', '{"x": NaN}', '{"x": -Infinity}', f'{{"x": {10**350}}}')
    assert [(row, reason) for row, _, reason in bad(report)] == [
        (1, "Infinity"),
        (2, "NaN"),
        (3, "-Infinity"),
        (4, "Infinity"),
    ]


def test_whole_numbers_past_64_bits_become_floats(tmp_path: Path) -> None:
    _, values = _read(tmp_path, f'{{"x": {2**63}, "y": [{2**63}]}}', '{"x": 1, "y": [2]}')
    assert values == {"x": [2.0**63, 1.0], "y": [[2.0**63], [2.0]]}


def test_lines_that_are_no_objects_are_named_with_the_reason(tmp_path: Path) -> None:
    lines = ['{"x": 1}', "[1]", '{"x": 1, "x": 2}', "{bad", '{"x": "\\ud800"}', "null", '{"x": ' + "[" * 200_000]
    with pytest.raises(BadRows) as caught:
        _read(tmp_path, *lines)
    rows = {row.row: row.reason for row in caught.value.rows}
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert "line 2 is not an object" in rows[1]
    assert "'x' is twice" in rows[2]
    assert "not JSON" in rows[3]
    assert "surrogate" in rows[4]
    assert "not an object" in rows[5]
    assert "nested too deeply" in rows[6]


def test_a_key_twice_is_found_among_texts_with_colons(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match="row 0"):
        _read(tmp_path, '{"a": 1, "a" : 2, "b": ":"}')


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"x": {"y": 1}}', "column 'x', is an object"),
        ('{"x": [[1]]}', "a list in a list"),
        ('{"x": [{}]}', "an object in a list"),
        ('{"": 1}', "column 0"),
        ('{"a\\u0000b": 1}', "column 0"),
        ("{}", "no columns"),
        ("", "no rows"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(InvalidDataset, match=says):
        _read(tmp_path, line)
