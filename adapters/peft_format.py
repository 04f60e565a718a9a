"""PEFT's files in and out. Only this module knows PEFT's names.

PEFT calls the factors the other way round: its `lora_B` is A (out, r), its `lora_A` is B (r, in), its
`lora_B.bias` is bias (out). Described by the files that PEFT 0.21 writes and by `LoraConfig`'s fields.
"""

# I in_features · O out_features · R rank
import json
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from adapters.adapter import Adapter, check_alpha, check_factors
from adapters.base_layer import BaseLayer
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
    WrongType,
)
from adapters.strict_json import parse

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
DEFAULT_MODULE = "linear"
MAX_HEADER_BYTES = 64 * 1024
"""safetensors itself allows 100 MB of header; three tensors need a few hundred bytes."""

_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<path>.+)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_B\.bias)", re.DOTALL)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BASE_KEY, _FEATURE_SPACE_KEY = "loraplex_base", "loraplex_feature_space"

_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
"""Config keys that do not change what a loaded adapter answers. `target_modules` may hold a regex: never run."""
_READ = {
    "alpha_pattern",
    "init_lora_weights",
    "lora_alpha",
    "lora_bias",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
_DEFAULTS = {"bias": "none", "runtime_config": {"ephemeral_gpu_offload": False}}
_EMPTY: tuple[object, ...] = (None, False, "", [], {})


def read_peft(
    config_text: bytes, tensor_file: bytes, *, base: BaseLayer, feature_space: str | None, max_rank: int
) -> tuple[Adapter, str]:
    """The adapter in PEFT's two files, and the path of its module.

    Raises `InvalidUpload` and its kin for what is malformed, `PeftUnsupported` for what could not be served
    exactly, `BaseMismatch` or `FeatureSpaceMismatch` where the file says that it was made for another.
    """
    config = _read_config(config_text)
    metadata = _check_header(tensor_file)
    _check_made_for(metadata, base, feature_space)
    tensors, module = _read_tensors(tensor_file)
    a_OR, b_RI, bias_O = tensors["lora_B.weight"], tensors["lora_A.weight"], tensors.get("lora_B.bias")
    check_factors(a_OR, b_RI, bias_O, base, max_rank=max_rank, names=("lora_B.weight", "lora_A.weight", "lora_B.bias"))
    rank = _from_pattern(config, "rank_pattern", module, default=config["r"])
    if rank != b_RI.shape[0]:
        raise WrongShape(
            f"{CONFIG_FILE} says rank {rank} for {module!r}, the tensors have rank {b_RI.shape[0]}",
            field="r",
            given=b_RI.shape[0],
            expected=f"rank {rank}",
        )
    if (bias_O is not None) != config["lora_bias"]:
        raise WrongShape(
            f"{CONFIG_FILE} says lora_bias {str(config['lora_bias']).lower()}, and {TENSOR_FILE} has "
            f"{'no' if bias_O is None else 'a'} lora_B.bias",
            field="lora_bias",
            given=config["lora_bias"],
            expected="true" if bias_O is not None else "false",
        )
    alpha = check_alpha(
        _from_pattern(config, "alpha_pattern", module, default=config["lora_alpha"]), field="lora_alpha"
    )
    a_OR, b_RI = a_OR.float().contiguous(), b_RI.float().contiguous()
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    return Adapter(a_OR, b_RI, bias_O, alpha, config["use_rslora"], feature_space), module


def write_peft(adapter: Adapter, *, module: str, base_fingerprint: str) -> dict[str, bytes]:
    """The two files, by name, that `PeftModel.from_pretrained` loads onto a model with a linear layer `module`."""
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
    # One entry of ours only: safetensors writes several in random order.
    made_for = {_BASE_KEY: base_fingerprint, _FEATURE_SPACE_KEY: adapter.feature_space}
    metadata = {"format": "pt", "loraplex": json.dumps(made_for, sort_keys=True)}
    return {
        TENSOR_FILE: save_tensors(tensors, metadata=metadata),
        CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n",
    }


def check_module(path: str, *, field: str = "module") -> str:
    """`path` itself where a module of a model can lie there; raises `InvalidName`."""
    if len(path) > 256 or not _MODULE.fullmatch(path):
        rule = "names of A-Z a-z 0-9 _ with dots between, at most 256 characters"
        raise InvalidName(f"{field} is not a path to a module: {rule}", field=field, given=path, expected=rule)
    return path


def _read_config(text: bytes) -> dict[str, Any]:
    config = parse(text, what=CONFIG_FILE)
    if not isinstance(config, dict):
        raise WrongType(f"{CONFIG_FILE} must hold a JSON object", field=CONFIG_FILE, given=config)
    for key in ("peft_type", "r", "lora_alpha"):
        if config.get(key) is None:
            raise MissingField(f"{CONFIG_FILE} has no {key}", field=key, expected=f"{key} in {CONFIG_FILE}")
    if config["peft_type"] != "LORA":
        raise _unsupported("peft_type", config["peft_type"], "LORA")
    init = config.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init in (None, "gaussian")):
        raise _unsupported("init_lora_weights", init, 'true, false or "gaussian": the others may change the base')
    for key, value in config.items():
        if key in _READ or key in _WITHOUT_EFFECT or any(value is empty or value == empty for empty in _EMPTY):
            continue
        if _DEFAULTS.get(key) != value:
            raise _unsupported(key, value, "left out, null, false or empty")
    if type(config["r"]) is not int:
        raise WrongType("r must be a whole number", field="r", given=config["r"], expected="a whole number")
    if type(config["lora_alpha"]) not in (int, float):
        raise WrongType("lora_alpha must be a number", field="lora_alpha", given=config["lora_alpha"])
    for key in ("use_rslora", "lora_bias"):
        config[key] = config.get(key) or False
        if config[key] is not True and config[key] is not False:
            raise WrongType(f"{key} must be true or false", field=key, given=config[key])
    return config


