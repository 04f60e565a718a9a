"""The Open Inference Protocol's infer requests and answers: bytes ↔ rows.

https://github.com/kserve/open-inference-protocol, with the binary tensor data extension:
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol/binary-tensor-data-extension
"""

# N rows · I in_features · O out_features
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32, matrix
from adapters.catalog.versions import Version
from adapters.errors import InvalidCombination, MissingField, NotFinite, OutOfRange, WrongShape, shorten
from app.serving.oip.fast_json import read_json_quickly
from app.serving.oip.header import (
    HEADER_LENGTH,
    INPUT,
    ITEM_BYTES,
    LONGEST_REMEMBERED,
    OUTPUT,
    Header,
    header_of,
    read_header,
    read_header_again,
)
from app.serving.oip.models import BASE_VERSION

_STORED: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def read_request(body: bytes, header_length: int | None, columns: int, max_rows: int) -> tuple[Header, Float32]:
    """An infer request's header and its rows, (N, I) float32, finite.

    `header_length` is how many bytes of the body are JSON: None where all are, 0 where the body is the rows
    themselves in FP32. Raises `NotJson` and every `InvalidInput`.
    """
    quick = read_json_quickly(body, columns, max_rows) if header_length is None else None
    return quick or read_exactly(body, header_length, columns, max_rows)


def json_part(body: bytes, header_length: int | None) -> bytes:
    """Return the bytes of a body that are JSON; none if it says that it has more than there are."""
    if header_length is None or header_length == len(body):
        return body
    return body[:header_length] if header_length < len(body) else b""


def read_exactly(
    body: bytes, header_length: int | None, columns: int, max_rows: int, value: object = None
) -> tuple[Header, Float32]:
    """The same, number by number where they are JSON. `value` is what the JSON says, if it has been read."""
    if header_length == 0:
        header = _raw(len(body), columns, max_rows)
    elif value is not None:
        header = header_of(value, columns=columns, max_rows=max_rows)
    elif header_length is None or header_length == len(body):
        header = read_header(body, columns=columns, max_rows=max_rows)
    elif header_length > len(body):
        raise WrongShape(
            f"{HEADER_LENGTH} is {header_length}, and the body has {len(body)} bytes",
            field=HEADER_LENGTH,
            given=header_length,
            expected=f"at most {len(body)}",
        )
    else:
        text = bytes(memoryview(body)[:header_length])
        read = read_header_again if header_length <= LONGEST_REMEMBERED else _read_header_once
        header = read(text, columns, max_rows)
    if header.binary_bytes is None:
        return header, _from_json(header, columns, leftover=len(body) - (header_length or len(body)))
    if header_length is None:
        raise MissingField(
            f"{HEADER_LENGTH} is missing: without it the whole body is JSON, and binary_data_size says that it is not",
            field=HEADER_LENGTH,
            expected="how many bytes of the body are JSON",
        )
    there = len(body) - header_length
    if there != header.binary_bytes:
        raise WrongShape(
            f"{there} bytes follow the JSON, and binary_data_size says {header.binary_bytes}",
            field="binary_data_size",
            given=f"{there} bytes",
            expected=f"{header.binary_bytes} bytes",
        )
    return header, _from_bytes(body, header_length, header, columns)


def _read_header_once(text: bytes, columns: int, max_rows: int) -> Header:
    return read_header(text, columns=columns, max_rows=max_rows)


def _raw(size: int, columns: int, max_rows: int) -> Header:
    """The header of a request without one: all of its body is FP32, and binary is what it gets."""
    rows, rest = divmod(size, columns * ITEM_BYTES["FP32"])
    if rest or not rows:
        raise WrongShape(
            f"the body has {size} bytes; rows of {columns} FP32 numbers take {columns * 4} bytes each",
            field="body",
            given=f"{size} bytes",
            expected=f"a multiple of {columns * 4} bytes",
        )
    if rows > max_rows:
        raise OutOfRange(
            f"the body has {rows} rows; at most {max_rows} fit in one request",
            field="body",
            given=f"{rows} rows",
            expected=f"at most {max_rows} rows",
        )
    return Header(rows, "FP32", size, None, True, None, None, None)


