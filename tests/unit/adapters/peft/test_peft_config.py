"""PEFT's config: what it says of a module, and what is refused by its key."""

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adapters.errors import LoraplexError, MissingField, NotJson, OutOfRange, PeftUnsupported, WrongType
from adapters.peft.config import PeftConfig, read_config
from tests.support.peft_model import uses_peft

LEAST = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
PATHS = st.lists(st.text("ab_0-", min_size=1, max_size=2), min_size=1, max_size=4).map(".".join)


def _read(**keys: Any) -> PeftConfig:
    return read_config(json.dumps(LEAST | keys).encode())


def test_the_least_config_is_rank_and_alpha() -> None:
    assert _read() == PeftConfig(rank=4, alpha=8, rslora=False, has_bias=False, rank_pattern={}, alpha_pattern={})


@uses_peft
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(module=PATHS, keys=st.lists(PATHS, max_size=3, unique=True), cut=st.integers(0, 8))
def test_a_pattern_means_for_a_module_what_peft_takes_it_for(module: str, keys: list[str], cut: int) -> None:
    from peft.utils.other import get_pattern_key

    # Ends of the path, so that there is something to match.
    keys = list(dict.fromkeys([*keys, module[cut:] or module]))
    assume(all(keys))
    pattern = {key: 10 + number for number, key in enumerate(keys)}
    wanted = pattern.get(get_pattern_key(list(pattern), module), 4)
    assert _read(rank_pattern=pattern).rank_of(module) == wanted
    assert _read(alpha_pattern=pattern, lora_alpha=4).alpha_of(module) == wanted


def test_a_dot_in_a_pattern_is_any_character_as_it_is_to_peft() -> None:
    assert _read(alpha_pattern={"block.0": 3}).alpha_of("net.block_0") == 3


@pytest.mark.parametrize("key", [".*", "(a+)+$", "^linear", "a|b", "li[n]ear", "", "lin ear", "linéar", "a\\.b"])
@pytest.mark.parametrize("which", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_literal_path_is_refused_and_not_run(which: str, key: str) -> None:
    with pytest.raises(PeftUnsupported) as caught:
        _read(**{which: {key: 4}})
    assert caught.value.field == which


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"base_model_class": "Net"}),
        ("base_model_name_or_path", "somewhere/else"),
        ("bias", "none"),
        ("corda_config", None),
        ("fan_in_fan_out", False),
        ("inference_mode", True),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", False),
        ("init_lora_weights", True),
        ("layers_pattern", []),
        ("loftq_config", {}),
        ("lora_dropout", 0.5),
        ("megatron_core", "megatron.core"),
        ("modules_to_save", None),
        ("peft_version", "99.0"),
        ("qalora_group_size", 32),
        ("revision", "main"),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
        ("target_modules", "(a+)+$"),
        ("target_modules", ["linear", "other"]),
        ("task_type", "FEATURE_EXTRACTION"),
        ("use_dora", False),
        ("something_new", None),
        ("something_new", ""),
    ],
)
def test_what_does_not_change_an_answer_is_accepted(key: str, value: object) -> None:
    assert _read(**{key: value}) == _read()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "lora"),
        ("peft_type", ["LORA"]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("use_dora", True),
        ("modules_to_save", ["head"]),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["w"]),
        ("use_qalora", True),
        ("eva_config", {"rho": 2.0}),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("something_new", True),
        ("something_new", 0),
        ("something_new", {"deep": None}),
        *(
            ("init_lora_weights", kind)
            for kind in ("pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "orthogonal", "lora_ga", "x", 1)
        ),
    ],
)
def test_what_could_change_an_answer_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(PeftUnsupported) as caught:
        _read(**{key: value})
    assert caught.value.field == key
    assert key in caught.value.detail


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha"])
@pytest.mark.parametrize("missing", [{}, None])
def test_a_config_without_what_decides_the_scaling_is_refused(key: str, missing: object) -> None:
    config = {name: value for name, value in LEAST.items() if name != key} | ({} if missing == {} else {key: None})
    with pytest.raises(MissingField) as caught:
        read_config(json.dumps(config).encode())
    assert caught.value.field == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 4.0),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("use_rslora", 1),
        ("use_rslora", "true"),
        ("lora_bias", "none"),
        ("rank_pattern", [4]),
        ("rank_pattern", {"linear": 4.0}),
        ("rank_pattern", {"linear": True}),
        ("alpha_pattern", {"linear": "8"}),
        ("alpha_pattern", {"linear": None}),
    ],
)
def test_nothing_is_taken_for_a_number_or_a_truth_that_is_not_one(key: str, value: object) -> None:
    with pytest.raises(WrongType) as caught:
        _read(**{key: value})
    assert caught.value.field == key


@pytest.mark.parametrize("where", ["lora_alpha", "alpha_pattern"])
@pytest.mark.parametrize("alpha", ["NaN", "-Infinity", "1e400", "1000001", "1" + "0" * 30])
def test_an_alpha_past_its_bounds_is_refused(where: str, alpha: str) -> None:
    value = alpha if where == "lora_alpha" else f'{{"linear": {alpha}}}'
    keys = {key: json.dumps(given) for key, given in LEAST.items()} | {where: value}
    text = "{" + ", ".join(f'"{key}": {given}' for key, given in keys.items()) + "}"
    with pytest.raises(LoraplexError) as caught:
        read_config(text.encode()).alpha_of("linear")
    assert caught.value.code == ("not_finite" if alpha in ("NaN", "-Infinity", "1e400") else OutOfRange.code)
    assert caught.value.field == "lora_alpha"


@pytest.mark.parametrize("text", [b"", b"{", b"\x80\x04K\x01."])
def test_a_config_that_is_no_json_says_which_file(text: bytes) -> None:
    with pytest.raises(NotJson, match=r"adapter_config\.json"):
        read_config(text)


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(WrongType, match=r"adapter_config\.json"):
        read_config(b"[]")
