"""Data sets: files, arrays and Arrow tables in; shown, previewed, deleted."""

import time
from pathlib import Path
from socket import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from loraplex import BadRow, DatasetNotFound, InvalidDataset, PreconditionFailed, TimedOut, WrongShape, WrongType

from tests.integration.client.conftest import Connect, Start
from tests.integration.client.scripted_server import Scripted, reply, stay_silent

VERSION = {"dataset": "d", "version": 1, "digest": "", "created_at": "", "content_type": "", "rows": 1, "bytes": 1}
TABLE = pa.table({"age": pa.array([31, 40], pa.int64()), "name": ["a", "b"]})


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "arrows", "npz"])
def test_a_file_is_what_its_ending_says(start: Start, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"people.{ending.upper()}"
    match ending:
        case "csv":
            file.write_text("age,name\n31,a\n40,b\n")
        case "jsonl":
            file.write_text('{"age": 31, "name": "a"}\n{"age": 40, "name": "b"}\n')
        case "parquet":
            pyarrow.parquet.write_table(TABLE, file)
        case "arrows":
            with pa.ipc.new_stream(file, TABLE.schema) as writer:
                writer.write_table(TABLE)
        case _:
            with file.open("wb") as opened:
                np.savez(opened, age=np.array([31, 40]), name=np.array(["a", "b"]))
    client = start()
    version = client.put_dataset("people", file)
    assert [(column.name, column.type) for column in version.columns] == [("age", "int64"), ("name", "string")]
    assert client.put_dataset("people", TABLE).version == version.version == 1


def test_an_arrow_file_is_told_from_a_stream_before_it_is_sent(start: Start, tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "people.arrow", TABLE.schema) as writer:
        writer.write_table(TABLE)
    client = start()
    with pytest.raises(InvalidDataset, match="is an Arrow file, and the service reads Arrow streams"):
        client.put_dataset("people", tmp_path / "people.arrow")
    assert list(client.datasets()) == []


def test_arrays_are_columns_by_name(start: Start) -> None:
    client = start()
    columns = {"x": torch.ones(3, 4, dtype=torch.bfloat16), "y": [1, 2, 3], "file": np.array(["a", "b", "c"], object)}
    version = client.put_dataset("rows", columns)
    assert [(column.name, column.width) for column in version.columns] == [("x", 4), ("y", None), ("file", None)]
    assert client.preview("rows", offset=1, limit=1).rows == [{"x": [1.0] * 4, "y": 2, "file": "b"}]


def test_data_sets_are_listed_shown_and_deleted(start: Start, tmp_path: Path) -> None:
    client = start()
    file = tmp_path / "people.txt"
    file.write_text("age,name\n31,a\n,b\n")
    first = client.put_dataset("people", file, content_type="text/csv")
    assert first.bad_rows == (BadRow(1, "age", "null"),)
    client.put_dataset("people", TABLE, if_match=first.digest)
    with pytest.raises(PreconditionFailed):
        client.put_dataset("people", TABLE, if_none_match="*")
    assert [(found.name, found.versions, found.newest.rows) for found in client.datasets(prefix="pe")] == [
        ("people", 2, 2)
    ]
    assert client.dataset("people").newest.columns[0].name == "age"
    assert [version.version for version in client.dataset_versions("people")] == [2, 1]
    assert client.dataset_version("people", 1).bad_rows == first.bad_rows
    shown = client.preview("people", version=1)
    assert (shown.rows, shown.next_offset) == ([{"age": 31, "name": "a"}, {"age": None, "name": "b"}], None)
    client.delete_dataset("people")
    with pytest.raises(DatasetNotFound):
        client.dataset("people")


def test_what_is_no_table_is_said(start: Start, tmp_path: Path) -> None:
    client = start()
    (tmp_path / "people.xlsx").write_bytes(b"")
    with pytest.raises(InvalidDataset, match="ending"):
        client.put_dataset("people", tmp_path / "people.xlsx")
    with pytest.raises(InvalidDataset, match="no file"):
        client.put_dataset("people", tmp_path / "gone.csv")
    for gone in (tmp_path / "gone.csv", str(tmp_path / "gone"), tmp_path):
        with pytest.raises(InvalidDataset, match="no file"):
            client.put_dataset("people", gone, content_type="text/csv")
    with pytest.raises(WrongType, match="list"):
        client.put_dataset("people", [1, 2])
    with pytest.raises(WrongShape, match="differ in length"):
        client.put_dataset("people", {"x": [[1], [1, 2]]})
    with pytest.raises(WrongType, match="who"):
        client.put_dataset("people", {"who": ["a", None]})


def test_an_upload_has_the_time_that_the_service_takes_to_read_it_unless_it_is_given_another(
    connect: Connect, scripted: Scripted
) -> None:
    def slow(connection: socket) -> None:
        time.sleep(1.5)
        reply(201, VERSION)(connection)

    client = connect(scripted.url, timeout=0.5)
    scripted.plan([slow, stay_silent(scripted)])
    assert client.put_dataset("people", {"age": [31]}).version == 1
    with pytest.raises(TimedOut):
        client.put_dataset("people", {"age": [31]}, timeout=0.5)
