"""The body of `POST /predict` → one float32 array, the references of its rows and the members of the answer.

A fast parser, which makes no Python number of an element, reads most bodies. The exact parser reads those that it
leaves: those with an error, and unusual ones, such as those with options. What both can read, both read alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simdjson

from adapters.arrays import Float32, matrix, sum_of_squares
from adapters.errors import (
    InvalidCombination,
    InvalidInput,
    LoraplexError,
    MissingField,
    OutOfRange,
    WrongShape,
    WrongType,
    shorten,
)
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, parse_reference
from app.http.bodies import object_of_body, read_as
from app.http.schemas.predictions import MEMBERS, OUTPUTS, PredictRequest

# N rows · C columns · I in_features

_LARGEST = float(np.finfo(np.float32).max)
# Above this size, the lists of a text are counted before it is parsed.
COUNTED_BYTES = 2**18
# Members of a request that the fast parser reads: the rows, and their adapter or adapters.
_FAST_MEMBERS = 2


class PredictOptions(NamedTuple):
    """Options of a request that asks for more than its outputs."""

    members: tuple[str, ...]
    """Subset of `MEMBERS`, in their order."""
    top_k: int | None
    """Number of most probable classes. None means all probabilities, and one label for each row."""


@dataclass(slots=True, eq=False)
class InferenceRequest:
    """Rows of one request, and the adapter of each."""

    inputs_NI: Float32
    """(N, I), every number finite."""
    references: Sequence[Reference | None]
    """One for all rows, or one for each row if `by_row`; None means the bare base layer."""
    by_row: bool = False
    options: PredictOptions | None = None
    """None means the outputs alone."""


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
    if flat.size != rows * columns:
        return None
    if sum_of_squares(flat) > _LARGEST and np.maximum.reduce(np.abs(flat)) > _LARGEST:
        return None
    x_NC: Float32 = flat.astype(np.float32).reshape(rows, columns)
    return x_NC


def read_fast(
    body: bytes, base: BaseLayer, *, max_rows: int, parser: simdjson.Parser | None = None
) -> InferenceRequest | None:
    """Read a body as `request_from_json` does; return None if the fast parser cannot decide.

    `parser` keeps its memory from body to body. No other thread may use it meanwhile.
    """
    # The lists are the rows, the list of rows and the adapters. The parser would hold the interpreter lock for a text
    # with more lists, only to refuse it.
    if len(body) > COUNTED_BYTES and count_lists(body) > max_rows + 2:
        return None
    try:
        request: Any = (parser or simdjson.Parser()).parse(body)
        if len(request) != _FAST_MEMBERS:  # a repeated member counts twice
            return None
        inputs_NI = read_rows(request["inputs"], base.in_features, max_rows=max_rows)
        if inputs_NI is None:
            return None
        N = len(inputs_NI)
        lists = 1 + N
        if "adapter" in request:
            references, by_row = [_parse_reference(request["adapter"])], False
        else:
            references, by_row = [_parse_reference(reference) for reference in request["adapters"]], True
            lists += 1
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, LoraplexError):
        return None
    # The parser accepts a byte order mark, which is not JSON.
    if not has_lists(body, lists) or (by_row and len(references) != N) or body[0] > 127:
        return None
    return InferenceRequest(inputs_NI, references, by_row)


def request_from_json(value: object, base: BaseLayer, *, max_rows: int) -> InferenceRequest:
    """Read the JSON value of a body; raise `InvalidInput`."""
    request = read_as(PredictRequest, object_of_body(value))
    by_row = request.gave("adapters")
    if by_row and request.gave("adapter"):
        raise InvalidCombination("adapter and adapters are both given", field="adapters", expected="one of the two")
    if not by_row and not request.gave("adapter"):
        detail = "adapter is missing; null means the bare base layer"
        raise MissingField(detail, field="adapter", expected="a reference or null")
    options = _read_options(request.members, request.top_k, out_features=base.out_features)
    inputs_NI = matrix(request.inputs, field="inputs", columns=base.in_features, max_rows=max_rows)
    if not by_row:
        return InferenceRequest(inputs_NI, [_parse_reference(request.adapter)], options=options)
    references, expected = request.adapters, f"a list of {len(inputs_NI)} entries, one for each row"
    if not isinstance(references, list):
        raise WrongType("adapters is not a list", field="adapters", given=references, expected=expected)
    if len(references) != len(inputs_NI):
        entries = f"{len(references)} entries"
        raise WrongShape(f"adapters has {entries}", field="adapters", given=entries, expected=expected)
    references = [_parse_reference(reference, "adapters", row) for row, reference in enumerate(references)]
    return InferenceRequest(inputs_NI, references, by_row=True, options=options)


def _parse_reference(reference: object, field: str = "adapter", row: int | None = None) -> Reference | None:
    return None if reference is None else parse_reference(reference, field=field, row=row)


def _read_options(members: Sequence[object], top_k: int | None, *, out_features: int) -> PredictOptions | None:
    """Check `return` and `top_k` (at least 1); return None if they ask for the outputs alone.

    Raises `WrongType`, `OutOfRange` and `InvalidCombination`, naming the field and the position.
    """
    expected = f"1 to {len(MEMBERS)} of {', '.join(MEMBERS)}, each once"
    if not members:
        raise OutOfRange("return is empty", field="return", given=members, expected=expected)
    for position, name in enumerate(members):
        kind: type[InvalidInput]
        if not isinstance(name, str):
            kind = WrongType
        elif name not in MEMBERS:
            kind = OutOfRange
        elif name in members[:position]:
            kind = InvalidCombination
        else:
            continue
        detail = f"return, position {position}: {shorten(name)}; expected {expected}"
        raise kind(detail, field="return", given=name, expected=expected)
    selected = tuple(name for name in MEMBERS if name in members)
    if top_k is not None and selected == (OUTPUTS,):
        detail = "top_k is given, and return asks for neither probabilities nor labels"
        raise InvalidCombination(detail, field="top_k", given=top_k, expected="probabilities or labels in return")
    if top_k is not None and top_k > out_features:
        detail, expected = f"top_k is {shorten(top_k)}", f"a whole number from 1 to {out_features}, the outputs"
        raise OutOfRange(f"{detail}; expected {expected}", field="top_k", given=top_k, expected=expected)
    return None if selected == (OUTPUTS,) else PredictOptions(selected, top_k)
