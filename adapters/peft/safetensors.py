"""Reader of safetensors files from clients. Every limit is checked before the tensors are read.

The format is 8 bytes of header length, a JSON header of names, dtypes, shapes and offsets, and the tensors. The library
checks that these agree. This module checks the limits that are stricter than the library's.
"""

from collections.abc import Mapping
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from adapters.errors import InvalidSafetensors, LoraplexError, NotFinite, OutOfRange
from adapters.strict_json import parse

# Most bytes of a header. The library allows 100 MB; three tensors need a few hundred bytes.
MAX_HEADER_BYTES = 64 * 1024

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_safetensors(file: bytes, *, what: str) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """Return the tensors by name, and the metadata. Tensors are finite float32, float16 or bfloat16, and not empty.

    `what` is the name of the file in errors. Raises `InvalidSafetensors`, `NotFinite` or `OutOfRange` with the tensor.
    """
    metadata = _check_header(file, what)
    try:
        tensors = load_tensors(file)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidSafetensors(f"{what}: {error}", field=what) from None
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    return tensors, metadata


def _check_header(file: bytes, what: str) -> Mapping[str, object]:
    """Check the header against the limits, and return its metadata."""
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or length > len(file) - 8:
        raise InvalidSafetensors(
            f"{what} is not a safetensors file: its {len(file)} bytes are fewer than its header needs", field=what
        )
    if length > MAX_HEADER_BYTES:
        raise InvalidSafetensors(
            f"{what} has a header of {length} bytes",
            field=what,
            given=f"{length} bytes",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
        )
    try:
        header = parse(file[8 : 8 + length], what="the header")
    except LoraplexError as error:
        raise InvalidSafetensors(f"{what}: {error.detail}", field=what) from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
        raise InvalidSafetensors(f"{what}: the header is not an object of tensors", field=what)
    return cast("dict[str, object]", header.get("__metadata__") or {})


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise InvalidSafetensors(
            f"{name} is {tensor.dtype}", field=name, given=str(tensor.dtype), expected="float32, float16 or bfloat16"
        )
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        position = torch.nonzero(~finite)[0].tolist()
        row = position[0] if position else None
        raise NotFinite(f"{name} is not finite at {position}", field=name, row=row, expected="finite numbers")
    if 0 in tensor.shape:
        raise OutOfRange(
            f"{name} has shape {tuple(tensor.shape)}",
            field=name,
            given=str(tuple(tensor.shape)),
            expected="a rank of at least 1",
        )