def _unsupported(key: str, value: object, expected: str) -> LoraplexError:
    return PeftUnsupported(
        f"{CONFIG_FILE}: {key} = {json.dumps(value)[:60]} cannot be served exactly",
        field=key,
        given=value,
        expected=expected,
    )


def _from_pattern(config: Mapping[str, Any], key: str, module: str, *, default: float) -> Any:
    """PEFT takes the first key that matches the module's path or its end. There a key is a regex: here it must be
    literal, because a client's regex is never run."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise WrongType(f"{key} must be an object", field=key, given=patterns, expected="an object")
    chosen = None
    for path, value in patterns.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", path):
            raise PeftUnsupported(
                f"{key} has the key {path!r}, which is not a literal module path",
                field=key,
                given=path,
                expected="a module path or the end of one",
            )
        if type(value) not in ((int,) if key == "rank_pattern" else (int, float)):
            raise WrongType(f"{key}[{path!r}] must be a number", field=key, given=value, expected="a number")
        if chosen is None and (module == path or module.endswith(f".{path}")):
            chosen = value
    return default if chosen is None else chosen


def _check_header(file: bytes) -> Mapping[str, object]:
    """The metadata of a safetensors file whose header keeps to our limits."""
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or length > len(file) - 8:
        raise InvalidSafetensors(
            f"{TENSOR_FILE} is not a safetensors file: its {len(file)} bytes are fewer than its header needs",
            field=TENSOR_FILE,
        )
    if length > MAX_HEADER_BYTES:
        raise InvalidSafetensors(
            f"{TENSOR_FILE} has a header of {length} bytes",
            field=TENSOR_FILE,
            given=f"{length} bytes",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
        )
    try:
        header = parse(file[8 : 8 + length], what="the header")
    except LoraplexError as error:
        raise InvalidSafetensors(f"{TENSOR_FILE}: {error.detail}", field=TENSOR_FILE) from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
        raise InvalidSafetensors(f"{TENSOR_FILE}: the header is not an object of tensors", field=TENSOR_FILE)
    return cast("dict[str, object]", header.get("__metadata__") or {})


def _check_made_for(metadata: Mapping[str, object], base: BaseLayer, feature_space: str | None) -> None:
    ours = metadata.get("loraplex")
    if ours is None:
        return
    try:
        made_for = parse(str(ours).encode(), what="the metadata entry loraplex")
    except LoraplexError as error:
        raise InvalidSafetensors(f"{TENSOR_FILE}: {error.detail}", field=TENSOR_FILE) from None
    if not isinstance(made_for, dict):
        return
    if made_for.get(_BASE_KEY) not in (None, base.fingerprint):
        raise BaseMismatch(
            f"{TENSOR_FILE} was made for the base layer {made_for[_BASE_KEY]}, this service has {base.fingerprint}",
            field=TENSOR_FILE,
            given=made_for[_BASE_KEY],
            expected=base.fingerprint,
        )
    if made_for.get(_FEATURE_SPACE_KEY) not in (None, feature_space):
        raise FeatureSpaceMismatch(
            f"{TENSOR_FILE} is for the feature space {made_for[_FEATURE_SPACE_KEY]!r}, this service has "
            f"{feature_space!r}",
            field=TENSOR_FILE,
            given=made_for[_FEATURE_SPACE_KEY],
            expected=feature_space,
        )


def _read_tensors(file: bytes) -> tuple[dict[str, Tensor], str]:
    """The tensors of one module, by what PEFT calls them within it, and the module's path."""
    try:
        tensors = load_tensors(file)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InvalidSafetensors(f"{TENSOR_FILE}: {error}", field=TENSOR_FILE) from None
    found: dict[str, Tensor] = {}
    modules: set[str] = set()
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise PeftUnsupported(
                f"{TENSOR_FILE} has the tensor {name[:80]!r}, which is no LoRA factor of a linear layer",
                field=TENSOR_FILE,
                given=name,
                expected="…lora_A.weight, …lora_B.weight and perhaps …lora_B.bias",
            )
        _check_tensor(name, tensor)
        modules.add(match["path"])
        found[match["kind"]] = tensor
    if len(modules) > 1:
        some = ", ".join(sorted(modules)[:5])
        raise PeftUnsupported(
            f"{TENSOR_FILE} adapts several modules: {some}", field=TENSOR_FILE, given=some, expected="one"
        )
    for kind in ("lora_A.weight", "lora_B.weight"):
        if kind not in found:
            raise MissingField(f"{TENSOR_FILE} has no {kind}", field=kind, expected=f"a tensor ….{kind}")
    module = modules.pop().removeprefix(_PREFIX)
    return found, check_module(module, field=TENSOR_FILE)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise InvalidSafetensors(
            f"{name} is {tensor.dtype}",
            field=name,
            given=str(tensor.dtype),
            expected="float32, float16 or bfloat16",
        )
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        position = torch.nonzero(~finite)[0].tolist()
        raise NotFinite(f"{name} is not finite at {position}", field=name, row=position[0], expected="finite numbers")
    if 0 in tensor.shape:
        raise OutOfRange(
            f"{name} has shape {tuple(tensor.shape)}",
            field=name,
            given=str(tuple(tensor.shape)),
            expected="a rank of at least 1",
        )
