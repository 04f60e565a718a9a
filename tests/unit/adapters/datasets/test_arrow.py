"""Parquet and Arrow streams: types, and files that lie."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from adapters.datasets.ingest import Format
from adapters.errors import InvalidDataset
from tests.support.data_set_files import arrow_stream, bad, lists, parquet, read, types

_DAY = datetime.date(2024, 2, 29)
_TIME = datetime.datetime(2024, 2, 29, 12, 30, 1, 5, datetime.UTC)


@pytest.mark.parametrize("kind", [Format.ARROW, Format.PARQUET])
@pytest.mark.parametrize(
    ("given", "type_and_width", "stored"),
    [
        (pa.array([1, None], pa.int8()), ("int64", None), [1, None]),
        (pa.array([2**63 - 1, 0], pa.uint64()), ("int64", None), [2**63 - 1, 0]),
        (pa.array([0.5, 2], pa.float32()), ("float32", None), [0.5, 2.0]),
        (pa.array([0.1, None], pa.float64()), ("float64", None), [0.1, None]),
        (pa.array([1.5, None], pa.float16()), ("float32", None), [1.5, None]),
        (pa.array([True, None]), ("bool", None), [True, None]),
        (pa.array(["a", None], pa.large_string()), ("string", None), ["a", None]),
        (pa.array(["a", "b"]).dictionary_encode(), ("string", None), ["a", "b"]),
        (pa.array([7, None]).dictionary_encode(), ("int64", None), [7, None]),
        (pa.array([1, 2], pa.decimal128(9, 2)), ("float64", None), [1.0, 2.0]),
        (pa.array([_DAY, None]), ("string", None), ["2024-02-29", None]),
        (pa.array([_TIME], pa.timestamp("us", "Asia/Tokyo")), ("string", None), ["2024-02-29T12:30:01.000005Z"]),
        (pa.array([_TIME.replace(tzinfo=None)], pa.timestamp("ms")), ("string", None), ["2024-02-29T12:30:01.000"]),
        (lists([[1.5, 2], None], pa.float32()), ("list<float32>", 2), [[1.5, 2.0], None]),
        (pa.array([[1, 2], None], pa.list_(pa.uint8(), 2)), ("list<int64>", 2), [[1, 2], None]),
        (pa.array([["a"], []]), ("list<string>", None), [["a"], []]),
    ],
)
def test_types_become_the_stored_ones(
    tmp_path: Path, kind: Format, given: Any, type_and_width: tuple[str, int | None], stored: list[object]
) -> None:
    table = pa.table({"x": given})
    report, values = read(tmp_path, arrow_stream(table) if kind == Format.ARROW else parquet(table), kind)
    assert types(report) == {"x": type_and_width}
    assert values == {"x": stored}


@pytest.mark.parametrize(
    "given",
    [
        pa.array([{"a": 1}]),
        pa.array([b"x"]),
        pa.array([[[1]]]),
        pa.array([[True]]),
        pa.array([1], pa.duration("s")),
        pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    ],
)
def test_other_types_are_refused_by_the_name_of_their_column(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InvalidDataset, match="column 'odd' is of the type") as caught:
        read(tmp_path, arrow_stream(pa.table({"fine": [1], "odd": given})), Format.ARROW)
    assert caught.value.field == "odd"


def test_a_number_past_64_bits_is_refused_by_the_name_of_its_column(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="column 'x' has a value that int64 cannot hold"):
        read(tmp_path, arrow_stream(pa.table({"x": pa.array([2**63], pa.uint64())})), Format.ARROW)


def test_nulls_in_lists_and_lists_of_another_width_are_bad_rows(tmp_path: Path) -> None:
    table = pa.table({"x": lists([[1, 2], [1, None], [3], None, [4, float("nan")]], pa.float64())})  # type: ignore[list-item]
    for content, kind in ((arrow_stream(table), Format.ARROW), (parquet(table), Format.PARQUET)):
        report, values = read(tmp_path, content, kind)
        assert bad(report) == [
            (1, "x", "a null in the list"),
            (2, "x", "1 numbers, where most rows have 2"),
            (3, "x", "null"),
            (4, "x", "element 1 is NaN"),
        ]
        assert (report.columns[0].nulls, report.columns[0].not_finite) == (2, 1)
        assert values["x"][:4] == [[1, 2], None, [3], None]


def test_columns_with_dots_in_their_names_are_read_as_they_are(tmp_path: Path) -> None:
    table = pa.table({"a": [[1.5], [2.0]], "a.b": [[1.0, 2.0], [3.0, 4.0]]})
    report, values = read(tmp_path, parquet(table), Format.PARQUET)
    assert types(report) == {"a": ("list<float64>", 1), "a.b": ("list<float64>", 2)}
    assert values == table.to_pydict()


def test_the_first_bad_rows_are_the_first_of_the_file_whatever_their_columns(tmp_path: Path) -> None:
    x_N = np.arange(30_000.0)
    y_N = x_N.copy()
    x_N[20_000:] = np.nan
    y_N[[3, 25_000]] = np.inf
    report, _ = read(tmp_path, arrow_stream(pa.table({"x": x_N, "y": y_N})), Format.ARROW)
    assert bad(report) == [(3, "y", "Infinity")] + [(20_000 + k, "x", "NaN") for k in range(19)]
    assert [column.not_finite for column in report.columns] == [10_000, 2]


def test_offsets_that_point_outside_are_refused(tmp_path: Path) -> None:
    stream = arrow_stream(pa.table({"x": lists([[1, 2], [3, 4]], pa.float64())}))
    honest = np.array([0, 2, 4], np.int32).tobytes()
    assert stream.count(honest) == 1
    patched = stream.replace(honest, np.array([0, 10**6, 2 * 10**6], np.int32).tobytes())
    with pytest.raises(InvalidDataset, match="an Arrow stream"):
        read(tmp_path, patched, Format.ARROW)


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": ["abcdefgh"]})
    for content, kind in ((arrow_stream(table), Format.ARROW), (parquet(table, use_dictionary=False), Format.PARQUET)):
        with pytest.raises(InvalidDataset, match="UTF"):
            read(tmp_path, content.replace(b"abcdefgh", b"abc\xff\xfefgh"), kind)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", [Format.ARROW, Format.PARQUET])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, kind: Format, share: float) -> None:
    table = pa.table({"x": np.arange(1000.0), "t": ["text"] * 1000})
    content = arrow_stream(table) if kind == Format.ARROW else parquet(table)
    with pytest.raises(InvalidDataset):
        read(tmp_path, content[: int(share * len(content))], kind)


def test_an_arrow_file_where_a_stream_is_wanted_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="new_stream"):
        read(tmp_path, b"ARROW1\0\0rest", Format.ARROW)


@pytest.mark.parametrize("table", [pa.table({"x": pa.array([], pa.int64())}), pa.table({})])
def test_a_table_without_rows_or_columns_is_refused(tmp_path: Path, table: Any) -> None:
    for content, kind in ((arrow_stream(table), Format.ARROW), (parquet(table), Format.PARQUET)):
        with pytest.raises(InvalidDataset, match=r"no rows|no columns"):
            read(tmp_path, content, kind)
