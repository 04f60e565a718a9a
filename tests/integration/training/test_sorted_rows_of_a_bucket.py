"""Rows of a fleet in a bucket: a machine fetches them once, and a process reads a block of them into memory."""

# N rows · I in_features
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from adapters.errors import FitFailed
from adapters.storage.blob_location import BlobLocation
from adapters.training.data_file import Column, write_data_file
from adapters.training.sorted_rows import RowTable
from tests.support.object_server import bucket_of, new_url

N, I, NAME = 40_000, 64, f"{10:012x}-{1:032x}"


@pytest.mark.usefixtures("s3")
def test_a_block_is_read_without_the_other_rows(tmp_path: Path) -> None:
    inputs_NI = np.arange(N * I, dtype=np.float32).reshape(N, I)
    columns: dict[str, np.ndarray] = {"inputs_NI": inputs_NI, "targets": inputs_NI[:, :1], "groups_N": np.arange(N) % 7}
    location = BlobLocation(folder=tmp_path / "trainer", url=new_url())
    blobs = location.open()
    blobs.create_folder()
    blobs.write(NAME, lambda file: write_data_file({name: Column.of(array) for name, array in columns.items()}, file))
    node = BlobLocation(folder=tmp_path / "node", url=location.url)
    node.open().create_folder()
    # It fetches the whole file, as the first process of a machine.
    RowTable(node.open(), NAME)
    bucket_of(location).delete(f"blobs/{NAME}")
    tracemalloc.start()
    try:
        rows = RowTable(node.open(), NAME).read(30_000, 30_100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert b"".join(rows["inputs_NI"].to_pylist()) == inputs_NI[30_000:30_100].tobytes()
    assert peak < inputs_NI.nbytes // 4
    other = BlobLocation(folder=tmp_path / "other", url=location.url)
    other.open().create_folder()
    with pytest.raises(FitFailed):
        RowTable(other.open(), NAME)
