"""The JSON part of an infer request of the Open Inference Protocol, read exactly.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from adapters.errors import (
    InvalidCombination,
    InvalidInput,
    MissingField,
    OutOfRange,
    UnknownField,
    WrongShape,
    WrongType,
    shown,
)
from adapters.strict_json import parse

INPUT, OUTPUT = "inputs", "outputs"
"""The only tensors that a model has."""
HEADER_LENGTH = "Inference-Header-Content-Length"
ITEM_BYTES: Mapping[str, int] = {"FP32": 4, "FP64": 8, "FP16": 2, "BF16": 2}
"""The datatypes that an input may have."""
LONGEST_REMEMBERED = 1024
_REMEMBERED = 1024
_REQUEST = ("id", "model_name", "parameters", "inputs", "outputs")
_NOT_SERVED = ("classification", "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
"""Parameters that would change the answer, from extensions that are not here."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an infer request says: rows of a datatype, and how it wants the answer."""

    rows: int
    datatype: str
    binary_bytes: int | None
    """How many bytes of binary data follow the JSON; None where the numbers are in `data`."""
    data: list[object] | None
    binary_output: bool
    id: str | None
    model_name: str | None
    """The model as the body names it: some clients do, and then it must be the one in the path."""
    timeout_seconds: float | None


def read_header(text: bytes, *, columns: int, max_rows: int) -> Header:
    """The JSON part of a request; raises `NotJson` and every `InvalidInput`."""
    request = _object(parse(text, what="the JSON of the request"), "the request", _REQUEST)
    for field in ("id", "model_name"):
        if field in request and not isinstance(request[field], str):
            raise _wrong(field, request[field], "a string")
    parameters = _parameters(request, "parameters")
    given = _only_input(request)
    rows, datatype = _rows(given["shape"], columns, max_rows), _datatype(given["datatype"])
    size = _binary_size(given, rows, columns, datatype)
    data = given.get("data")
    if size is None and not isinstance(data, list):
        raise _wrong("inputs.data", data, "a list of numbers, flat or nested")
    return Header(
        rows=rows,
        datatype=datatype,
        binary_bytes=size,
        data=data if isinstance(data, list) else None,
        binary_output=_wants_binary(request, default=_flag(parameters, "parameters", "binary_data_output") or False),
        id=request.get("id"),  # type: ignore[arg-type]  # a string: checked above
        model_name=request.get("model_name"),  # type: ignore[arg-type]  # the same
        timeout_seconds=_timeout(parameters),
    )


@lru_cache(maxsize=_REMEMBERED)
def read_header_again(text: bytes, columns: int, max_rows: int) -> Header:
    """As `read_header`, remembered: a client that sends its numbers as bytes sends the same few headers."""
    return read_header(text, columns=columns, max_rows=max_rows)


