"""One version of one adapter: its factors, and the bytes that they are stored and compared as."""

# I in_features · O out_features · R rank
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
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
_STACK_NUMBERS = 2**22
"""Numbers in one stack of factors: 32 MiB as float64."""
RECORD = Struct("<qqqqd")
"""For `adapters.lora.kernel`: addresses of Aᵀ (R, O), of B (R, I), of bias (O) or 0, each contiguous float32; R; s."""


def digest_of(content: bytes | bytearray) -> str:
    """`sha256:` and the 64 hex digits of `content`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def scaling_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """s = alpha / r (Hu et al. 2021, section 4.1), or alpha / √r (rsLoRA: Kalajdzievski 2023, theorem 3.2)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True, eq=False)
class Adapter:
    """`ΔW = s·A·B` and, where there is one, `s·bias`: `y = x·Wᵀ + b + s·((x·Bᵀ)·Aᵀ + bias)`.

    a_OR: (O, R), b_RI: (R, I), bias_O: (O,) or None: contiguous float32 on the CPU, or as `to` leaves
    them. Alpha is finite, |alpha| ≤ 1e6.
    """

    a_OR: Tensor
    b_RI: Tensor
    bias_O: Tensor | None
    alpha: float
    rslora: bool = False
    feature_space: str | None = None
    labels: tuple[str | int, ...] | None = None
    """What the classes are called, one for each of the first outputs."""

    @cached_property
    def rank(self) -> int:
        """R, at least 1; it may be above min(O, I)."""
        return self.b_RI.shape[0]

    @property
    def scaling(self) -> float:
        """s, the factor in front of the low-rank term."""
        return scaling_of(self.alpha, self.rank, rslora=self.rslora)

    @cached_property
    def memory_bytes(self) -> int:
        """What the factors take while they are resident."""
        tensors = [self.a_OR, self.b_RI] + ([] if self.bias_O is None else [self.bias_O])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @cached_property
    def canonical_bytes(self) -> bytes:
        """The safetensors file that this adapter is stored as: equal adapters have equal bytes.

        One metadata entry holds everything apart from the tensors that changes the answer or its meaning.
        """
        about: dict[str, object] = {"alpha": float(self.alpha), "format": FORMAT, "rslora": self.rslora}
        if self.feature_space is not None:
            about["feature_space"] = self.feature_space
        if self.labels is not None:
            about["labels"] = list(self.labels)
        tensors = [self.a_OR, self.b_RI] + ([] if self.bias_O is None else [self.bias_O])
        assert all(tensor.dtype is torch.float32 for tensor in tensors)
        text = json.dumps(about, separators=(",", ":"), sort_keys=True)
        # Not by safetensors' own `save`, which takes a tenth of the time that a fleet takes to train an adapter.
        head = _header(text, tuple(tuple(tensor.shape) for tensor in tensors))
        return b"".join([head, *(tensor.numpy().tobytes() for tensor in tensors)])

    @cached_property
    def digest(self) -> str:
        """`sha256:` + hex of the canonical bytes."""
        return digest_of(self.canonical_bytes)

    @cached_property
    def record(self) -> bytes:
        """What `adapters.lora.kernel` knows of this adapter, which stays alive for as long as that is used."""
        a_RO, b_RI, bias_O = self._contiguous
        bias = 0 if bias_O is None else bias_O.data_ptr()
        return RECORD.pack(a_RO.data_ptr(), b_RI.data_ptr(), bias, self.rank, self.scaling)

    @cached_property
    def _contiguous(self) -> tuple[Tensor, Tensor, Tensor | None]:
        # After `to` these are the factors themselves. Read by address: their dtype is looked at here or nowhere.
        tensors = self.a_OR.T, self.b_RI, self.bias_O
        assert all(tensor is None or tensor.dtype is torch.float32 for tensor in tensors)
        a_RO, b_RI, bias_O = (None if tensor is None else tensor.contiguous() for tensor in tensors)
        assert a_RO is not None
        assert b_RI is not None
        return a_RO, b_RI, bias_O

    def relative_norm(self, base: BaseLayer) -> float | None:
        """‖ΔW‖_F / ‖W‖_F; None where W is all zeros."""
        return None if base.weight_norm == 0 else delta_norms([self])[0] / base.weight_norm

    def to(self, base: BaseLayer) -> "Adapter":
        """This adapter on the base's device, in the dtype that the base is held in, as the forward walks it.

        A lies transposed in memory: a column of A is one stretch.
        """
        if base.weight_OI.device.type == "cpu":
            # By numpy: each of torch's calls would hand the interpreter to whoever waits for it.
            a_OR = torch.from_numpy(np.ascontiguousarray(self.a_OR.numpy().T)).T
            return replace(self, a_OR=a_OR)
        a_OR, b_RI = self.a_OR.to(base.weight_OI).T.contiguous().T, self.b_RI.to(base.weight_OI)
        bias_O = None if self.bias_O is None else self.bias_O.to(base.weight_OI)
        return replace(self, a_OR=a_OR, b_RI=b_RI, bias_O=bias_O)


