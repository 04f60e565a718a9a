"""The stored form: the same bytes for the same content, within its bounds."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest

from adapters.datasets.ingest import Format
from adapters.errors import InvalidDataset
from tests.support.data_set_files import arrow_stream, lists, parquet, read


def _table(rows: int = 20_000) -> Any:
    rng = np.random.default_rng(1)
    holes = rng.random(rows) < 0.1
    return pa.table(
        {
            "x": pa.array(rng.standard_normal(rows), mask=holes),
            "k": pa.array(rng.integers(0, 9, rows), mask=holes[::-1].copy()),
            "b": pa.array(rng.random(rows) < 0.5, mask=holes),
            "t": [None if hole else f"text {row % 97}" * (row % 5) for row, hole in enumerate(holes)],
            "e": pa.FixedSizeListArray.from_arrays(rng.standard_normal(rows * 4).astype(np.float32), 4),
            "r": lists([[float(row)] * (row % 3) for row in range(rows)], pa.float64()),
            "l": [["a"] * (row % 3) for row in range(rows)],
        }
    )


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    report, _ = read(tmp_path, arrow_stream(_table(100)), Format.ARROW)
    content = (tmp_path / "stored").read_bytes()
    assert report.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert report.bytes == len(content)


def test_the_bytes_do_not_depend_on_how_the_rows_came(tmp_path: Path) -> None:
    table = _table()
    names = table.schema.names
    large = table.set_column(names.index("t"), "t", table["t"].cast(pa.large_string()))
    coded = table.set_column(names.index("t"), "t", table["t"].combine_chunks().dictionary_encode())
    uploads = [
        (arrow_stream(table), Format.ARROW),
        (arrow_stream(table, rows_a_batch=777), Format.ARROW),
        (arrow_stream(table, compression="zstd"), Format.ARROW),
        (arrow_stream(large), Format.ARROW),
        (arrow_stream(coded), Format.ARROW),
        (arrow_stream(pa.concat_tables([table.slice(0, 5), table.slice(5)])), Format.ARROW),
        (parquet(table, row_group_size=1234), Format.PARQUET),
        (parquet(table, compression="none", use_dictionary=False), Format.PARQUET),
    ]
    assert len({read(tmp_path, content, kind)[0].digest for content, kind in uploads}) == 1


def test_what_lies_behind_a_null_does_not_change_the_bytes(tmp_path: Path) -> None:
    mask = np.array([False, True, False])
    digests = {
        read(tmp_path, arrow_stream(pa.table({"x": pa.array(np.array([1.0, hidden, 3.0]), mask=mask)})), Format.ARROW)[
            0
        ].digest
        for hidden in (0.0, 7.0, float("inf"))
    }
    assert len(digests) == 1


def test_other_values_names_types_or_orders_are_other_digests(tmp_path: Path) -> None:
    tables = [
        pa.table({"x": [1, 2], "y": [3, 4]}),
        pa.table({"x": [1, 2], "y": [3, 5]}),
        pa.table({"x": [1, 2], "z": [3, 4]}),
        pa.table({"x": [1.0, 2.0], "y": [3, 4]}),
        pa.table({"y": [3, 4], "x": [1, 2]}),
        pa.table({"x": [2, 1], "y": [4, 3]}),
    ]
    digests = {read(tmp_path, arrow_stream(table), Format.ARROW)[0].digest for table in tables}
    assert len(digests) == len(tables)


def test_all_rows_come_back_whatever_their_size(tmp_path: Path) -> None:
    texts = ["x" * size for size in (10, 5_000_000, 1, 3_000_000, 3_000_000, 0)] * 3
    table = pa.table({"t": texts, "n": list(range(len(texts)))})
    _, values = read(tmp_path, arrow_stream(table), Format.ARROW, max_bytes=2**27)
    assert values == table.to_pydict()
    assert ipc.open_file(str(tmp_path / "stored")).num_record_batches > 3


def test_a_row_that_is_too_large_is_named(tmp_path: Path) -> None:
    table = pa.table({"t": ["x"] * 9000 + ["y" * (2**24 + 1)]})
    with pytest.raises(InvalidDataset, match="row 9000 would be stored in") as caught:
        read(tmp_path, arrow_stream(table), Format.ARROW, max_bytes=2**27)
    assert caught.value.row == 9000


def test_what_does_not_fit_is_refused_and_written_no_further(tmp_path: Path) -> None:
    table = pa.table({"t": ["x" * 100] * 100_000})
    with pytest.raises(InvalidDataset, match="stored in more than 1000000 bytes"):
        read(tmp_path, arrow_stream(table), Format.ARROW, max_bytes=1_000_000)
    assert (tmp_path / "stored").stat().st_size <= 1_000_000
