"""`adapter_config.json` that asks for what cannot be served exactly, or for nothing that makes sense."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import (
    CONFIG_FILE,
    IN,
    LEFT_OUT,
    NOT_FINITE,
    OUT,
    TEN_THOUSAND_DIGITS,
    TENSOR_FILE,
    config,
    factors,
    ones,
)
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.upload_forms import Both, cases, upload


def _text(title: str, code: str, text: bytes, *says: str, field: str | None = None, **changes: Any) -> Both:
    return upload(title, code, {CONFIG_FILE: text, TENSOR_FILE: factors(**changes)}, *says, field=field)


def _keys(title: str, code: str, *says: str, **keys: Any) -> Both:
    """A config whose first key is the culprit."""
    return _text(title, code, config(**keys), *says, field=next(iter(keys)))


UNSUPPORTED: dict[str, list[Any]] = {
    "peft_type": ["LOHA", "IA3", "lora", "", 1, ["LORA"]],
    "use_dora": [True, 1, "true"],
    "use_qalora": [True],
    "modules_to_save": [["head"], "head"],
    "bias": ["all", "lora_only", True, "NONE"],
    "fan_in_fan_out": [True, 1],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "orthogonal", 1, "Gaussian", {}],
    "layers_to_transform": [[0], 3],
    "layers_pattern": ["layers"],
    "layer_replication": [[[0, 1]]],
    "loftq_config": [{"loftq_bits": 4}],
    "corda_config": [{"corda_method": "kpm"}],
    "eva_config": [{"rho": 2.0}],
    "arrow_config": [{"top_k": 3}],
    "trainable_token_indices": [[1, 2]],
    "target_parameters": [["weight"]],
    "exclude_modules": ["linear"],
    "alora_invocation_tokens": [[1]],
    "ensure_weight_tying": [True],
    "megatron_config": [{"hidden": 1}],
    "runtime_config": [{"ephemeral_gpu_offload": True}, {"x": 1}],
    "something_new": [1, "on", True, [0], 0, 0.0],
    "Use_Dora": [True],
}

REFUSED = [
    _keys(f"{key} = {value!r}", "peft_unsupported", key, **{key: value})
    for key, values in UNSUPPORTED.items()
    for value in values
]

NO_RANKS: list[Any] = ["1", True, False, 1.0, 1.5, [1], {}]
NO_ALPHAS: list[Any] = ["1", "", True, [1], {}]

NUMBERS = [
    *(_keys(f"no {key}", "missing_field", **{key: LEFT_OUT}) for key in ("peft_type", "r", "lora_alpha")),
    *(_keys(f"{key} null", "missing_field", **{key: None}) for key in ("peft_type", "r", "lora_alpha")),
    *(_keys(f"r = {value!r}", "wrong_type", r=value) for value in NO_RANKS),
    *(_keys(f"r = {value}", "wrong_shape", str(value), r=value) for value in (0, -1, 2, 10**30)),
    *(_keys(f"lora_alpha = {value!r}", "wrong_type", lora_alpha=value) for value in NO_ALPHAS),
    *(_keys(f"lora_alpha = {name}", "not_finite", lora_alpha=number) for name, number in NOT_FINITE.items()),
    *(_keys(f"lora_alpha = {value}", "out_of_range", lora_alpha=value) for value in (1_000_001, -1e7, 10**30)),
    *(
        _keys(f"{key} = {value!r}", "wrong_type", **{key: value})
        for key in ("use_rslora", "lora_bias")
        for value in (0, 1, "true", "")
    ),
    _keys("lora_bias without a bias", "wrong_shape", "no lora_B.bias", lora_bias=True),
    _text("a bias without lora_bias", "wrong_shape", config(), "a lora_B.bias", field="lora_bias", bias=ones(OUT)),
    _text("a bias with lora_bias false", "wrong_shape", config(lora_bias=False), field="lora_bias", bias=ones(OUT)),
    _text(
        "a lower rank than the tensors'", "wrong_shape", config(), "rank 2", field="r", a=ones(OUT, 2), b=ones(2, IN)
    ),
]

PATTERNS = [
    *(
        _keys(f"{pattern} with the key {key!a}", "peft_unsupported", key, **{pattern: {key: 1}})
        for pattern in ("rank_pattern", "alpha_pattern")
        for key in (".*", "lin.*ar", "^linear", "linear$", "(a+)+$", "lin|ear", "linear\n", "l[i]near", "", "../x", "а")
    ),
    _keys("rank_pattern that is a list", "wrong_type", rank_pattern=["linear"]),
    _keys("rank_pattern that is a string", "wrong_type", "linear", rank_pattern="linear"),
    _keys("alpha_pattern that is a number", "wrong_type", "3", alpha_pattern=3),
    _keys("rank_pattern that is an empty string", "wrong_type", rank_pattern=""),
    _keys("alpha_pattern that is false", "wrong_type", "false", alpha_pattern=False),
    _keys("rank_pattern with a fraction", "wrong_type", "1.5", rank_pattern={"linear": 1.5}),
    _keys("rank_pattern with 1.0", "wrong_type", "1.0", rank_pattern={"linear": 1.0}),
    _keys("rank_pattern with a string", "wrong_type", "linear", rank_pattern={"linear": "1"}),
    _keys("rank_pattern with a boolean", "wrong_type", "true", rank_pattern={"linear": True}),
    _keys("rank_pattern with null", "wrong_type", "null", rank_pattern={"linear": None}),
    _keys("alpha_pattern with a string", "wrong_type", "linear", alpha_pattern={"linear": "1"}),
    _keys("alpha_pattern with a boolean", "wrong_type", "false", alpha_pattern={"linear": False}),
    _text("rank_pattern with another rank", "wrong_shape", config(rank_pattern={"linear": 4}), "rank 4"),
    _text("alpha_pattern with NaN", "not_finite", config(alpha_pattern={"linear": NOT_FINITE["NaN"]}), "alpha"),
    _text("alpha_pattern with 1e400", "not_finite", config(alpha_pattern={"linear": NOT_FINITE["1e400"]}), "alpha"),
    _text("alpha_pattern with 10^7", "out_of_range", config(alpha_pattern={"linear": 10**7}), "10000000"),
    _text(
        "alpha_pattern of 10,000 digits", "not_finite", config(alpha_pattern={"linear": TEN_THOUSAND_DIGITS}), "alpha"
    ),
    _keys("a key of a megabyte", "peft_unsupported", "xxxx", rank_pattern={"x" * 500_000 + "*": 1}),
]

TEXTS = [
    *(
        _text(f"a config of {name}", "not_json", text, CONFIG_FILE)
        for name, text in {
            "nothing": b"",
            "half an object": b'{"r": 1',
            "Python": b"{'r': 1}",
            "UTF-16": config().decode().encode("utf-16"),
            "a mark of byte order": b"\xef\xbb\xbf" + config(),
            "invalid UTF-8": b'{"r": "\xff"}',
            "100,000 brackets": b"[" * 100_000,
        }.items()
    ),
    _text("a config that is a list", "wrong_type", b"[]", field=CONFIG_FILE),
    _text("a config that is null", "wrong_type", b"null", field=CONFIG_FILE),
    _text("a config that is a string", "wrong_type", b'"LORA"', field=CONFIG_FILE),
    _text("a config with r twice", "duplicate_key", config()[:-1] + b', "r": 2}', "r", field="r"),
    _text("a config with a nested key twice", "duplicate_key", config()[:-1] + b', "x": {"y": 1, "y": 1}}', field="y"),
    _text("a key that is a lone surrogate", "peft_unsupported", config(**{"\ud800": 1}), "\ud800"),
    _text(
        "a value nested nearly too deeply",
        "peft_unsupported",
        config()[:-1] + b', "x": ' + b"[" * 500 + b"]" * 500 + b"}",
        field="x",
    ),
]


@pytest.mark.parametrize("case", cases(REFUSED + NUMBERS + PATTERNS + TEXTS), ids=lambda case: case.name)
def test_an_upload_is_refused_for(target: Target, case: Case) -> None:
    target.refuses(case)
