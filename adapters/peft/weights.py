"""Import and export of PEFT's weight files. Only this package uses PEFT's names.

PEFT's names of the factors are swapped: `lora_B` is A (out, r), `lora_A` is B (r, in), and `lora_B.bias` is bias (out).
"""

# I in_features · O out_features · R rank
import json
import re
from collections.abc import Mapping

from safetensors.torch import save as save_tensors
from torch import Tensor

from adapters.errors import (
    BaseMismatch,
    FeatureSpaceMismatch,
    InvalidName,
    InvalidSafetensors,
    LoraplexError,
    MissingField,
    PeftUnsupported,
    WrongShape,
)
from adapters.lora.adapter import Adapter, check_factors
from adapters.lora.base_layer import BaseLayer
from adapters.lora.labels import check_labels
from adapters.peft.config import CONFIG_FILE, read_config
from adapters.peft.safetensors import MAX_HEADER_BYTES, read_safetensors
from adapters.strict_json import parse

TENSOR_FILE = "adapter_model.safetensors"
DEFAULT_MODULE = "linear"

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
    named, metadata = read_safetensors(tensor_file, what=TENSOR_FILE)
    recorded = _read_metadata(metadata)
    _check_made_for(recorded, base, feature_space)
    tensors, module = _select_module(named)
    rank, alpha = config.rank_of(module), config.alpha_of(module)
    a_OR, b_RI, bias_O = tensors["lora_B.weight"], tensors["lora_A.weight"], tensors.get("lora_B.bias")
    check_factors(a_OR, b_RI, bias_O, base, max_rank=max_rank, names=("lora_B.weight", "lora_A.weight", "lora_B.bias"))
    if rank != b_RI.shape[0]:
        raise WrongShape(
            f"{CONFIG_FILE} says rank {rank} for {module!r}, the tensors have rank {b_RI.shape[0]}",
            field="r",
            given=rank,
            expected=f"rank {b_RI.shape[0]}",
        )
    if (bias_O is not None) != config.has_bias:
        raise WrongShape(
            f"{CONFIG_FILE} says lora_bias {str(config.has_bias).lower()}, and {TENSOR_FILE} has "
            f"{'no' if bias_O is None else 'a'} lora_B.bias",
            field="lora_bias",
            given=config.has_bias,
            expected="true" if bias_O is not None else "false",
        )
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


def _read_metadata(metadata: Mapping[str, object]) -> Mapping[str, object]:
    """Parse loraplex's own metadata entry; return an empty mapping if there is none."""
    entry = metadata.get(_METADATA_KEY)
    if entry is None:
        return {}
    try:
        recorded = parse(str(entry).encode(), what="the metadata entry loraplex")
    except LoraplexError as error:
        raise InvalidSafetensors(f"{TENSOR_FILE}: {error.detail}", field=TENSOR_FILE) from None
    return recorded if isinstance(recorded, dict) else {}


def _check_made_for(made_for: Mapping[str, object], base: BaseLayer, feature_space: str | None) -> None:
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
            raise PeftUnsupported(
                f"{TENSOR_FILE} has the tensor {name[:80]!r}, which is no LoRA factor of a linear layer",
                field=TENSOR_FILE,
                given=name,
                expected="…lora_A.weight, …lora_B.weight and perhaps …lora_B.bias",
            )
        modules.add(match["path"])
        tensors_by_kind[match["kind"]] = tensor
    if len(modules) > 1:
        names = ", ".join(sorted(modules)[:5])
        raise PeftUnsupported(
            f"{TENSOR_FILE} adapts several modules: {names}", field=TENSOR_FILE, given=names, expected="one"
        )
    for kind in ("lora_A.weight", "lora_B.weight"):
        if kind not in tensors_by_kind:
            raise MissingField(f"{TENSOR_FILE} has no {kind}", field=kind, expected=f"a tensor ….{kind}")
    module = modules.pop().removeprefix(_PREFIX)
    return tensors_by_kind, check_module(module, field=TENSOR_FILE)
