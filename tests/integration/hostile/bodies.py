"""Bodies byte by byte: what no well-behaved client would write."""

import json
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

JSON, ZIP, MULTIPART = "application/json", "application/zip", "multipart/form-data; boundary=frontier"
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
IN, OUT = 10, 2
"""The layer that the cases are sent to."""
ROW = [0.5, -1.0, 2.0, 0.25, 1.0, 3.0, -0.5, 0.0, 1.5, 1.0]
A_NAME, B_NAME, BIAS_NAME = (
    f"base_model.model.linear.{kind}" for kind in ("lora_B.weight", "lora_A.weight", "lora_B.bias")
)
"""What PEFT calls A (out, r), B (r, in) and bias (out) of a module `linear`."""


@dataclass(frozen=True)
class Raw:
    """JSON text that the standard library would not write, such as `1e400`."""

    text: str


class _LeftOut:
    """A field that is not there at all."""


LEFT_OUT = _LeftOut()
TEN_THOUSAND_DIGITS = Raw("1" + "0" * 9_999)
NOT_FINITE: dict[str, Any] = {
    "NaN": Raw("NaN"),
    "Infinity": Raw("Infinity"),
    "-Infinity": Raw("-Infinity"),
    "1e400": Raw("1e400"),
    "-1e400": Raw("-1e400"),
    "1e39": Raw("1e39"),
    "10^39": 10**39,
    "10^350": 10**350,
    "10^400": 10**400,
    "an integer of 10,000 digits": TEN_THOUSAND_DIGITS,
}
"""Numbers that float32 does not hold."""
NOT_NUMBERS: dict[str, Any] = {
    "a string": "1",
    "an empty string": "",
    "the string NaN": "NaN",
    "true": True,
    "false": False,
    "an object": {"1": 1},
    "a list": [1.0],
}


def to_json(value: object) -> bytes:
    """UTF-8 JSON with each `Raw` as it stands, and without what is `LEFT_OUT`."""

    def known(value: object) -> object:
        if isinstance(value, Raw):
            return f"@@{value.text}@@"
        if isinstance(value, dict):
            return {key: known(item) for key, item in value.items() if item is not LEFT_OUT}
        return [known(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(known(value))
    return re.sub(r'"@@((?:[^"\\]|\\.)*)@@"', lambda found: json.loads(f'"{found[1]}"'), text).encode()


def with_number(rows: int, row: int, column: int, number: object) -> list[list[Any]]:
    """Good rows, but for one number."""
    matrix: list[list[Any]] = [list(ROW) for _ in range(rows)]
    matrix[row][column] = number
    return matrix


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors file has it."""

    dtype: str
    shape: Sequence[int]
    content: bytes


def ones(*shape: int, dtype: str = "F32") -> Stored:
    """A tensor of ones."""
    bytes_of_one = {"F32": b"\0\0\x80\x3f", "F16": b"\0\x3c", "BF16": b"\x80\x3f"}[dtype]
    return Stored(dtype, shape, bytes_of_one * int(np.prod(shape)))


def safetensors(header: Mapping[str, Any] | bytes, content: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, saying that it is `length` bytes long."""
    text = header if isinstance(header, bytes) else to_json(dict(header))
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def tensor_file(tensors: Mapping[str, Stored], *, metadata: object = LEFT_OUT) -> bytes:
    """An honest file of these tensors."""
    header: dict[str, Any] = {"__metadata__": metadata}
    content = b""
    for name, tensor in tensors.items():
        begin, content = len(content), content + tensor.content
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, len(content)]}
    return safetensors(header, content)


def factors(**changes: Any) -> bytes:
    """The file of a good adapter of rank 1, with changes to its tensors `a`, `b`, `bias` and more by name."""
    own: dict[str, Any] = {"a": ones(OUT, 1), "b": ones(1, IN), "bias": LEFT_OUT, "more": {}} | changes
    named = {A_NAME: own["a"], B_NAME: own["b"], BIAS_NAME: own["bias"]} | own["more"]
    return tensor_file({name: tensor for name, tensor in named.items() if tensor is not LEFT_OUT})


def config(**changes: Any) -> bytes:
    """The config of that adapter, with changes to its keys."""
    own: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["linear"]}
    return to_json(own | changes)


GOOD_FILES: dict[str, bytes] = {CONFIG_FILE: config(), TENSOR_FILE: factors()}


def zip_of(files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of these files; a name may be there twice."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice, as some cases want it
        for name, content in files.items() if isinstance(files, Mapping) else files:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return buffer.getvalue()


def part(content: bytes, *, filename: str | None, field: str = "file") -> bytes:
    """One part of a multipart body; without a file name it is a plain field."""
    named = f'; filename="{filename}"' if filename is not None else ""
    return f'--frontier\r\nContent-Disposition: form-data; name="{field}"{named}\r\n\r\n'.encode() + content + b"\r\n"


def multipart(*parts: bytes) -> bytes:
    """A body of these parts."""
    return b"".join(parts) + b"--frontier--\r\n"


def multipart_of(files: Mapping[str, bytes]) -> bytes:
    """A body of these files."""
    return multipart(*(part(content, filename=name) for name, content in files.items()))
