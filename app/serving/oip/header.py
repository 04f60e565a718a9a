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
    shorten,
)
from adapters.strict_json import parse
from app.serving.oip.fields import flag, object_of, parameters_of, required, wrong

WHAT = "the JSON of the request"
INPUT, OUTPUT = "inputs", "outputs"
"""The only tensors that a model has."""
HEADER_LENGTH = "Inference-Header-Content-Length"
ITEM_BYTES: Mapping[str, int] = {"FP32": 4, "FP64": 8, "FP16": 2, "BF16": 2}
"""The datatypes that an input may have."""
LONGEST_REMEMBERED = 1024
_REMEMBERED = 1024
_MOST_CLASSES = 2**32
"""Triton reads 32 bits. More than there are is all of them, as there."""
_REQUEST = ("id", "model_name", "parameters", "inputs", "outputs")
_NOT_SERVED = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
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
    classes: int | None = None
    """So many of the classes with the largest outputs, instead of the outputs."""
    plain: bool = True
    """Whether there is neither a time-out nor a wish for classes."""


def read_header(text: bytes, *, columns: int, max_rows: int) -> Header:
    """The JSON part of a request; raises `NotJson` and every `InvalidInput`."""
    return header_of(parse(text, what=WHAT), columns=columns, max_rows=max_rows)


def header_of(value: object, *, columns: int, max_rows: int) -> Header:
    """Do the same for what the JSON says."""
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
    return Header(
        rows=rows,
        datatype=datatype,
        binary_bytes=size,
        data=data if isinstance(data, list) else None,
        binary_output=binary_output,
        id=request.get("id"),  # type: ignore[arg-type]  # a string: checked above
        model_name=request.get("model_name"),  # type: ignore[arg-type]  # the same
        timeout_seconds=timeout,
        classes=classes,
        plain=timeout is None and classes is None,
    )


@lru_cache(maxsize=_REMEMBERED)
def read_header_again(text: bytes, columns: int, max_rows: int) -> Header:
    """As `read_header`, remembered: a client that sends its numbers as bytes sends the same few headers."""
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
    """The parameters of the output, empty where the request does not name it."""
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
