"""Import and export of PEFT's weight files. Only this package uses PEFT's names.

PEFT's names of the factors are swapped: `lora_B` is A (out, r), `lora_A` is B (r, in), and `lora_B.bias` is bias (out).
"""

# I in_features · O out_features · R rank
import json
import re
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from adapters.errors import (
    BaseMismatch,
    FeatureSpaceMismatch,
    InvalidName,
    InvalidSafetensors,
    LoraplexError,
    MissingField,
    NotFinite,
    OutOfRange,
    PeftUnsupported,
    WrongShape,
)
from adapters.lora.adapter import Adapter, check_factors
from adapters.lora.base_layer import BaseLayer
from adapters.lora.labels import check_labels
from adapters.peft.config import CONFIG_FILE, read_config
from adapters.strict_json import parse

TENSOR_FILE = "adapter_model.safetensors"
DEFAULT_MODULE = "linear"
# Most bytes of a safetensors header. The library allows 100 MB; three tensors need a few hundred bytes.
MAX_HEADER_BYTES = 64 * 1024

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<path>.+)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_B\.bias)", re.DOTALL)
_METADATA_KEY = "loraplex"
_BASE_KEY, _FEATURE_SPACE_KEY, _LABELS_KEY = "base", "feature_space", "labels"


def read_peft(
    config_text: bytes, tensor_file: bytes, *, base: BaseLayer, feature_space: str | None, max_rank: int
) -> tuple[Adapter, str]:
    """Return the adapter in PEFT's two files, and the path of its module.

    Labels come from loraplex's own metadata entry, which a download has. Raises `InvalidUpload` or a subclass for a
    malformed file, `PeftUnsupported` for a feature that cannot be served exactly, and `BaseMismatch` or
    `FeatureSpaceMismatch` if the metadata records another base or feature space.
    """
    config = read_config(config_text)
    named, recorded = _read_tensors(tensor_file)
    _check_made_for(recorded, base, feature_space)
    tensors, module = _select_module(named)
    rank, alpha = config.rank_of(module), config.alpha_of(module)
    a_OR, b_RI, bias_O = tensors["lora_B.weight"], tensors["lora_A.weight"], tensors.get("lora_B.bias")
    check_factors(a_OR, b_RI, bias_O, base, max_rank=max_rank, names=("lora_B.weight", "lora_A.weight", "lora_B.bias"))
    if rank != b_RI.shape[0]:
        detail = f"{CONFIG_FILE} says rank {rank} for {module!r}, the tensors have rank {b_RI.shape[0]}"
        raise WrongShape(detail, field="r", given=rank, expected=f"rank {b_RI.shape[0]}")
    has_bias = bias_O is not None
    if has_bias != config.has_bias:
        claim, presence = str(config.has_bias).lower(), "a" if has_bias else "no"
        detail = f"{CONFIG_FILE} says lora_bias {claim}, and {TENSOR_FILE} has {presence} lora_B.bias"
        raise WrongShape(detail, field="lora_bias", given=config.has_bias, expected=str(has_bias).lower())
    a_OR, b_RI = a_OR.float().contiguous(), b_RI.float().contiguous()
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    return Adapter(a_OR, b_RI, bias_O, alpha, config.rslora, feature_space, _read_labels(recorded, base)), module


