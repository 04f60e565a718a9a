"""LoRA adapter: factors, scaling, and the canonical bytes that it is stored and compared as."""

# I in_features · O out_features · R rank
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from struct import Struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.arrays import is_finite
from adapters.errors import BlobCorrupt, NotFinite, OutOfRange, RankTooLarge, WrongShape
from adapters.lora.base_layer import BaseLayer

FORMAT = 1
MAX_ALPHA = 1e6
_METADATA_KEY = "loraplex"
# Most numbers in one stack of factors: 32 MiB as float64.
_STACK_NUMBERS = 2**22
# Record for `adapters.lora.kernel`: addresses of Aᵀ (R, O), B (R, I) and bias (O) or 0, contiguous float32; R; s.
RECORD = Struct("<qqqqd")


def digest_of(content: bytes | bytearray) -> str:
    """Return `sha256:` and the 64 hex digits of the SHA-256 of the content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def scaling_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return s = alpha / r (Hu et al. 2021, section 4.1), or alpha / √r (rsLoRA, Kalajdzievski 2023, theorem 3.2)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank update of the base layer: `y = x·Wᵀ + b + s·((x·Bᵀ)·Aᵀ + bias)`, so `ΔW = s·A·B`.

    a_OR: (O, R), b_RI: (R, I), bias_O: (O,) or None. They are contiguous float32 on the CPU, or in the form that `to`
    returns. Alpha is finite, with |alpha| ≤ 1e6.
    """

    a_OR: Tensor
    b_RI: Tensor
    bias_O: Tensor | None
    alpha: float
    rslora: bool = False
    feature_space: str | None = None
    labels: tuple[str | int, ...] | None = None
    """Labels of the classes, one for each of the first outputs."""

    @cached_property
    def rank(self) -> int:
        """Return R, which is at least 1 and may exceed min(O, I)."""
        return self.b_RI.shape[0]

    @property
    def scaling(self) -> float:
        """Return s, the factor of the low-rank term."""
        return scaling_of(self.alpha, self.rank, rslora=self.rslora)

    @property
    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.a_OR, self.b_RI, self.bias_O) if tensor is not None]

    @cached_property
    def memory_bytes(self) -> int:
        """Return the bytes of the factors in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)

    @cached_property
    def canonical_bytes(self) -> bytes:
        """Return the safetensors file of this adapter. Equal adapters have equal bytes.

        One metadata entry holds everything, apart from the tensors, that changes an answer or its meaning.
        """
        metadata: dict[str, object] = {"alpha": float(self.alpha), "format": FORMAT, "rslora": self.rslora}
        if self.feature_space is not None:
            metadata["feature_space"] = self.feature_space
        if self.labels is not None:
            metadata["labels"] = list(self.labels)
        tensors = self._tensors
        _check_float32(tensors)
        text = json.dumps(metadata, separators=(",", ":"), sort_keys=True)
        # Not with `safetensors.save`, which takes a tenth of the time in which a fleet trains an adapter.
        head = _header(text, tuple(tuple(tensor.shape) for tensor in tensors))
        return b"".join([head, *(tensor.numpy().tobytes() for tensor in tensors)])

    @cached_property
    def digest(self) -> str:
        """Return `sha256:` + hex of the canonical bytes."""
        return digest_of(self.canonical_bytes)

    @cached_property
    def record(self) -> bytes:
        """Return the adapter's record for the kernel. It holds addresses: keep the adapter alive while it is used."""
        a_RO, b_RI, bias_O = self._contiguous
        bias = 0 if bias_O is None else bias_O.data_ptr()
        return RECORD.pack(a_RO.data_ptr(), b_RI.data_ptr(), bias, self.rank, self.scaling)

    @cached_property
    def _contiguous(self) -> tuple[Tensor, Tensor, Tensor | None]:
        # After `to`, these are the factors themselves. The kernel reads them by address and cannot check their dtype.
        tensors = self.a_OR.T, self.b_RI, self.bias_O
        _check_float32(tensor for tensor in tensors if tensor is not None)
        a_RO, b_RI, bias_O = (None if tensor is None else tensor.contiguous() for tensor in tensors)
        assert a_RO is not None
        assert b_RI is not None
        return a_RO, b_RI, bias_O

    def to(self, base: BaseLayer) -> "Adapter":
        """Return this adapter on the base's device and in its dtype, in the memory layout of the forward.

        A is transposed in memory, so that each column of A is contiguous.
        """
        if base.weight_OI.device.type == "cpu":
            # With numpy, because torch's calls release the interpreter lock and may then wait for it.
            a_OR = torch.from_numpy(np.ascontiguousarray(self.a_OR.numpy().T)).T
            return replace(self, a_OR=a_OR)
        a_OR, b_RI = self.a_OR.to(base.weight_OI).T.contiguous().T, self.b_RI.to(base.weight_OI)
        bias_O = None if self.bias_O is None else self.bias_O.to(base.weight_OI)
        return replace(self, a_OR=a_OR, b_RI=b_RI, bias_O=bias_O)