def delta_norms(adapters: Sequence[Adapter]) -> list[float]:
    """‖ΔW‖_F of each, those of one shape together.

    From the factors alone: A = Q₁R₁ and Bᵀ = Q₂R₂ give ‖A·B‖ = ‖R₁·R₂ᵀ‖, in float64.
    """
    of_shape: dict[tuple[int, int, int], list[int]] = {}
    for place, adapter in enumerate(adapters):
        of_shape.setdefault((*adapter.a_OR.shape, adapter.b_RI.shape[1]), []).append(place)
    norms = [0.0] * len(adapters)
    for (O, R, I), places in of_shape.items():
        at_once = max(1, _STACK_NUMBERS // ((O + I) * R))
        for begin in range(0, len(places), at_once):
            some = places[begin : begin + at_once]
            r1 = torch.linalg.qr(torch.stack([adapters[place].a_OR for place in some]).double(), mode="r").R
            r2 = torch.linalg.qr(torch.stack([adapters[place].b_RI.T for place in some]).double(), mode="r").R
            for place, norm in zip(some, torch.linalg.matrix_norm(r1 @ r2.mT).tolist(), strict=True):
                norms[place] = abs(adapters[place].scaling) * norm
    return norms


@lru_cache(maxsize=1024)
def _header(about: str, shapes: Sequence[Sequence[int]]) -> bytes:
    """What a safetensors file of A, B and perhaps bias begins with (its README, "Format"): the length of a JSON
    object, and that object, filled up with spaces to whole 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {_METADATA_KEY: about}}
    begin = 0
    for name, shape in zip(("A", "B", "bias"), shapes, strict=False):
        end = begin + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class _CanonicalHeader:
    """What the header of canonical bytes says."""

    about: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, Sequence[int]]]
    """Where each begins after the header, and its shape."""


# The versions of one rank and alpha have the same header: a cold adapter need not wait for it to be parsed again.
@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> _CanonicalHeader:
    entries = json.loads(header)
    about = json.loads(entries.pop("__metadata__")[_METADATA_KEY])
    return _CanonicalHeader(
        about, {name: (entry["data_offsets"][0], entry["shape"]) for name, entry in entries.items()}
    )


def from_canonical_bytes(content: bytes | bytearray) -> Adapter:
    """The adapter that was stored as `content`; raises `BlobCorrupt` where it is not such a file."""
    try:
        begin = 8 + int.from_bytes(content[:8], "little")
        layout = _parse_header(bytes(content[8:begin]))
        tensors = {}
        for name, (offset, shape) in layout.tensors.items():
            flat = np.frombuffer(content, dtype="<f4", count=math.prod(shape), offset=begin + offset)
            tensors[name] = torch.from_numpy(flat.reshape(shape).copy())
        about = layout.about
        labels = about.get("labels")
        return Adapter(
            tensors["A"],
            tensors["B"],
            tensors.get("bias"),
            about["alpha"],
            about["rslora"],
            about.get("feature_space"),
            None if labels is None else tuple(labels),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BlobCorrupt(f"a stored adapter cannot be read: {error}") from None


def check_alpha(alpha: float, *, field: str = "alpha") -> float:
    """`alpha` as a float; raises `NotFinite` or `OutOfRange` past ±1e6."""
    if not is_finite(alpha):
        raise NotFinite(f"{field} is not finite", field=field, given=alpha, expected="a finite number")
    if abs(alpha) > MAX_ALPHA:
        raise OutOfRange(
            f"{field} is out of range",
            field=field,
            given=alpha,
            expected=f"a number from -{MAX_ALPHA:g} to {MAX_ALPHA:g}",
        )
    return float(alpha)


def check_factors(
    a_OR: Tensor,
    b_RI: Tensor,
    bias_O: Tensor | None,
    base: BaseLayer,
    *,
    max_rank: int,
    names: tuple[str, str, str],
) -> None:
    """That the factors fit each other and the base; raises `WrongShape` or `RankTooLarge`.

    `names` are what the caller calls A, B and bias. Where swapping A and B would cure the shapes, the message
    says so.
    """
    a_name, b_name, bias_name = names
    O, I = base.out_features, base.in_features
    a_shape, b_shape = tuple(a_OR.shape), tuple(b_RI.shape)
    fits = len(a_shape) == len(b_shape) == 2 and a_shape == (O, b_shape[0]) and b_shape[1] == I
    if not fits:
        swapped = len(a_shape) == len(b_shape) == 2 and b_shape == (O, a_shape[0]) and a_shape[1] == I
        hint = f"; {a_name} and {b_name} look swapped: exchange them" if swapped else ""
        culprit, shape, expected = (
            (a_name, a_shape, f"({O}, r)")
            if len(a_shape) != 2 or a_shape[0] != O
            else (b_name, b_shape, f"({a_shape[1]}, {I})")
        )
        raise WrongShape(
            f"{culprit} has shape {shape}, expected {expected}: for this base layer {a_name} is ({O}, r) and "
            f"{b_name} is (r, {I}){hint}",
            field=culprit,
            given=str(shape),
            expected=expected,
        )
    if b_shape[0] > max_rank:
        raise RankTooLarge(
            f"{b_name} has rank {b_shape[0]}, at most {max_rank} is accepted",
            field=b_name,
            given=b_shape[0],
            expected=f"a rank of at most {max_rank}",
        )
    if bias_O is not None and tuple(bias_O.shape) != (O,):
        raise WrongShape(
            f"{bias_name} has shape {tuple(bias_O.shape)}, expected ({O},)",
            field=bias_name,
            given=str(tuple(bias_O.shape)),
            expected=f"({O},)",
        )
