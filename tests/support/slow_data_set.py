"""A small file that takes long to read: every row is the same, and packed into next to nothing."""

import io
from functools import lru_cache

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.process_tree import children
from tests.support.service import eventually

_ROWS = 4_000_000


@lru_cache(1)
def slow_parquet() -> bytes:
    """Parquet with 200 million equal rows: 1.6 GB in the stored form, a megabyte here."""
    buffer = io.BytesIO()
    table = pa.table({"x": np.zeros(_ROWS, np.int64)})
    with pq.ParquetWriter(buffer, table.schema) as writer:
        for _ in range(50):
            writer.write_table(table, row_group_size=_ROWS)
    return buffer.getvalue()


def reader_of(pid: int) -> psutil.Process:
    """The reading process that `pid` has started, once there is one."""

    (process,) = eventually(
        lambda: children("adapters.datasets.ingest", of=pid), what="the start of the reading process"
    )
    return process