def _check_float32(tensors: Iterable[Tensor]) -> None:
    """Raise `TypeError` for another dtype. It is a check of memory safety: the bytes are read as float32."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32:
            raise TypeError(f"the factors of an adapter must be float32, not {tensor.dtype}")


def delta_norms(adapters: Sequence[Adapter]) -> list[float]:
    """Return ‖ΔW‖_F of each adapter, computed together for adapters of one shape.

    ΔW is not formed: A = Q₁R₁ and Bᵀ = Q₂R₂ give ‖A·B‖ = ‖R₁·R₂ᵀ‖, in float64.
    """
    indices_by_shape: dict[tuple[int, int, int], list[int]] = {}
    for index, adapter in enumerate(adapters):
        indices_by_shape.setdefault((*adapter.a_OR.shape, adapter.b_RI.shape[1]), []).append(index)
    norms = [0.0] * len(adapters)
    for (O, R, I), indices in indices_by_shape.items():
        stack_size = max(1, _STACK_NUMBERS // ((O + I) * R))
        for begin in range(0, len(indices), stack_size):
            stack = indices[begin : begin + stack_size]
            r1 = torch.linalg.qr(torch.stack([adapters[index].a_OR for index in stack]).double(), mode="r").R
            r2 = torch.linalg.qr(torch.stack([adapters[index].b_RI.T for index in stack]).double(), mode="r").R
            for index, norm in zip(stack, torch.linalg.matrix_norm(r1 @ r2.mT).tolist(), strict=True):
                norms[index] = abs(adapters[index].scaling) * norm
    return norms


@lru_cache(maxsize=1024)
def _header(metadata: str, shapes: Sequence[Sequence[int]]) -> bytes:
    """Return the header of a safetensors file of A, B and maybe bias (README of safetensors, "Format").

    It is the length of a JSON object, and that object, padded with spaces to a multiple of 8 bytes.
    """
    entries: dict[str, object] = {"__metadata__": {_METADATA_KEY: metadata}}
    begin = 0
    for name, shape in zip(("A", "B", "bias"), shapes, strict=False):
        end = begin + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# Cached, because versions of one rank and alpha have the same header, and a cold adapter is loaded while requests wait.
@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return our metadata, and the header's entry of each tensor by name."""
    entries = json.loads(header)
    return json.loads(entries.pop("__metadata__")[_METADATA_KEY]), entries


def from_canonical_bytes(content: bytes | bytearray) -> Adapter:
    """Return the adapter of canonical bytes; raise `BlobCorrupt` if they are malformed."""
    try:
        begin = 8 + int.from_bytes(content[:8], "little")
        metadata, entries = _parse_header(bytes(content[8:begin]))
        tensors = {}
        for name, entry in entries.items():
            shape, offset = entry["shape"], begin + entry["data_offsets"][0]
            flat = np.frombuffer(content, dtype="<f4", count=math.prod(shape), offset=offset)
            tensors[name] = torch.from_numpy(flat.reshape(shape).copy())
        labels = metadata.get("labels")
        return Adapter(
            tensors["A"],
            tensors["B"],
            tensors.get("bias"),
            metadata["alpha"],
            metadata["rslora"],
            metadata.get("feature_space"),
            None if labels is None else tuple(labels),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BlobCorrupt(f"a stored adapter cannot be read: {error}") from None


def check_alpha(alpha: float, *, field: str = "alpha") -> float:
    """Return alpha as a float; raise `NotFinite`, or `OutOfRange` beyond ±1e6."""
    if not is_finite(alpha):
        raise NotFinite(f"{field} is not finite", field=field, given=alpha, expected="a finite number")
    if abs(alpha) > MAX_ALPHA:
        expected = f"a number from -{MAX_ALPHA:g} to {MAX_ALPHA:g}"
        raise OutOfRange(f"{field} is out of range", field=field, given=alpha, expected=expected)
    return float(alpha)


def check_factors(
    a_OR: Tensor, b_RI: Tensor, bias_O: Tensor | None, base: BaseLayer, *, max_rank: int, names: tuple[str, str, str]
) -> None:
    """Raise `WrongShape` or `RankTooLarge` if the factors do not fit each other and the base.

    `names` are the caller's names for A, B and bias. If swapping A and B would fix the shapes, the message says so.
    """
    a_name, b_name, bias_name = names
    O, I = base.out_features, base.in_features
    a_shape, b_shape = tuple(a_OR.shape), tuple(b_RI.shape)
    if len(a_shape) != 2 or a_shape[0] != O:
        name, shape, expected = a_name, a_shape, f"({O}, r)"
    elif b_shape != (a_shape[1], I):
        name, shape, expected = b_name, b_shape, f"({a_shape[1]}, {I})"
    elif bias_O is not None and tuple(bias_O.shape) != (O,):
        name, shape, expected = bias_name, tuple(bias_O.shape), f"({O},)"
    elif b_shape[0] > max_rank:
        detail = f"{b_name} has rank {b_shape[0]}, at most {max_rank} is accepted"
        raise RankTooLarge(detail, field=b_name, given=b_shape[0], expected=f"a rank of at most {max_rank}")
    else:
        return
    is_swapped = len(a_shape) == len(b_shape) == 2 and b_shape == (O, a_shape[0]) and a_shape[1] == I
    hint = f"; {a_name} and {b_name} look swapped: exchange them" if is_swapped else ""
    raise WrongShape(
        f"{name} has shape {shape}, expected {expected}: for this base layer {a_name} is ({O}, r) and "
        f"{b_name} is (r, {I}){hint}",
        field=name,
        given=str(shape),
        expected=expected,
    )