def write_peft(adapter: Adapter, *, module: str, base_fingerprint: str) -> dict[str, bytes]:
    """Return the two files, by name, that `PeftModel.from_pretrained` loads onto a model with a linear layer `module`.

    Labels are left out if they do not fit in a header of 64 KiB.
    """
    path = f"{_PREFIX}{module}"
    tensors = {f"{path}.lora_B.weight": adapter.a_OR, f"{path}.lora_A.weight": adapter.b_RI}
    if adapter.bias_O is not None:
        tensors[f"{path}.lora_B.bias"] = adapter.bias_O
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": adapter.bias_O is not None,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": [module],
        "task_type": None,
        "use_rslora": adapter.rslora,
    }
    metadata: dict[str, object] = {_BASE_KEY: base_fingerprint, _FEATURE_SPACE_KEY: adapter.feature_space}
    with_labels = metadata if adapter.labels is None else metadata | {_LABELS_KEY: list(adapter.labels)}
    file = _save(tensors, with_labels)
    if int.from_bytes(file[:8], "little") > MAX_HEADER_BYTES:
        file = _save(tensors, metadata)
    return {TENSOR_FILE: file, CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n"}


def check_module(path: str, *, field: str = "module") -> str:
    """Return the path if it is a valid module path; raise `InvalidName` if not."""
    if len(path) > 256 or not _MODULE.fullmatch(path):
        rule = "names of A-Z a-z 0-9 _ - with dots between, at most 256 characters"
        raise InvalidName(f"{field} is not a path to a module: {rule}", field=field, given=path, expected=rule)
    return path


def _save(tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    # One metadata entry, because safetensors writes several in random order.
    return save_tensors(dict(tensors), metadata={_METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def _check_made_for(recorded: Mapping[str, object], base: BaseLayer, feature_space: str | None) -> None:
    fingerprint, space = recorded.get(_BASE_KEY), recorded.get(_FEATURE_SPACE_KEY)
    if fingerprint not in (None, base.fingerprint):
        detail = f"{TENSOR_FILE} was made for the base layer {fingerprint}, this service has {base.fingerprint}"
        raise BaseMismatch(detail, field=TENSOR_FILE, given=fingerprint, expected=base.fingerprint)
    if space not in (None, feature_space):
        detail = f"{TENSOR_FILE} is for the feature space {space!r}, this service has {feature_space!r}"
        raise FeatureSpaceMismatch(detail, field=TENSOR_FILE, given=space, expected=feature_space)


def _read_labels(recorded: Mapping[str, object], base: BaseLayer) -> tuple[str | int, ...] | None:
    labels = recorded.get(_LABELS_KEY)
    if labels is None:
        return None
    return check_labels(labels, field=f"{_LABELS_KEY} of {TENSOR_FILE}", outputs=base.out_features)


def _select_module(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the tensors by PEFT's names within their module, and the module's path."""
    tensors_by_kind: dict[str, Tensor] = {}
    modules: set[str] = set()
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            detail = f"{TENSOR_FILE} has the tensor {name[:80]!r}, which is no LoRA factor of a linear layer"
            expected = "…lora_A.weight, …lora_B.weight and perhaps …lora_B.bias"
            raise PeftUnsupported(detail, field=TENSOR_FILE, given=name, expected=expected)
        modules.add(match["path"])
        tensors_by_kind[match["kind"]] = tensor
    if len(modules) > 1:
        names = ", ".join(sorted(modules)[:5])
        detail = f"{TENSOR_FILE} adapts several modules: {names}"
        raise PeftUnsupported(detail, field=TENSOR_FILE, given=names, expected="one module")
    for kind in ("lora_A.weight", "lora_B.weight"):
        if kind not in tensors_by_kind:
            raise MissingField(f"{TENSOR_FILE} has no {kind}", field=kind, expected=f"a tensor ….{kind}")
    module = modules.pop().removeprefix(_PREFIX)
    return tensors_by_kind, check_module(module, field=TENSOR_FILE)


def _read_tensors(file: bytes) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """Return the tensors of a safetensors file by name, and the content of loraplex's own metadata entry.

    Tensors are finite float32, float16 or bfloat16, and not empty. The library checks that the header agrees with the
    file; the limits here are stricter. Raises `InvalidSafetensors`, `NotFinite` or `OutOfRange` with the tensor.
    """
    entry = _header_metadata(file).get(_METADATA_KEY)
    try:
        tensors = load_tensors(file)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidSafetensors(f"{TENSOR_FILE}: {error}", field=TENSOR_FILE) from None
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    recorded = None if entry is None else _parse(str(entry).encode(), what="the metadata entry loraplex")
    return tensors, recorded if isinstance(recorded, dict) else {}


def _header_metadata(file: bytes) -> dict[str, object]:
    """Check the header against the limits, and return its metadata.

    A file is 8 bytes of header length, a JSON header of names, dtypes, shapes and offsets, and the tensors.
    """
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or length > len(file) - 8:
        detail = f"{TENSOR_FILE} is not a safetensors file: its {len(file)} bytes are fewer than its header needs"
        raise InvalidSafetensors(detail, field=TENSOR_FILE)
    if length > MAX_HEADER_BYTES:
        size, expected = f"{length} bytes", f"at most {MAX_HEADER_BYTES} bytes"
        detail = f"{TENSOR_FILE} has a header of {size}"
        raise InvalidSafetensors(detail, field=TENSOR_FILE, given=size, expected=expected)
    header = _parse(file[8 : 8 + length], what="the header")
    metadata = (header.get("__metadata__") or {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise InvalidSafetensors(f"{TENSOR_FILE}: the header is not an object of tensors", field=TENSOR_FILE)
    return metadata


def _parse(text: bytes, *, what: str) -> object:
    try:
        return parse(text, what=what)
    except LoraplexError as error:
        raise InvalidSafetensors(f"{TENSOR_FILE}: {error.detail}", field=TENSOR_FILE) from None


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        expected = "float32, float16 or bfloat16"
        raise InvalidSafetensors(f"{name} is {tensor.dtype}", field=name, given=str(tensor.dtype), expected=expected)
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        position = torch.nonzero(~finite)[0].tolist()
        row = position[0] if position else None
        raise NotFinite(f"{name} is not finite at {position}", field=name, row=row, expected="finite numbers")
    if 0 in tensor.shape:
        shape = str(tuple(tensor.shape))
        raise OutOfRange(f"{name} has shape {shape}", field=name, given=shape, expected="a rank of at least 1")
