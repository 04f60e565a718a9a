"""Base layer: the frozen linear layer that every adapter modifies."""

# I in_features · O out_features
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters import strict_json
from adapters.errors import BaseNotLoadable, LoraplexError
from adapters.lora.labels import Labels, check_labels

# Source name of the classifier in this package: 8×8 digits, 64 → 10.
BUNDLED = "digits"
BUNDLED_FILE = Path(__file__).parents[1] / "bundled" / "digits.safetensors"

_STORED_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_GENERATED = re.compile(r"(random|identity|zeros):([0-9,]+)")
_MAX_FEATURES = 2**20


@dataclass(frozen=True, eq=False)
class BaseLayer:
    """Frozen linear layer `y = x·Wᵀ + b`.

    weight_OI: (O, I), bias_O: (O,) or None, both on `device`. `dtype` is their type in memory. `fingerprint` is of the
    tensors as they are in the file.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    source: str
    fingerprint: str
    weight_norm: float
    labels: Labels | None = None
    """Labels of the first outputs, which are no part of the fingerprint."""

    @cached_property
    def in_features(self) -> int:
        """Return I, the width of an input row."""
        return self.weight_OI.shape[1]

    @cached_property
    def out_features(self) -> int:
        """Return O, the width of an output row."""
        return self.weight_OI.shape[0]

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return the outputs for (N, I) as a new tensor, (N, O). There is no GEMM if W is the identity or zero."""
        if self.source.startswith("identity:"):
            return x_NI.clone()
        if self.source.startswith("zeros:"):
            return x_NI.new_zeros(len(x_NI), self.out_features)
        return torch.nn.functional.linear(x_NI, self.weight_OI, self.bias_O)

    @cached_property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.weight_OI.device

    @property
    def dtype(self) -> str:
        """Return the dtype of W and b in memory: float32 or bfloat16."""
        return _STORED_DTYPES[self.weight_OI.dtype]


