"""An infer request that is JSON alone: its numbers by the fast parser, and what is around them exactly."""

# N rows · I in_features
import re

import simdjson

from adapters.arrays import Float32
from adapters.errors import LoraplexError
from app.serving.fast_json import count_lists, has_lists, read_flat, read_rows
from app.serving.oip.header import LONGEST_REMEMBERED, Header, read_header_again

_COUNTED_BYTES = 2**18
_MOST_LISTS = 100
"""Around the rows: more than those there are in any text that is remembered and plain."""
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_ROWS = re.compile(rb"\[[ \t\r\n]*\[")
_END_OF_ROWS = re.compile(rb"\][ \t\r\n]*\]")


def read_json_quickly(
    body: bytes, columns: int, max_rows: int, *, parser: simdjson.Parser | None = None
) -> tuple[Header, Float32] | None:
    """The header and the rows, (N, I) float32, that the exact reading would return; None where that has to decide.

    `parser` is one that nobody else uses meanwhile: it keeps its memory from body to body.
    """
    found = _DATA.search(body)
    if found is None or body.find(b'"data"', found.end()) >= 0:
        return None
    begin = found.end()
    nested = _ROWS.match(body, begin) is not None
    last = _END_OF_ROWS.search(body, begin) if nested else None
    end = last.end() if last is not None else body.find(b"]", begin) + 1
    # What is around the numbers is remembered: it must be short, whoever sends it.
    if not end or len(body) - (end - begin) >= LONGEST_REMEMBERED:
        return None
    if len(body) > _COUNTED_BYTES and count_lists(body) > max_rows + _MOST_LISTS:
        return None
    try:
        # Without its numbers, the text is short, and much the same from request to request. In the tensor's data, where
        # alone a list may stand under that name, it has none: had the name been anywhere else, this would be an error.
        header = read_header_again(b"%b[]%b" % (body[:begin], body[end:]), columns, max_rows)
        numbers = body[begin:end]
        array = (parser or simdjson.Parser()).parse(numbers)
        inputs_NI = read_rows(array, columns, max_rows=max_rows) if nested else read_flat(array, header.rows, columns)
    except (ValueError, TypeError, AttributeError, RuntimeError, LoraplexError):
        return None
    if inputs_NI is None or len(inputs_NI) != header.rows or header.data != [] or header.datatype == "FP16":
        return None
    return (header, inputs_NI) if has_lists(numbers, 1 + header.rows if nested else 1) else None