def _only_input(request: Mapping[str, object]) -> dict[str, object]:
    inputs = _required(request, "inputs", "one tensor called inputs")
    if not isinstance(inputs, list):
        raise _wrong("inputs", inputs, "a list of one tensor")
    for tensor in inputs:
        name = _required(_object(tensor, "inputs"), "name", "the name inputs", within="inputs.")
        if name != INPUT:
            raise UnknownField(
                f"there is no input {shown(name)}; the model has one, called {INPUT}",
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
    tensor = _object(inputs[0], "inputs", ("name", "shape", "datatype", "parameters", "data"))
    for field, expected in (("shape", "[rows, columns]"), ("datatype", "FP32, FP64, FP16 or BF16")):
        _required(tensor, field, expected, within="inputs.")
    return tensor


def _rows(shape: object, columns: int, max_rows: int) -> int:
    expected = f"[rows, {columns}]"
    # Booleans are ints to Python. Nothing is multiplied before each number is known to be small.
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise _wrong("inputs.shape", shape, f"a list of whole numbers, {expected}")
    if len(shape) != 2 or shape[1] != columns or shape[0] < 1:
        raise WrongShape(
            f"inputs.shape is {shown(shape)}, expected {expected} with at least 1 row",
            field="inputs.shape",
            given=shape,
            expected=expected,
        )
    rows: int = shape[0]
    if rows > max_rows:
        raise OutOfRange(
            f"inputs.shape has {shown(rows)} rows; at most {max_rows} fit in one request",
            field="inputs.shape",
            given=rows,
            expected=f"at most {max_rows} rows",
        )
    return rows


def _datatype(given: object) -> str:
    if not isinstance(given, str):
        raise _wrong("inputs.datatype", given, "a string")
    if given not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        raise OutOfRange(
            f"inputs.datatype is {shown(given)}; the model takes {known}",
            field="inputs.datatype",
            given=given,
            expected=f"one of {known}",
        )
    return given


def _binary_size(tensor: Mapping[str, object], rows: int, columns: int, datatype: str) -> int | None:
    parameters = _parameters(tensor, "inputs.parameters")
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
        raise _wrong("inputs.parameters.binary_data_size", size, "a whole number of bytes")
    if size != wanted:
        raise WrongShape(
            f"binary_data_size is {shown(size)}; shape [{rows}, {columns}] of {datatype} takes {wanted} bytes",
            field="inputs.parameters.binary_data_size",
            given=size,
            expected=f"{wanted} bytes",
        )
    return wanted


def _wants_binary(request: Mapping[str, object], *, default: bool) -> bool:
    outputs = request.get("outputs", [])
    if not isinstance(outputs, list):
        raise _wrong("outputs", outputs, "a list of outputs to answer with")
    chosen: bool | None = None
    for output in outputs:
        name = _required(_object(output, "outputs", ("name", "parameters")), "name", OUTPUT, within="outputs.")
        if name != OUTPUT:
            raise UnknownField(
                f"there is no output {shown(name)}; the model has one, called {OUTPUT}",
                field="outputs.name",
                given=name,
                expected=OUTPUT,
            )
        parameters = _parameters(output, "outputs.parameters")
        _refuse_extensions(parameters, "outputs.parameters")
        chosen = _flag(parameters, "outputs.parameters", "binary_data")
    if len(outputs) > 1:
        raise InvalidCombination(f"the output {OUTPUT} is asked for twice", field="outputs", expected="each once")
    return default if chosen is None else chosen


def _timeout(parameters: Mapping[str, object]) -> float | None:
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or not 0 <= timeout < 2**63:
        raise _wrong("parameters.timeout", timeout, "a whole number of microseconds, 0 for none")
    return timeout / 1e6 if timeout else None


def _parameters(holder: Mapping[str, object], field: str) -> dict[str, object]:
    """An object of strings, numbers and booleans; which ones is free, by the protocol."""
    parameters = _object(holder.get("parameters", {}), field)
    for key, value in parameters.items():
        if not isinstance(value, str | int | float):
            raise _wrong(f"{field}.{key}", value, "a string, a number or a boolean")
    return parameters


def _flag(parameters: Mapping[str, object], within: str, key: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(f"{within}.{key}", value, "true or false")
    return value


def _refuse_extensions(parameters: Mapping[str, object], field: str) -> None:
    for key in _NOT_SERVED:
        if key in parameters:
            raise InvalidInput(
                f"{field}.{key} is of an extension that this service does not have",
                field=f"{field}.{key}",
                expected="binary_tensor_data alone",
            )


def _object(value: object, field: str, known: tuple[str, ...] | None = None) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong(field, value, "an object")
    for key in value:
        if known is not None and key not in known:
            raise UnknownField(
                f"{shown(key)} is not a field of {field}; the fields are {', '.join(known)}",
                field=key,
                given=key,
                expected=f"one of {', '.join(known)}",
            )
    return value


def _required(holder: Mapping[str, object], field: str, expected: str, *, within: str = "") -> object:
    if field not in holder:
        raise MissingField(f"{within}{field} is missing", field=f"{within}{field}", expected=expected)
    return holder[field]


def _wrong(field: str, given: object, expected: str) -> WrongType:
    return WrongType(f"{shown(field)} must be {expected}", field=field, given=given, expected=expected)
