"""The Open Inference Protocol's infer requests and answers: bytes ↔ rows.

https://github.com/kserve/open-inference-protocol, with the binary tensor data extension:
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol/binary-tensor-data-extension
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import simdjson
from numpy.typing import NDArray

from adapters.arrays import Float32, matrix
from adapters.errors import (
    InvalidCombination,
    InvalidInput,
    LoraplexError,
    MissingField,
    NotFinite,
    OutOfRange,
    UnknownField,
    WrongShape,
    WrongType,
    shorten,
)
from adapters.strict_json import parse
from app.serving.request import count_lists, has_lists, read_flat, read_rows

JSON_SUBJECT = "the JSON of the request"
# The only tensors that a model has.
INPUT, OUTPUT = "inputs", "outputs"
HEADER_LENGTH = "Inference-Header-Content-Length"
# The datatypes that an input may have.
ITEM_BYTES: Mapping[str, int] = {"FP32": 4, "FP64": 8, "FP16": 2, "BF16": 2}
MAX_CACHED_BYTES = 1024
_CACHED_HEADERS = 1024
# Triton reads 32 bits. A number above that of the classes means all of them.
_MOST_CLASSES = 2**32
_REQUEST = ("id", "model_name", "parameters", "inputs", "outputs")
# Parameters of extensions that the service does not support, and that would change the answer.
_NOT_SERVED = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


@dataclass(frozen=True, slots=True)
class InferHeader:
    """JSON part of an infer request: the input tensor, and the form of the answer."""

    rows: int
    datatype: str
    binary_bytes: int | None
    """Bytes of binary data after the JSON; None if the numbers are in `data`."""
    data: list[object] | None
    binary_output: bool
    id: str | None
    model_name: str | None
    """Name of the model, if the body has it. It must be the one in the path."""
    timeout_seconds: float | None
    classes: int | None = None
    """Number of classes with the largest outputs to answer with, instead of the outputs."""
    is_plain: bool = True
    """Whether it has neither a timeout nor asks for classes."""


def read_header(text: bytes, *, columns: int, max_rows: int) -> InferHeader:
    """Read the JSON part of a request; raise `NotJson` or `InvalidInput`."""
    return header_of(parse(text, what=JSON_SUBJECT), columns=columns, max_rows=max_rows)


def header_of(value: object, *, columns: int, max_rows: int) -> InferHeader:
    """Read the parsed JSON part of a request; raise `InvalidInput`."""
    request = object_of(value, "the request", _REQUEST)
    for field in ("id", "model_name"):
        if field in request and not isinstance(request[field], str):
            raise wrong(field, request[field], "a string")
    parameters = parameters_of(request, "parameters")
    given = _only_input(request)
    rows, datatype = _rows(given["shape"], columns, max_rows), _datatype(given["datatype"])
    size = _binary_size(given, rows, columns, datatype)
    data = given.get("data")
    if size is None and not isinstance(data, list):
        raise wrong("inputs.data", data, "a list of numbers, flat or nested")
    output, timeout = _only_output(request), _timeout(parameters)
    binary_output, classes = flag(output, "outputs.parameters", "binary_data"), _classes(output)
    if binary_output is None:
        binary_output = flag(parameters, "parameters", "binary_data_output") or False
    return InferHeader(
        rows=rows,
        datatype=datatype,
        binary_bytes=size,
        data=data if isinstance(data, list) else None,
        binary_output=binary_output,
        id=request.get("id"),  # type: ignore[arg-type]  # a string: checked above
        model_name=request.get("model_name"),  # type: ignore[arg-type]  # the same
        timeout_seconds=timeout,
        classes=classes,
        is_plain=timeout is None and classes is None,
    )


@lru_cache(maxsize=_CACHED_HEADERS)
def read_header_cached(text: bytes, columns: int, max_rows: int) -> InferHeader:
    """Call `read_header` with a cache: a client that sends its numbers as bytes repeats a few headers."""
    return read_header(text, columns=columns, max_rows=max_rows)


def _only_input(request: Mapping[str, object]) -> dict[str, object]:
    inputs = required(request, "inputs", "one tensor called inputs")
    if not isinstance(inputs, list):
        raise wrong("inputs", inputs, "a list of one tensor")
    for tensor in inputs:
        name = required(object_of(tensor, "inputs"), "name", "the name inputs", within="inputs.")
        if name != INPUT:
            raise UnknownField(
                f"there is no input {shorten(name)}; the model has one, called {INPUT}",
                field="inputs.name",
                given=name,
                expected=INPUT,
            )
    if len(inputs) != 1:
        raise WrongShape(
            f"the request has {len(inputs)} tensors in inputs; the model takes 1, called {INPUT}",
            field="inputs",
            given=f"{len(inputs)} tensors",
            expected="1 tensor",
        )
    tensor = object_of(inputs[0], "inputs", ("name", "shape", "datatype", "parameters", "data"))
    for field, expected in (("shape", "[rows, columns]"), ("datatype", "FP32, FP64, FP16 or BF16")):
        required(tensor, field, expected, within="inputs.")
    return tensor


def _rows(shape: object, columns: int, max_rows: int) -> int:
    expected = f"[rows, {columns}]"
    # Booleans are ints to Python. Nothing is multiplied before each number is known to be small.
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise wrong("inputs.shape", shape, f"a list of whole numbers, {expected}")
    if len(shape) != 2 or shape[1] != columns or shape[0] < 1:
        raise WrongShape(
            f"inputs.shape is {shorten(shape)}, expected {expected} with at least 1 row",
            field="inputs.shape",
            given=shape,
            expected=expected,
        )
    rows: int = shape[0]
    if rows > max_rows:
        raise OutOfRange(
            f"inputs.shape has {shorten(rows)} rows; at most {max_rows} fit in one request",
            field="inputs.shape",
            given=rows,
            expected=f"at most {max_rows} rows",
        )
    return rows


def _datatype(given: object) -> str:
    if not isinstance(given, str):
        raise wrong("inputs.datatype", given, "a string")
    if given not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        raise OutOfRange(
            f"inputs.datatype is {shorten(given)}; the model takes {known}",
            field="inputs.datatype",
            given=given,
            expected=f"one of {known}",
        )
    return given


def _binary_size(tensor: Mapping[str, object], rows: int, columns: int, datatype: str) -> int | None:
    parameters = parameters_of(tensor, "inputs.parameters")
    _refuse_extensions(parameters, "inputs.parameters")
    size, wanted = parameters.get("binary_data_size"), rows * columns * ITEM_BYTES[datatype]
    if size is None:
        if datatype == "BF16":
            raise InvalidCombination(
                "BF16 has no form in JSON: send it as binary data",
                field="inputs.datatype",
                given=datatype,
                expected="binary_data_size, or FP32",
            )
        if "data" not in tensor:
            raise MissingField("inputs has neither data nor binary_data_size", field="inputs.data", expected="numbers")
        return None
    if "data" in tensor:
        raise InvalidCombination(
            "inputs has both data and binary_data_size", field="inputs.data", expected="one of the two"
        )
    if type(size) is not int:
        raise wrong("inputs.parameters.binary_data_size", size, "a whole number of bytes")
    if size != wanted:
        raise WrongShape(
            f"binary_data_size is {shorten(size)}; shape [{rows}, {columns}] of {datatype} takes {wanted} bytes",
            field="inputs.parameters.binary_data_size",
            given=size,
            expected=f"{wanted} bytes",
        )
    return wanted


def _only_output(request: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters of the output; empty if the request does not have it."""
    outputs = request.get("outputs", [])
    if not isinstance(outputs, list):
        raise wrong("outputs", outputs, "a list of outputs to answer with")
    parameters: dict[str, object] = {}
    for output in outputs:
        name = required(object_of(output, "outputs", ("name", "parameters")), "name", OUTPUT, within="outputs.")
        if name != OUTPUT:
            raise UnknownField(
                f"there is no output {shorten(name)}; the model has one, called {OUTPUT}",
                field="outputs.name",
                given=name,
                expected=OUTPUT,
            )
        parameters = parameters_of(output, "outputs.parameters")
        _refuse_extensions(parameters, "outputs.parameters")
    if len(outputs) > 1:
        raise InvalidCombination(f"the output {OUTPUT} is asked for twice", field="outputs", expected="each once")
    return parameters


