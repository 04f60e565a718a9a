"""`adapter_model.safetensors` that is honest about tensors which make no adapter."""

import struct

import pytest

from tests.integration.hostile.bodies import (
    A_NAME,
    B_NAME,
    BIAS_NAME,
    IN,
    LEFT_OUT,
    OUT,
    TENSOR_FILE,
    Stored,
    factors,
    ones,
    tensor_file,
    to_json,
)
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import MAX_RANK
from tests.integration.hostile.upload_forms import cases, tensors

ONE = b"\0\0\x80\x3f"

DTYPES = [
    tensors(f"tensors of {dtype}", "invalid_safetensors", tensor_file({A_NAME: ones(OUT, 1), B_NAME: stored}), B_NAME)
    for dtype, stored in {
        dtype: Stored(dtype, [1, IN], b"\0" * size * IN)
        for dtype, size in {
            "F64": 8,
            "I64": 8,
            "U64": 8,
            "I32": 4,
            "I16": 2,
            "I8": 1,
            "U8": 1,
            "BOOL": 1,
            "C64": 8,
            "F8_E4M3": 1,
            "F8_E5M2": 1,
        }.items()
    }.items()
] + [
    tensors(
        "tensors of F8_E8M0", "invalid_safetensors", factors(b=Stored("F8_E8M0", [1, IN], b"\0" * IN)), TENSOR_FILE
    ),
    tensors("tensors of F4", "invalid_safetensors", factors(b=Stored("F4", [1, IN], b"\0" * (IN // 2))), TENSOR_FILE),
]

NOT_FINITE = [
    tensors(
        f"{name} in {dtype}",
        "not_finite",
        factors(b=Stored(dtype, [1, IN], number + b"\0" * len(number) * 9)),
        B_NAME,
        row=0,
    )
    for dtype, numbers in {
        "F32": {
            "NaN": b"\0\0\xc0\x7f",
            "a NaN with a payload": b"\x01\0\x80\xff",
            "infinity": b"\0\0\x80\x7f",
            "-infinity": b"\0\0\x80\xff",
        },
        "F16": {"NaN": b"\0\x7e", "infinity": b"\0\x7c", "-infinity": b"\0\xfc"},
        "BF16": {"NaN": b"\xc0\x7f", "infinity": b"\x80\x7f", "-infinity": b"\x80\xff"},
    }.items()
    for name, number in numbers.items()
] + [
    tensors("NaN in A", "not_finite", factors(a=Stored("F32", [OUT, 1], ONE + b"\0\0\xc0\x7f")), A_NAME, row=1),
    tensors("NaN alone", "not_finite", factors(b=Stored("F32", [], struct.pack("<f", float("nan")))), B_NAME),
    tensors(
        "infinity in a bias",
        "not_finite",
        factors(bias=Stored("F32", [OUT], ONE + b"\0\0\x80\x7f")),
        BIAS_NAME,
        row=1,
        lora_bias=True,
    ),
]

ODD = "base_model.model.linear"
TENSORS = [
    tensors("no tensors", "missing_field", tensor_file({}), "lora_A.weight"),
    tensors("no A", "missing_field", factors(a=LEFT_OUT), "lora_B.weight"),
    tensors("no B", "missing_field", factors(b=LEFT_OUT), "lora_A.weight"),
    tensors("a bias alone", "missing_field", factors(a=LEFT_OUT, b=LEFT_OUT, bias=ones(OUT)), "lora_A.weight"),
    tensors("a tensor too many", "peft_unsupported", factors(more={"extra": ones(1)}), "extra"),
    tensors("a base weight", "peft_unsupported", factors(more={f"{ODD}.weight": ones(OUT, IN)}), f"{ODD}.weight"),
    tensors(
        "a DoRA vector",
        "peft_unsupported",
        factors(more={f"{ODD}.lora_magnitude_vector": ones(OUT)}),
        "lora_magnitude_vector",
    ),
    tensors(
        "an embedding", "peft_unsupported", factors(more={f"{ODD}.lora_embedding_A": ones(1, IN)}), "lora_embedding_A"
    ),
    tensors("a saved module", "peft_unsupported", factors(more={f"{ODD}.lora_A.bias": ones(1)}), "lora_A.bias"),
    tensors(
        "two modules",
        "peft_unsupported",
        factors(more={"other.lora_A.weight": ones(1, IN), "other.lora_B.weight": ones(OUT, 1)}),
        "other",
    ),
    tensors(
        "factors of two modules",
        "peft_unsupported",
        factors(b=LEFT_OUT, more={"other.lora_A.weight": ones(1, IN)}),
        "other",
    ),
    tensors(
        "a module of no name",
        "peft_unsupported",
        tensor_file({"lora_A.weight": ones(1, IN), "lora_B.weight": ones(OUT, 1)}),
        ".weight",
    ),
    *(
        tensors(
            f"a module called {module!a}",
            "invalid_name",
            tensor_file({f"{module}.lora_A.weight": ones(1, IN), f"{module}.lora_B.weight": ones(OUT, 1)}),
            TENSOR_FILE,
        )
        for module in ("../x", "a b", "a..b", ".a", "a\n", "a\0", "а", "a" * 300, "lin.*")
    ),
    tensors("A of one dimension", "wrong_shape", factors(a=ones(OUT)), "lora_B.weight"),
    tensors("B of one dimension", "wrong_shape", factors(b=ones(IN)), "lora_A.weight"),
    tensors("B of three dimensions", "wrong_shape", factors(b=ones(1, IN, 1)), "lora_A.weight"),
    tensors("B of no dimension", "wrong_shape", factors(b=ones()), "lora_A.weight"),
    tensors("A of four dimensions", "wrong_shape", factors(a=ones(OUT, 1, 1, 1)), "lora_B.weight"),
    tensors("A for another layer", "wrong_shape", factors(a=ones(OUT + 1, 1)), "(3, 1)"),
    tensors("B for another layer", "wrong_shape", factors(b=ones(1, IN + 1)), "(1, 11)"),
    tensors("factors of two ranks", "wrong_shape", factors(b=ones(2, IN)), "lora_A.weight"),
    tensors("swapped factors", "wrong_shape", factors(a=ones(3, IN), b=ones(OUT, 3)), "swapped", r=3),
    tensors("a bias of another length", "wrong_shape", factors(bias=ones(OUT + 1)), "lora_B.bias", lora_bias=True),
    tensors("a bias of two dimensions", "wrong_shape", factors(bias=ones(OUT, 1)), "lora_B.bias", lora_bias=True),
    tensors("rank 0", "out_of_range", factors(a=ones(OUT, 0), b=ones(0, IN)), "shape", r=0),
    tensors("an empty A", "out_of_range", factors(a=ones(0, 1)), "(0, 1)"),
    tensors(
        "a rank past the limit",
        "rank_too_large",
        factors(a=ones(OUT, MAX_RANK + 1), b=ones(MAX_RANK + 1, IN)),
        str(MAX_RANK),
        r=MAX_RANK + 1,
    ),
]

MADE_FOR = [
    tensors(title, code, tensor_file({A_NAME: ones(OUT, 1), B_NAME: ones(1, IN)}, metadata=metadata), *says)
    for title, code, metadata, says in (
        (
            "a file for another base",
            "base_mismatch",
            {"loraplex": to_json({"base": "sha256:" + "0" * 64}).decode()},
            ("sha256:0000",),
        ),
        ("a base that is a number", "base_mismatch", {"loraplex": '{"base": 7}'}, ("7",)),
        ("another encoder", "feature_space_mismatch", {"loraplex": '{"feature_space": "x@9"}'}, ("x@9",)),
    )
]


@pytest.mark.parametrize("case", cases(DTYPES + NOT_FINITE + TENSORS + MADE_FOR), ids=lambda case: case.name)
def test_an_upload_is_refused_for(target: Target, case: Case) -> None:
    target.refuses(case)