def _from_json(header: Header, columns: int, *, leftover: int) -> Float32:
    if leftover:
        raise WrongShape(
            f"{leftover} bytes follow the JSON, and no input has a binary_data_size",
            field=HEADER_LENGTH,
            given=f"{leftover} bytes",
            expected="no bytes after the JSON",
        )
    data: Any = header.data
    if not (data and isinstance(data[0], list)):
        if len(data) != header.rows * columns:
            raise WrongShape(
                f"inputs.data has {len(data)} numbers; shape [{header.rows}, {columns}] takes {header.rows * columns}",
                field="inputs.data",
                given=f"{len(data)} numbers",
                expected=f"{header.rows * columns} numbers, or {header.rows} lists of {columns}",
            )
        data = [data[begin : begin + columns] for begin in range(0, len(data), columns)]
    x_NI = matrix(data, field=INPUT, rows=header.rows, columns=columns)
    if header.datatype == "FP16":
        # The client says that these are numbers of 16 bits.
        with np.errstate(over="ignore"):
            narrow_NI = x_NI.astype(np.float16).astype(np.float32)
        _check_finite(narrow_NI, x_NI, header.datatype)
        return narrow_NI
    return x_NI


def _from_bytes(body: bytes, offset: int, header: Header, columns: int) -> Float32:
    given = np.frombuffer(body, _STORED[header.datatype], header.rows * columns, offset)
    if header.datatype == "BF16":
        x: Float32 = (given.astype(np.uint32) << 16).view(np.float32)
    elif header.datatype == "FP32":
        # A copy of its own: the body may start anywhere, and is not to be written to.
        x = given.astype(np.float32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            x = given.astype(np.float32)
    x_NI: Float32 = x.reshape(header.rows, columns)
    if not np.isfinite(x).all():
        _check_finite(x_NI, x_NI if header.datatype == "BF16" else given.reshape(x_NI.shape), header.datatype)
    return x_NI


def _check_finite(x_NI: Float32, given_NI: NDArray[Any], datatype: str) -> None:
    finite_NI = np.isfinite(x_NI)
    if finite_NI.all():
        return
    row, column = (int(place) for place in np.unravel_index(np.argmin(finite_NI), finite_NI.shape))
    narrow = "FP16" if datatype == "FP16" else "float32"
    raise NotFinite(
        f"{INPUT}, row {row}, column {column}: not a finite {narrow} number",
        field=INPUT,
        row=row,
        given=float(given_NI[row, column]),
        expected="a finite number",
    )


def check_named(header: Header, model: str) -> None:
    """Raises `InvalidCombination` where the body names another model than the path."""
    if header.model_name is not None and header.model_name != model:
        raise InvalidCombination(
            f"model_name is {shorten(header.model_name)}, the path says {model}",
            field="model_name",
            given=header.model_name,
            expected=f"{model}, or no model_name",
        )


def write_answer(
    header: Header, model: str, version: Version | None, outputs_NO: Float32, data: bytes | None
) -> tuple[bytes, int | None]:
    """The body of an answer, and how many bytes of it are JSON where the rest is the tensor.

    `data` are the numbers as JSON, None where the client wants the tensor.
    """
    rows, columns = outputs_NO.shape
    about = "" if header.id is None else f'"id":{json.dumps(header.id)},'
    begin = (
        f'{{"model_name":"{model}","model_version":"{BASE_VERSION if version is None else version.version}",{about}'
        f'"outputs":[{{"name":"{OUTPUT}","datatype":"FP32","shape":[{rows},{columns}],'
    )
    if data is not None:
        return b'%b"data":%b}]}' % (begin.encode(), data), None
    tensor = outputs_NO.astype(_STORED["FP32"], copy=False).tobytes()
    text = f'{begin}"parameters":{{"binary_data_size":{len(tensor)}}}}}]}}'.encode()
    return text + tensor, len(text)