def _classes(parameters: Mapping[str, object]) -> int | None:
    field = "outputs.parameters.classification"
    if "classification" not in parameters:
        return None
    count = parameters["classification"]
    if type(count) is not int:
        raise wrong(field, count, "a whole number of classes")
    if not 1 <= count < _MOST_CLASSES:
        raise OutOfRange(
            f"{field} is {shorten(count)}",
            field=field,
            given=count,
            expected=f"a whole number from 1 to {_MOST_CLASSES - 1}",
        )
    return count


def _timeout(parameters: Mapping[str, object]) -> float | None:
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or not 0 <= timeout < 2**63:
        raise wrong("parameters.timeout", timeout, "a whole number of microseconds, 0 for none")
    return timeout / 1e6 if timeout else None


def _refuse_extensions(parameters: Mapping[str, object], field: str) -> None:
    for key in _NOT_SERVED:
        if key in parameters:
            raise InvalidInput(
                f"{field}.{key} is of an extension that this service does not have",
                field=f"{field}.{key}",
                expected="the extensions binary_tensor_data and classification",
            )


def parameters_of(holder: Mapping[str, object], field: str) -> dict[str, object]:
    """Return the parameters of a request or tensor, which may have any names, with strings, numbers and booleans."""
    parameters = object_of(holder.get("parameters", {}), field)
    for key, value in parameters.items():
        if not isinstance(value, str | int | float):
            raise wrong(f"{field}.{key}", value, "a string, a number or a boolean")
    return parameters