def load_base_layer(
    source: str,
    *,
    weight_key: str = "weight",
    bias_key: str = "bias",
    labels: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> BaseLayer:
    """Load the layer that `source` names: `digits`, a safetensors path, or a generated layer.

    `random:IN,OUT,SEED` is `torch.manual_seed(SEED); torch.randn(OUT, IN)` with a zero bias; `identity:DIM`
    and `zeros:IN,OUT` have no bias. labels: a JSON list or the path of one, in place of the entry `labels` in the
    file's metadata. Raises `BaseNotLoadable` with the reason.
    """
    target = _choose_device(device)
    # bfloat16 is five times slower than float32 on a CPU, and less exact.
    memory_dtype = getattr(torch, dtype) if target.type == "cuda" else torch.float32
    recorded = None
    try:
        if generated := _GENERATED.fullmatch(source):
            weight, bias = _generate(source, generated[1], generated[2])
        else:
            path = BUNDLED_FILE if source == BUNDLED else Path(source)
            weight, bias, recorded = _read_file(path, weight_key, bias_key)
        _check_tensors(source, weight, bias)
        weight_OI = weight.to(target, memory_dtype)
        bias_O = None if bias is None else bias.to(target, memory_dtype)
    except RuntimeError as error:
        # The device does not exist, or has too little memory.
        raise BaseNotLoadable(f"base {source!r} cannot be loaded onto {device}: {error}") from None
    return BaseLayer(
        weight_OI,
        bias_O,
        source,
        fingerprint=_fingerprint(weight, bias),
        weight_norm=float(torch.linalg.vector_norm(weight.double())),
        labels=_read_labels(source, setting=labels, recorded=recorded, outputs=len(weight)),
    )


def _choose_device(device: str) -> torch.device:
    has_cuda = device != "cpu" and torch.cuda.is_available()
    try:
        target = torch.device(device if device != "auto" else "cuda" if has_cuda else "cpu")
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cpu", "cuda"):
        raise BaseNotLoadable(f"{device!r} is not a device: use auto, cpu, cuda or cuda:N")
    if target.type == "cuda" and not has_cuda:
        raise BaseNotLoadable(f"device {device!r} was requested, and no CUDA device is available")
    return target


def _generate(source: str, kind: str, numbers: str) -> tuple[Tensor, Tensor | None]:
    forms = {"random": "random:IN,OUT,SEED", "identity": "identity:DIM", "zeros": "zeros:IN,OUT"}
    parts = [int(part) if part and len(part) < 20 else -1 for part in numbers.split(",")]
    sizes = parts[:2] if kind != "identity" else parts
    if len(parts) != forms[kind].count(",") + 1 or not all(0 < size <= _MAX_FEATURES for size in sizes):
        raise BaseNotLoadable(f"base {source!r} is not of the form {forms[kind]}, sizes from 1 to {_MAX_FEATURES}")
    if kind == "identity":
        return torch.eye(parts[0]), None
    if kind == "zeros":
        return torch.zeros(parts[1], parts[0]), None
    if not 0 <= parts[2] < 2**63:
        raise BaseNotLoadable(f"base {source!r}: the seed must be from 0 to 2^63 - 1")
    generator = torch.Generator().manual_seed(parts[2])
    return torch.randn(parts[1], parts[0], generator=generator), torch.zeros(parts[1])


def _read_file(path: Path, weight_key: str, bias_key: str) -> tuple[Tensor, Tensor | None, str | None]:
    """Return the weight, the bias, and the entry `labels` of the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if weight_key not in names:
                present = ", ".join(sorted(names)[:10]) or "none"
                raise BaseNotLoadable(f"{path} has no tensor {weight_key!r}; it has: {present}")
            # Cloned, because the file is mapped: a program that overwrites it must not change the layer.
            weight = file.get_tensor(weight_key).clone()
            bias = file.get_tensor(bias_key).clone() if bias_key in names else None
            recorded = (file.metadata() or {}).get("labels")
    except (OSError, SafetensorError) as error:
        raise BaseNotLoadable(f"the base layer {str(path)!r} cannot be read: {error}") from None
    return weight, bias, recorded


def _read_labels(source: str, *, setting: str | None, recorded: str | None, outputs: int) -> Labels | None:
    """Return the labels of the setting, otherwise those in the metadata, otherwise None."""
    origin, text = f"the labels in the metadata of {source}", recorded
    if setting is not None:
        is_list = setting.lstrip().startswith("[")
        origin = "the labels of the base layer" if is_list else f"the labels of the base layer, {setting},"
        try:
            text = setting if is_list else Path(setting).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BaseNotLoadable(f"{origin} cannot be read: {error}") from None
    if text is None:
        return None
    try:
        value = strict_json.parse(text.encode(errors="surrogateescape"), what=origin)
        return check_labels(value, field=origin, outputs=outputs)
    except LoraplexError as error:
        raise BaseNotLoadable(f"{error.detail}; expected {error.expected}") from None


def _check_tensors(source: str, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in _STORED_DTYPES:
            raise BaseNotLoadable(f"{source}: the {name} is {tensor.dtype}; float32, float16 or bfloat16 is needed")
        if not torch.isfinite(tensor).all():
            raise BaseNotLoadable(f"{source}: the {name} has numbers that are not finite")
    if weight.ndim != 2 or 0 in weight.shape:
        raise BaseNotLoadable(f"{source}: the weight has shape {tuple(weight.shape)}, expected (out, in)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise BaseNotLoadable(f"{source}: the bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def _fingerprint(weight: Tensor, bias: Tensor | None) -> str:
    """Return `sha256:` + hex over dtype, shape and bytes of both as stored. No bias differs from a zero bias."""
    digest = hashlib.sha256()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        head = json.dumps([name, _STORED_DTYPES[tensor.dtype], list(tensor.shape)], separators=(",", ":"))
        digest.update(head.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
