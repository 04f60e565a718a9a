"""Keys that decide which rows are held out: the same row, or the same group, has the same key in every training."""

# N rows · I in_features
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from adapters.arrays import Float32
from adapters.training.data_file import Column
from adapters.training.planning.targets import Codes

# Constant, so that a key stays the same, and not a hash that other programs compute of the same bytes.
_KEY = b"loraplex held-out rows"
_BYTES = 8


def keys_of_rows(inputs: Column) -> Codes:
    """Return (N,) int64 from 0 to 2⁶³ - 1: the hash of each row's inputs. Rows of equal inputs have equal keys."""
    return np.concatenate([_keys(_row_bytes(part_NI)) for part_NI in inputs.parts()])


def keys_of_groups(codes_N: Codes, values: Sequence[str | int]) -> Codes:
    """Return (N,) int64 from 0 to 2⁶³ - 1: the hash of the value of each row's group."""
    return _keys(str(value).encode(errors="surrogatepass") for value in values)[codes_N]


def _row_bytes(part_NI: Float32) -> Iterable[memoryview]:
    # 0 and -0 are the same number.
    content = np.ascontiguousarray(part_NI + np.float32(0)).view(np.uint8).reshape(-1).data
    width = 4 * part_NI.shape[1]
    return (content[begin : begin + width] for begin in range(0, len(content), width))


def _keys(contents: Iterable[bytes | memoryview]) -> Codes:
    digests = b"".join(hashlib.blake2b(content, digest_size=_BYTES, key=_KEY).digest() for content in contents)
    return (np.frombuffer(digests, "<u8") >> np.uint64(1)).astype(np.int64)