def flag(parameters: Mapping[str, object], within: str, key: str) -> bool | None:
    """Return a boolean parameter; None if it is missing."""
    value = parameters.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{within}.{key}", value, "true or false")
    return value


def object_of(value: object, field: str, known: tuple[str, ...] | None = None) -> dict[str, object]:
    """Return `value` if it is an object whose fields are all known."""
    if not isinstance(value, dict):
        raise wrong(field, value, "an object")
    for key in value:
        if known is not None and key not in known:
            raise UnknownField(
                f"{shorten(key)} is not a field of {field}; the fields are {', '.join(known)}",
                field=key,
                given=key,
                expected=f"one of {', '.join(known)}",
            )
    return value


def required(holder: Mapping[str, object], field: str, expected: str, *, within: str = "") -> object:
    """Return the value of a field; raise `MissingField`."""
    if field not in holder:
        raise MissingField(f"{within}{field} is missing", field=f"{within}{field}", expected=expected)
    return holder[field]


def wrong(field: str, given: object, expected: str) -> WrongType:
    """Return the error for a value of the wrong type."""
    return WrongType(f"{shorten(field)} must be {expected}", field=field, given=given, expected=expected)


# N rows · I in_features


_COUNTED_BYTES = 2**18
# Around the rows: more than those there are in any text that is remembered and plain.
_MOST_LISTS = 100
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_ROWS = re.compile(rb"\[[ \t\r\n]*\[")
_END_OF_ROWS = re.compile(rb"\][ \t\r\n]*\]")


