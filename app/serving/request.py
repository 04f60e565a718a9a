"""The body of `POST /predict` → one float32 array and the references of its rows.

First by a fast parser that makes no Python number per element. What that one does not take as it stands, an error or
a number past 64 bits, is decided by the exact one: the two never disagree on what they both take.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import simdjson

from adapters.arrays import Float32, matrix
from adapters.errors import InvalidCombination, LoraplexError, MissingField, WrongShape, WrongType
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, parse_reference
from adapters.strict_json import parse
from app.http.bodies import object_of_body, read_as
from app.http.schemas.predictions import PredictRequest
from app.serving.options import PredictOptions, read_options

# N rows · C columns


_LARGEST = float(np.finfo(np.float32).max)


def read_rows(rows: Any, columns: int, *, max_rows: int) -> Float32 | None:
    """Convert an array of 1 to `max_rows` arrays of `columns` numbers to (N, C) float32, or return None.

    `rows` is an array of pysimdjson, which raises an error if it contains anything but numbers.
    """
    N = len(rows)
    if not 1 <= N <= max_rows:
        return None
    flat = np.frombuffer(rows.as_buffer(of_type="d"))
    if len(rows[0]) != columns if N == 1 else any(len(row) != columns for row in rows):
        return None
    return _float32(flat, N, columns)


def read_flat(numbers: Any, rows: int, columns: int) -> Float32 | None:
    """Convert one flat array of all numbers, row by row, to (N, C) float32, or return None."""
    return _float32(np.frombuffer(numbers.as_buffer(of_type="d")), rows, columns)


def count_lists(text: bytes | bytearray) -> int:
    """Return the number of opening brackets. It releases the interpreter lock, so it suits a large text."""
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("[")))


def has_lists(text: bytes, count: int) -> bool:
    """Return whether there are exactly `count` opening brackets."""
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


# N rows · I in_features


# Members of a request that the fast parser reads: the rows, and their adapter or adapters.
_MEMBERS = 2


class InferenceRequest(NamedTuple):
    """Rows of one request, and the adapter of each."""

    inputs_NI: Float32
    """(N, I), every number finite."""
    references: Sequence[Reference | None]
    """One for all rows, or one for each row if `by_row`; None means the bare base layer."""
    by_row: bool = False
    options: PredictOptions | None = None
    """None means the outputs alone."""


def read_fast(
    body: bytes, base: BaseLayer, *, max_rows: int, parser: simdjson.Parser | None = None
) -> InferenceRequest | None:
    """Read a body as `read_exactly` does; return None if the fast parser cannot decide.

    `parser` keeps its memory from body to body. No other thread may use it meanwhile.
    """
    try:
        request: Any = (parser or simdjson.Parser()).parse(body)
        if len(request) != _MEMBERS:  # a repeated member counts twice
            return None
        names = sorted(request.keys())
        inputs_NI = read_rows(request["inputs"], base.in_features, max_rows=max_rows)
        if inputs_NI is None:
            return None
        N = len(inputs_NI)
        lists = 1 + N
        if names == ["adapter", "inputs"]:
            references, by_row = [_parse_reference(request["adapter"])], False
        elif names == ["adapters", "inputs"]:
            references, by_row = [_parse_reference(given) for given in request["adapters"]], True
            lists += 1
        else:
            return None
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, LoraplexError):
        return None
    # The parser accepts a byte order mark, which is not JSON.
    if not has_lists(body, lists) or (by_row and len(references) != N) or body[0] > 127:
        return None
    return InferenceRequest(inputs_NI, references, by_row)


def read_exactly(body: bytes, base: BaseLayer, *, max_rows: int) -> InferenceRequest:
    """Read a body; raise `InvalidInput` or `NotJson`."""
    return request_from_json(parse(body), base, max_rows=max_rows)


def request_from_json(value: object, base: BaseLayer, *, max_rows: int) -> InferenceRequest:
    """Read the JSON value of a body; raise `InvalidInput`."""
    request = read_as(PredictRequest, object_of_body(value))
    if request.gave("adapter") and request.gave("adapters"):
        raise InvalidCombination(
            "adapter and adapters cannot both be given",
            field="adapters",
            expected="adapter for all rows, or adapters with one a row",
        )
    if not (request.gave("adapter") or request.gave("adapters")):
        raise MissingField(
            "adapter is missing; null means the bare base layer", field="adapter", expected="a reference or null"
        )
    options = read_options(request.wanted, request.top_k, out_features=base.out_features)
    inputs_NI = matrix(request.inputs, field="inputs", columns=base.in_features, max_rows=max_rows)
    if request.gave("adapter"):
        return InferenceRequest(inputs_NI, [_parse_reference(request.adapter)], options=options)
    if not isinstance(request.adapters, list):
        raise WrongType(
            "adapters must be a list", field="adapters", given=request.adapters, expected="one reference or null a row"
        )
    if len(request.adapters) != len(inputs_NI):
        raise WrongShape(
            f"adapters has {len(request.adapters)} entries, inputs has {len(inputs_NI)} rows",
            field="adapters",
            given=f"{len(request.adapters)} entries",
            expected=f"{len(inputs_NI)} entries",
        )
    references = [_parse_reference(given, "adapters", row) for row, given in enumerate(request.adapters)]
    return InferenceRequest(inputs_NI, references, by_row=True, options=options)


def _parse_reference(given: object, field: str = "adapter", row: int | None = None) -> Reference | None:
    return None if given is None else parse_reference(given, field=field, row=row)
