"""Strict reader of PEFT's `adapter_config.json`.

An unknown key is refused, because it may change an answer. The keys are those of `LoraConfig` in PEFT 0.21.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar

from adapters.errors import LoraplexError, MissingField, PeftUnsupported, WrongType, shorten
from adapters.lora.adapter import check_alpha
from adapters.strict_json import parse

CONFIG_FILE = "adapter_config.json"
# Most bytes of a config. Real ones have a few kilobytes; a larger one would stall the process that parses it.
MAX_CONFIG_BYTES = 2**19
Number = TypeVar("Number", int, float)

_LITERAL_PATH = re.compile(r"[A-Za-z0-9_.-]+")
# Keys that do not change the answers of a loaded adapter. `target_modules` may be a regex, which is never run.
_KEYS_WITHOUT_EFFECT = {
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
# Types of the values that are read, and their description.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "use_rslora": ((bool, NoneType), "true or false"),
    "lora_bias": ((bool, NoneType), "true or false"),
    "rank_pattern": ((dict, NoneType), "an object"),
    "alpha_pattern": ((dict, NoneType), "an object"),
}
_KNOWN_KEYS = {"peft_type", "init_lora_weights", *_TYPES, *_KEYS_WITHOUT_EFFECT}
_DEFAULTS = {"bias": "none", "runtime_config": {"ephemeral_gpu_offload": False}}
_EMPTY: tuple[object, ...] = ("", [], {})


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """Settings of a PEFT adapter that matter here."""

    rank: int
    alpha: float
    rslora: bool
    has_bias: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Return the rank of the module at a path."""
        return _from_pattern(self.rank_pattern, module, default=self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of the module at a path; raise `NotFinite` or `OutOfRange`."""
        return check_alpha(_from_pattern(self.alpha_pattern, module, default=self.alpha), field="lora_alpha")


def read_config(text: bytes) -> PeftConfig:
    """Parse a config file; raise `InvalidInput` or a subclass, with the key."""
    config = parse(text, what=CONFIG_FILE)
    if not isinstance(config, dict):
        raise WrongType(f"{CONFIG_FILE} must hold a JSON object", field=CONFIG_FILE, given=config)
    _check_keys(config)
    for key, (types, expected) in _TYPES.items():
        if type(config.get(key)) not in types:
            raise WrongType(f"{key} must be {expected}", field=key, given=config.get(key), expected=expected)
    return PeftConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rslora=bool(config.get("use_rslora")),
        has_bias=bool(config.get("lora_bias")),
        rank_pattern=_read_pattern(config, "rank_pattern", of="r"),
        alpha_pattern=_read_pattern(config, "alpha_pattern", of="lora_alpha"),
    )


def _check_keys(config: Mapping[str, Any]) -> None:
    """Raise `MissingField`, or `PeftUnsupported` for a feature that cannot be served exactly."""
    # The type is checked first, because other methods have neither r nor alpha.
    if config.get("peft_type") not in (None, "LORA"):
        raise _unsupported("peft_type", config["peft_type"], "LORA")
    for key in ("peft_type", "r", "lora_alpha"):
        if config.get(key) is None:
            raise MissingField(f"{CONFIG_FILE} has no {key}", field=key, expected=f"{key} in {CONFIG_FILE}")
    init = config.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init in (None, "gaussian")):
        raise _unsupported("init_lora_weights", init, 'true, false or "gaussian": the others may change the base')
    for key, value in config.items():
        is_off = value is None or value is False or value in _EMPTY or value == _DEFAULTS.get(key)
        if key not in _KNOWN_KEYS and not is_off:
            raise _unsupported(key, value, "left out, null, false or empty")


def _unsupported(key: str, value: object, expected: str) -> LoraplexError:
    detail = f"{CONFIG_FILE}: {key} = {shorten(value)[:60]} cannot be served exactly"
    return PeftUnsupported(detail, field=key, given=value, expected=expected)


def _read_pattern(config: Mapping[str, Any], key: str, *, of: str) -> dict[str, Any]:
    """Return a pattern, whose keys must be literal paths. PEFT runs them as regexes; a client's regex is never run."""
    pattern: dict[str, Any] = config.get(key) or {}
    types, expected = _TYPES[of]
    for path, value in pattern.items():
        if not _LITERAL_PATH.fullmatch(path):
            detail = f"{key} has the key {path[:80]!r}, which is not a literal module path"
            raise PeftUnsupported(detail, field=key, given=path, expected="a module path or the end of one")
        if type(value) not in types:
            raise WrongType(f"{key}[{path!r}] must be {expected}", field=key, given=value, expected=expected)
    return pattern


def _from_pattern(pattern: Mapping[str, Number], module: str, *, default: Number) -> Number:
    """Return the value of the first key that is the module's path or a suffix of it, as PEFT does."""
    return next((value for path, value in pattern.items() if _is_suffix_of(path, module)), default)


def _is_suffix_of(path: str, module: str) -> bool:
    """Return whether PEFT's regex for the path would match. In a literal path, its dots match any character."""
    end = len(module) - len(path)
    starts_a_name = end == 0 or (end > 0 and module[end - 1] == ".")
    return starts_a_name and all(key in (".", char) for key, char in zip(path, module[end:], strict=True))