def read_infer_fast(
    body: bytes, columns: int, max_rows: int, *, parser: simdjson.Parser | None = None
) -> tuple[InferHeader, Float32] | None:
    """Read a body of JSON as `read_exactly` does; return None if the fast parser cannot decide.

    `parser` keeps its memory from body to body. No other thread may use it meanwhile.
    """
    found = _DATA.search(body)
    if found is None or body.find(b'"data"', found.end()) >= 0:
        return None
    begin = found.end()
    nested = _ROWS.match(body, begin) is not None
    last = _END_OF_ROWS.search(body, begin) if nested else None
    end = last.end() if last is not None else body.find(b"]", begin) + 1
    # The text around the numbers is a key of the cache, so its length is bounded.
    if not end or len(body) - (end - begin) >= MAX_CACHED_BYTES:
        return None
    if len(body) > _COUNTED_BYTES and count_lists(body) > max_rows + _MOST_LISTS:
        return None
    try:
        # Without its numbers, the text is short, and much the same from request to request. In the tensor's data, where
        # alone a list may stand under that name, it has none: had the name been anywhere else, this would be an error.
        header = read_header_cached(b"%b[]%b" % (body[:begin], body[end:]), columns, max_rows)
        numbers = body[begin:end]
        array = (parser or simdjson.Parser()).parse(numbers)
        inputs_NI = read_rows(array, columns, max_rows=max_rows) if nested else read_flat(array, header.rows, columns)
    except (ValueError, TypeError, AttributeError, RuntimeError, LoraplexError):
        return None
    if inputs_NI is None or len(inputs_NI) != header.rows or header.data != [] or header.datatype == "FP16":
        return None
    return (header, inputs_NI) if has_lists(numbers, 1 + header.rows if nested else 1) else None


# N rows · I in_features · O out_features


DTYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def read_infer_request(
    body: bytes, header_length: int | None, columns: int, max_rows: int
) -> tuple[InferHeader, Float32]:
    """Read the header and the rows, (N, I) float32, of an infer request.

    `header_length` is the length of the JSON in bytes: None if the whole body is JSON, 0 if it is the rows in FP32.
    Raises `NotJson` or `InvalidInput`.
    """
    quick = read_infer_fast(body, columns, max_rows) if header_length is None else None
    return quick or read_exactly(body, header_length, columns, max_rows)


def json_bytes(body: bytes, header_length: int | None) -> bytes:
    """Return the JSON of a body; empty if `header_length` is more than the body has."""
    if header_length is None or header_length == len(body):
        return body
    return body[:header_length] if header_length < len(body) else b""


def read_exactly(
    body: bytes, header_length: int | None, columns: int, max_rows: int, value: object = None
) -> tuple[InferHeader, Float32]:
    """Read an infer request with the exact parser. `value` is the parsed JSON, if it has been parsed."""
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
        read = read_header_cached if header_length <= MAX_CACHED_BYTES else _read_header_once
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


def _read_header_once(text: bytes, columns: int, max_rows: int) -> InferHeader:
    return read_header(text, columns=columns, max_rows=max_rows)


def _raw(size: int, columns: int, max_rows: int) -> InferHeader:
    """Return the header of a request whose body is FP32 alone; its answer is binary too."""
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
    return InferHeader(rows, "FP32", size, None, True, None, None, None)


def _from_json(header: InferHeader, columns: int, *, leftover: int) -> Float32:
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
        # Round to 16 bits, as the client would have sent them in binary.
        with np.errstate(over="ignore"):
            narrow_NI = x_NI.astype(np.float16).astype(np.float32)
        _check_finite(narrow_NI, x_NI, header.datatype)
        return narrow_NI
    return x_NI


def _from_bytes(body: bytes, offset: int, header: InferHeader, columns: int) -> Float32:
    given = np.frombuffer(body, DTYPES[header.datatype], header.rows * columns, offset)
    if header.datatype == "BF16":
        x: Float32 = (given.astype(np.uint32) << 16).view(np.float32)
    elif header.datatype == "FP32":
        # A copy, because the body may be unaligned and is read-only.
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
    row, column = (int(index) for index in np.unravel_index(np.argmin(finite_NI), finite_NI.shape))
    narrow = "FP16" if datatype == "FP16" else "float32"
    raise NotFinite(
        f"{INPUT}, row {row}, column {column}: not a finite {narrow} number",
        field=INPUT,
        row=row,
        given=float(given_NI[row, column]),
        expected="a finite number",
    )
