"""JSON arrays of numbers → float32 by a fast parser, with no Python number made on the way.

Whatever is not taken here as it stands is None: an exact reading decides it. The array comes out of the parser flat,
whatever is nested in it, so that whoever has the text counts its lists with `has_lists`.
"""

# N rows · C columns
from typing import Any

import numpy as np

from adapters.arrays import Float32

_LARGEST = float(np.finfo(np.float32).max)


def read_rows(rows: Any, columns: int, *, max_rows: int) -> Float32 | None:
    """An array of 1 to `max_rows` arrays of `columns` numbers → (N, C), each finite as float32.

    `rows` is an array of pysimdjson's; raises what that raises where it holds anything but numbers.
    """
    N = len(rows)
    if not 1 <= N <= max_rows:
        return None
    flat = np.frombuffer(rows.as_buffer(of_type="d"))
    if len(rows[0]) != columns if N == 1 else any(len(row) != columns for row in rows):
        return None
    return _float32(flat, N, columns)


def read_flat(numbers: Any, rows: int, columns: int) -> Float32 | None:
    """The same of one array of all the numbers, row by row."""
    return _float32(np.frombuffer(numbers.as_buffer(of_type="d")), rows, columns)


def count_lists(text: bytes | bytearray) -> int:
    """Return the number of opening brackets. It releases the interpreter lock, so it suits a large text."""
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("[")))


def has_lists(text: bytes, count: int) -> bool:
    """Whether there are exactly `count` opening brackets."""
    # Not `text.count`, which takes five times as long.
    at = -1
    for _ in range(count):
        at = text.find(b"[", at + 1)
        if at < 0:
            return False
    return text.find(b"[", at + 1) < 0


def _float32(flat: Any, rows: int, columns: int) -> Float32 | None:
    if flat.size != rows * columns or np.maximum.reduce(np.abs(flat)) > _LARGEST:
        return None
    x_NC: Float32 = flat.astype(np.float32).reshape(rows, columns)
    return x_NC
