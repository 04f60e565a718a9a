"""The Open Inference Protocol's infer requests: bytes → rows.

https://github.com/kserve/open-inference-protocol, with the binary tensor data extension:
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol/binary-tensor-data-extension
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import simdjson
from numpy.typing import NDArray

from adapters import errors
from adapters.arrays import Float32, matrix, sum_of_squares
from adapters.errors import InvalidInput, LoraplexError, shorten
from adapters.names import Reference, check_name
from adapters.strict_json import parse
from app.serving.request import COUNTED_BYTES, count_lists, has_lists, read_flat, read_rows

# N rows · I in_features

BASE_MODEL, BASE_VERSION = "__base__", "1"
JSON_SUBJECT = "the JSON of the request"
# The only tensors that a model has, which are also the fields that hold them.
INPUT, OUTPUT = "inputs", "outputs"
HEADER_LENGTH = "Inference-Header-Content-Length"
# The datatypes that an input may have.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
MAX_CACHED_BYTES = 1024
_CACHED_HEADERS = 1024
_VERSION = re.compile(r"[1-9][0-9]*")
_MAX_VERSION_DIGITS = 200
_DATATYPES = f"one of {', '.join(DTYPES)}"
# Triton reads 32 bits. A number above that of the classes means all of them.
_MOST_CLASSES = 2**32
# Fields of each object, with their types.
_REQUEST_FIELDS = {"id": str, "model_name": str, "parameters": dict, INPUT: list, OUTPUT: list}
_INPUT_FIELDS = {"name": str, "shape": list, "datatype": str, "parameters": dict, "data": list}
_OUTPUT_FIELDS = {"name": str, "parameters": dict}
_TYPE_NAMES: Mapping[type, str] = {str: "a string", dict: "an object", list: "a list"}
# Parameters of a tensor whose numbers are elsewhere, in an extension that the service does not support.
_NOT_SERVED = frozenset({"shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"})


@dataclass(frozen=True, slots=True)
class InferHeader:
    """JSON part of an infer request: the input tensor, and the form of the answer."""

    rows: int
    datatype: str
    binary_bytes: int | None
    """Bytes of binary data after the JSON; None if the numbers are in `data`."""
    data: list[object] | None
    binary_output: bool
    id: str | None = None
    model_name: str | None = None
    """Name of the model, if the body has it. It must be the one in the path."""
    timeout_seconds: float | None = None
    classes: int | None = None
    """Number of classes with the largest outputs to answer with, instead of the outputs."""

    @property
    def is_plain(self) -> bool:
        """Return whether the request has no timeout and asks for no classes."""
        return self.timeout_seconds is None and self.classes is None


def parse_model(name: str, version: str | None = None) -> Reference | None:
    """Return the reference of a path's model and version; None for the bare base layer.

    Raises `InvalidName`, or `VersionNotFound` for a malformed version.
    """
    is_base = name == BASE_MODEL
    if not is_base:
        check_name(name)
    if version is not None and not (version == BASE_VERSION if is_base else _VERSION.fullmatch(version)):
        versions = f"its version is {BASE_VERSION}" if is_base else "versions are numbers from 1 on"
        detail = f"{name!r} has no version {shorten(version)}; {versions}"
        raise errors.VersionNotFound(detail, field="version", given=version, expected=versions)
    if is_base:
        return None
    # Python refuses to read thousands of digits. A number of 200 digits does not exist either.
    return Reference(name) if version is None else Reference(name, version=int(version[:_MAX_VERSION_DIGITS]))


def check_model_name(header: InferHeader, model: str) -> None:
    """Raise `InvalidCombination` if the body has another model than the path."""
    if header.model_name is not None and header.model_name != model:
        raise _invalid(errors.InvalidCombination, "model_name", header.model_name, f"{model}, as in the path")


def header_of(value: object, *, columns: int, max_rows: int) -> InferHeader:
    """Read the parsed JSON part of a request; raise `InvalidInput`."""
    request = _read_object(value, "", _REQUEST_FIELDS, required=(INPUT,))
    tensor = _read_tensor(request[INPUT], INPUT, _INPUT_FIELDS, required=("name", "shape", "datatype"))
    output = _read_tensor(request[OUTPUT], OUTPUT, _OUTPUT_FIELDS, required=("name",)) if request.get(OUTPUT) else {}
    shape, datatype = tensor["shape"], tensor["datatype"]
    field, expected = "inputs.shape", f"[rows, {columns}] with 1 to {max_rows} rows"
    # Booleans are ints to Python. Nothing is multiplied before each number is known to be small.
    _check(all(type(size) is int for size in shape), errors.WrongType, field, shape, expected)
    _check(shape[1:] == [columns] and shape[0] >= 1, errors.WrongShape, field, shape, expected)
    _check(shape[0] <= max_rows, errors.OutOfRange, field, shape, expected)
    _check(datatype in DTYPES, errors.OutOfRange, "inputs.datatype", datatype, _DATATYPES)
    parameters, output_parameters = request.get("parameters", {}), output.get("parameters", {})
    timeout, expected = parameters.get("timeout", 0), "a whole number of microseconds, 0 for none"
    _check(type(timeout) is int and 0 <= timeout < 2**63, errors.WrongType, "parameters.timeout", timeout, expected)
    classes = output_parameters.get("classification")
    if classes is not None:
        field, expected = "outputs.parameters.classification", "a whole number from 1 to 2^32 - 1"
        _check(type(classes) is int, errors.WrongType, field, classes, expected)
        _check(1 <= classes < _MOST_CLASSES, errors.OutOfRange, field, classes, expected)
    field, binary_output = "outputs.parameters.binary_data", output_parameters.get("binary_data")
    if binary_output is None:
        field, binary_output = "parameters.binary_data_output", parameters.get("binary_data_output", False)
    _check(isinstance(binary_output, bool), errors.WrongType, field, binary_output, "true or false")
    return InferHeader(
        rows=shape[0],
        datatype=datatype,
        binary_bytes=_binary_bytes(tensor, shape[0] * columns, datatype),
        data=tensor.get("data"),
        binary_output=binary_output,
        id=request.get("id"),
        model_name=request.get("model_name"),
        timeout_seconds=timeout / 1e6 if timeout else None,
        classes=classes,
    )


@lru_cache(maxsize=_CACHED_HEADERS)
def read_header_cached(text: bytes, columns: int, max_rows: int) -> InferHeader:
    """Read the JSON part of a request; raise `NotJson` or `InvalidInput`.

    It is cached, because a client that sends its numbers as bytes repeats a few headers.
    """
    return header_of(parse(text, what=JSON_SUBJECT), columns=columns, max_rows=max_rows)


def _read_tensor(
    tensors: list[object], field: str, types: Mapping[str, type], *, required: Sequence[str]
) -> dict[str, Any]:
    """Return the only tensor of a list, which is called as the field is."""
    if len(tensors) != 1:
        kind = errors.WrongShape if field == INPUT else errors.InvalidCombination
        raise _invalid(kind, field, f"{len(tensors)} tensors", f"1 tensor called {field}")
    tensor = _read_object(tensors[0], field, types, required=required)
    if tensor["name"] != field:
        raise _invalid(errors.UnknownField, f"{field}.name", tensor["name"], f"{field}, the only one of the model")
    for key in _NOT_SERVED & tensor.get("parameters", {}).keys():
        location, expected = f"{field}.parameters.{key}", "only the extensions binary_tensor_data and classification"
        raise _invalid(InvalidInput, location, tensor["parameters"][key], expected)
    return tensor


def _read_object(value: object, field: str, types: Mapping[str, type], *, required: Sequence[str]) -> dict[str, Any]:
    """Return an object after checking its fields, their types and its parameters."""
    within = f"{field}." if field else ""
    if not isinstance(value, dict):
        raise _invalid(errors.WrongType, field or "the request", value, "an object")
    for key, entry in value.items():
        if key not in types:
            detail = f"{shorten(key)} is not a field of {field or 'the request'}"
            raise errors.UnknownField(detail, field=key, given=key, expected=f"one of {', '.join(types)}")
        if not isinstance(entry, types[key]):
            raise _invalid(errors.WrongType, f"{within}{key}", entry, _TYPE_NAMES[types[key]])
    for key in required:
        if key not in value:
            detail = f"{within}{key} is missing"
            raise errors.MissingField(detail, field=f"{within}{key}", expected=_TYPE_NAMES[types[key]])
    for key, entry in value.get("parameters", {}).items():
        if not isinstance(entry, str | int | float):
            expected = "a string, a number or a boolean"
            raise _invalid(errors.WrongType, f"{within}parameters.{key}", entry, expected)
    return value


def _binary_bytes(tensor: Mapping[str, Any], numbers: int, datatype: str) -> int | None:
    """Return the size of the binary data of an input; None if its numbers are in `data`."""
    size = tensor.get("parameters", {}).get("binary_data_size")
    if (size is None) != ("data" in tensor):
        kind = errors.MissingField if size is None else errors.InvalidCombination
        detail = "inputs must have either data or the parameter binary_data_size"
        raise kind(detail, field="inputs.data", expected="one of the two")
    if size is None:
        if datatype == "BF16":
            raise _invalid(errors.InvalidCombination, "inputs.datatype", datatype, "FP32, or BF16 as binary data")
        return None
    field, needed = "inputs.parameters.binary_data_size", numbers * DTYPES[datatype].itemsize
    expected = f"{needed} bytes, which {numbers} numbers of {datatype} take"
    _check(type(size) is int, errors.WrongType, field, size, expected)
    _check(size == needed, errors.WrongShape, field, size, expected)
    return needed


def _check(is_valid: bool, kind: type[InvalidInput], field: str, value: object, expected: str) -> None:
    if not is_valid:
        raise _invalid(kind, field, value, expected)


def _invalid(kind: type[InvalidInput], field: str, value: object, expected: str) -> InvalidInput:
    detail = f"{shorten(field)} is {shorten(value)}; expected {expected}"
    return kind(detail, field=field, given=value, expected=expected)


# Opening brackets besides those of the rows that a body for the fast parser may have; a plain one has fewer.
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
    start = _DATA.search(body)
    if start is None or body.find(b'"data"', start.end()) >= 0:
        return None
    begin = start.end()
    nested = _ROWS.match(body, begin) is not None
    last = _END_OF_ROWS.search(body, begin) if nested else None
    end = last.end() if last is not None else body.find(b"]", begin) + 1
    # The text around the numbers is a key of the cache, so its length is bounded.
    if not end or len(body) - (end - begin) >= MAX_CACHED_BYTES:
        return None
    if len(body) > COUNTED_BYTES and count_lists(body) > max_rows + _MOST_LISTS:
        return None
    try:
        # The text without the numbers is short, and nearly the same in each request, so its header is cached. It has
        # `"data":[]`, which only a tensor may have: if this "data" is anywhere else, reading the header fails.
        header = read_header_cached(b"%b[]%b" % (body[:begin], body[end:]), columns, max_rows)
        numbers = body[begin:end]
        array = (parser or simdjson.Parser()).parse(numbers)
        inputs_NI = read_rows(array, columns, max_rows=max_rows) if nested else read_flat(array, header.rows, columns)
    except (ValueError, TypeError, AttributeError, RuntimeError, LoraplexError):
        return None
    if inputs_NI is None or len(inputs_NI) != header.rows or header.data != [] or header.datatype == "FP16":
        return None
    return (header, inputs_NI) if has_lists(numbers, 1 + header.rows if nested else 1) else None


def json_bytes(body: bytes, header_length: int | None) -> bytes:
    """Return the JSON of a body; raise `WrongShape` if `header_length` is more than the body has."""
    if header_length is None:
        return body
    if header_length > len(body):
        raise _invalid(errors.WrongShape, HEADER_LENGTH, header_length, f"at most {len(body)}, the length of the body")
    return body[:header_length]


def read_exactly(
    body: bytes, header_length: int | None, columns: int, max_rows: int, value: object = None
) -> tuple[InferHeader, Float32]:
    """Read the header and the rows, (N, I) float32, of an infer request.

    `header_length` is the length of the JSON in bytes: None if the whole body is JSON, 0 if it is the rows in FP32.
    `value` is the parsed JSON, if it has been parsed. Raises `NotJson` or `InvalidInput`.
    """
    if header_length == 0:
        header = _raw_header(len(body), columns, max_rows)
    elif value is not None:
        header = header_of(value, columns=columns, max_rows=max_rows)
    else:
        text = json_bytes(body, header_length)
        is_cached = len(text) < len(body) and len(text) <= MAX_CACHED_BYTES
        header = (read_header_cached if is_cached else read_header_cached.__wrapped__)(text, columns, max_rows)
    expected, rest = header.binary_bytes or 0, 0 if header_length is None else len(body) - header_length
    if expected and header_length is None:
        detail = f"{HEADER_LENGTH} is missing: without it the whole body is JSON, and it has a binary_data_size"
        raise errors.MissingField(detail, field=HEADER_LENGTH, expected="how many bytes of the body are JSON")
    if rest != expected:
        detail = f"{rest} bytes follow the JSON, and binary_data_size says {expected}"
        raise errors.WrongShape(detail, field=HEADER_LENGTH, given=f"{rest} bytes", expected=f"{expected} bytes")
    return header, _from_json(header, columns) if header.data is not None else _from_bytes(body, rest, header, columns)


def _raw_header(size: int, columns: int, max_rows: int) -> InferHeader:
    """Return the header of a request whose body is FP32 alone; its answer is binary too."""
    row_bytes = columns * DTYPES["FP32"].itemsize
    rows, rest = divmod(size, row_bytes)
    if rest or not 1 <= rows <= max_rows:
        kind = errors.WrongShape if rest or not rows else errors.OutOfRange
        raise _invalid(kind, "body", f"{size} bytes", f"1 to {max_rows} rows of {row_bytes} bytes each")
    return InferHeader(rows, "FP32", size, None, True)


def _from_json(header: InferHeader, columns: int) -> Float32:
    data: Any = header.data
    if not (data and isinstance(data[0], list)):
        if len(data) != header.rows * columns:
            numbers, expected = f"{len(data)} numbers", f"{header.rows * columns}, or {header.rows} lists of {columns}"
            raise _invalid(errors.WrongShape, "inputs.data", numbers, expected)
        data = [data[begin : begin + columns] for begin in range(0, len(data), columns)]
    x_NI = matrix(data, field=INPUT, rows=header.rows, columns=columns)
    if header.datatype != "FP16":
        return x_NI
    # Round to 16 bits, as the client would have sent them in binary.
    with np.errstate(over="ignore"):
        return _finite(x_NI.astype(np.float16).astype(np.float32), x_NI, header.datatype)


def _from_bytes(body: bytes, size: int, header: InferHeader, columns: int) -> Float32:
    numbers = np.frombuffer(body, DTYPES[header.datatype], offset=len(body) - size)
    if header.datatype == "FP32":
        # A copy, because the body may be unaligned and is read-only.
        x = numbers.astype(np.float32)
    elif header.datatype == "BF16":
        x = numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            x = numbers.astype(np.float32)
    return _finite(x.reshape(header.rows, columns), numbers, header.datatype)


def _finite(x_NI: Float32, numbers: NDArray[Any], datatype: str) -> Float32:
    """Return an array if it is finite; raise `NotFinite` with the first of the `numbers` before the conversion."""
    if math.isfinite(sum_of_squares(x_NI.reshape(-1))):
        return x_NI
    finite_NI = np.isfinite(x_NI)
    if finite_NI.all():
        return x_NI
    index = int(np.argmin(finite_NI))
    row, column = divmod(index, x_NI.shape[1])
    kind, number = "FP16" if datatype == "FP16" else "float32", float(numbers.flat[index])
    detail = f"{INPUT}, row {row}, column {column}: not a finite {kind} number"
    raise errors.NotFinite(detail, field=INPUT, row=row, given=number, expected="a finite number")
