"""`adapter_model.safetensors` that lies, in a zip and in a multipart body."""

import struct
from typing import Any

import pytest

from tests.hostile.bodies import (
    A_NAME,
    B_NAME,
    BIAS_NAME,
    CONFIG_FILE,
    IN,
    LEFT_OUT,
    OUT,
    TENSOR_FILE,
    Raw,
    Stored,
    config,
    factors,
    ones,
    safetensors,
    tensor_file,
    to_json,
)
from tests.hostile.case import Case, Target
from tests.hostile.conftest import MAX_RANK
from tests.hostile.forms import FORMS, upload

B_ENTRY = {"dtype": "F32", "shape": [1, IN], "data_offsets": [0, 4 * IN]}
A_ENTRY = {"dtype": "F32", "shape": [OUT, 1], "data_offsets": [4 * IN, 4 * IN + 4 * OUT]}
CONTENT = b"\0\0\x80\x3f" * (IN + OUT)


def _file(title: str, code: str, file: bytes, *says: str, row: int | None = None, **keys: Any) -> tuple[Case, Case]:
    files = {CONFIG_FILE: config(**keys), TENSOR_FILE: file}
    zipped, in_parts = (upload(f"{title}, {form}", form, files, code, *says, row=row) for form in FORMS)
    return zipped, in_parts


def _header(title: str, header: dict[str, Any] | bytes, *says: str, content: bytes = CONTENT) -> tuple[Case, Case]:
    """A file with a header of its own, which is at fault."""
    return _file(title, "invalid_safetensors", safetensors(header, content), *says or (TENSOR_FILE,))


def _entry(title: str, **changes: Any) -> tuple[Case, Case]:
    """A good file, but for what its header says of B."""
    entry = {key: value for key, value in (B_ENTRY | changes).items() if value is not LEFT_OUT}
    return _header(title, {B_NAME: entry, A_NAME: A_ENTRY})


LENGTHS = [
    _file("an empty file", "invalid_safetensors", b"", TENSOR_FILE),
    _file("seven bytes", "invalid_safetensors", b"\0" * 7, TENSOR_FILE),
    _file("eight bytes of nothing", "invalid_safetensors", b"\0" * 8, TENSOR_FILE),
    _file("a header that ends past the end", "invalid_safetensors", safetensors(b"{}", length=3), TENSOR_FILE),
    _file("a header of 2^62 bytes", "invalid_safetensors", safetensors(b"{}", length=2**62), TENSOR_FILE),
    _file("a header of 2^63 bytes", "invalid_safetensors", safetensors(b"{}", length=2**63), TENSOR_FILE),
    _file("a header of 2^64 - 1 bytes", "invalid_safetensors", safetensors(b"{}", length=2**64 - 1), TENSOR_FILE),
    _file("a header cut in two", "invalid_safetensors", safetensors(b'{"a": {}}', length=4), TENSOR_FILE),
    _header("a header past 64 KiB", b"{}" + b" " * 65_535, "65537", "header"),
    _header("metadata past 64 KiB", {"__metadata__": {"x": "y" * 70_000}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}, "header"),
    _file("a pickle", "invalid_safetensors", b"\x80\x02}q\0.PK\x03\x04" * 9, TENSOR_FILE),
    _file("a file cut short", "invalid_safetensors", factors()[:-1], TENSOR_FILE),
    _file("a file with a byte too many", "invalid_safetensors", factors() + b"\0", TENSOR_FILE),
]

HEADERS = [
    _header("a header that is not JSON", b"not JSON!"),
    _header("a header that is a list", b"[]"),
    _header("a header that is a number", b"12345678"),
    _header("a header in UTF-16", "{}".encode("utf-16")),
    _header("a header of invalid UTF-8", b'{"\xff": {}}'),
    _header("a header nested too deeply", b'{"a":' * 9_000 + b"1" + b"}" * 9_000),
    _header("a name twice", b'{"a": 1, "a": 2}', "twice"),
    _header("an entry's key twice", b'{"a": {"dtype": "F32", "dtype": "F16"}}', "twice"),
    _header("metadata that are a list", {"__metadata__": ["x"], B_NAME: B_ENTRY, A_NAME: A_ENTRY}),
    _header("metadata that are a number", {"__metadata__": 1, B_NAME: B_ENTRY, A_NAME: A_ENTRY}),
    _header("metadata with a number", {"__metadata__": {"format": 1}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}),
    _header("metadata of ours that are not JSON", {"__metadata__": {"loraplex": "{"}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}),
    _header("metadata of ours with a key twice", {"__metadata__": {"loraplex": '{"a":1,"a":1}'}, B_NAME: B_ENTRY}),
    _header("metadata of ours nested deeply", {"__metadata__": {"loraplex": "[" * 20_000}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}),
    _header("metadata of ours with a lone surrogate", {"__metadata__": {"loraplex": "\ud800"}, B_NAME: B_ENTRY}),
    _header("a name that is a lone surrogate", {"\ud800": B_ENTRY, A_NAME: A_ENTRY}),
    _header("an entry that is a list", {B_NAME: [1, IN], A_NAME: A_ENTRY}),
    _header("an entry that is null", {B_NAME: None, A_NAME: A_ENTRY}),
]  # fmt: skip

ENTRIES = [
    _entry("offsets past the end", data_offsets=[0, 4 * IN + 4]),
    _entry("offsets that overlap", data_offsets=[8, 4 * IN + 8]),
    _entry("offsets of another tensor", data_offsets=A_ENTRY["data_offsets"]),
    _entry("offsets that run backwards", data_offsets=[4 * IN, 0]),
    _entry("offsets that leave a hole", data_offsets=[0, 4 * IN - 4], shape=[1, IN - 1]),
    _entry("negative offsets", data_offsets=[-4 * IN, 0]),
    _entry("offsets of 2^64", data_offsets=[0, 2**64]),
    _entry("offsets of 10^400", data_offsets=[0, 10**400]),
    _entry("offsets that are fractions", data_offsets=[0.0, 40.0]),
    _entry("offsets that are NaN", data_offsets=[Raw("NaN"), 40]),
    _entry("offsets in strings", data_offsets=["0", "40"]),
    _entry("one offset", data_offsets=[0]),
    _entry("no offsets", data_offsets=LEFT_OUT),
    _entry("a shape that is larger than its bytes", shape=[2, IN]),
    _entry("a shape that is smaller than its bytes", shape=[1, IN - 1]),
    _entry("a shape whose product overflows", shape=[2**32, 2**32]),
    _entry("a shape whose product overflows to its bytes", shape=[2**63, 2, IN]),
    _entry("a shape of 2^64", shape=[2**64, IN]),
    _entry("a negative shape", shape=[-1, -IN]),
    _entry("a shape of fractions", shape=[1.0, 10.0]),
    _entry("a shape of strings", shape=["1", "10"]),
    _entry("a shape that is a number", shape=IN),
    _entry("a shape that is null", shape=None),
    _entry("no shape", shape=LEFT_OUT),
    _entry("an unknown dtype", dtype="F33"),
    _entry("a dtype in small letters", dtype="f32"),
    _entry("a dtype that is a number", dtype=32),
    _entry("no dtype", dtype=LEFT_OUT),
    _entry("nothing in a shape too large to count", shape=[0, 2**63], data_offsets=[0, 0]),
]

DTYPES = [
    _file(f"tensors of {dtype}", "invalid_safetensors", tensor_file({A_NAME: ones(OUT, 1), B_NAME: stored}), B_NAME)
    for dtype, stored in {
        dtype: Stored(dtype, [1, IN], b"\0" * size * IN)
        for dtype, size in {
            "F64": 8, "I64": 8, "U64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8,
            "F8_E4M3": 1, "F8_E5M2": 1,
        }.items()
    }.items()
] + [
    _file("tensors of F8_E8M0", "invalid_safetensors", factors(b=Stored("F8_E8M0", [1, IN], b"\0" * IN)), TENSOR_FILE),
    _file("tensors of F4", "invalid_safetensors", factors(b=Stored("F4", [1, IN], b"\0" * (IN // 2))), TENSOR_FILE),
]  # fmt: skip

NOT_FINITE = [
    _file(f"{name} in {dtype}", "not_finite", factors(b=Stored(dtype, [1, IN], number + b"\0" * len(number) * 9)), B_NAME, row=0)
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
    _file("NaN in A", "not_finite", factors(a=Stored("F32", [OUT, 1], CONTENT[:4] + b"\0\0\xc0\x7f")), A_NAME, row=1),
    _file("NaN alone", "not_finite", factors(b=Stored("F32", [], struct.pack("<f", float("nan")))), B_NAME),
    _file(
        "infinity in a bias",
        "not_finite",
        factors(bias=Stored("F32", [OUT], CONTENT[:4] + b"\0\0\x80\x7f")),
        BIAS_NAME,
        row=1,
        lora_bias=True,
    ),
]  # fmt: skip

ODD = "base_model.model.linear"
TENSORS = [
    _file("no tensors", "missing_field", tensor_file({}), "lora_A.weight"),
    _file("no A", "missing_field", factors(a=LEFT_OUT), "lora_B.weight"),
    _file("no B", "missing_field", factors(b=LEFT_OUT), "lora_A.weight"),
    _file("a bias alone", "missing_field", factors(a=LEFT_OUT, b=LEFT_OUT, bias=ones(OUT)), "lora_A.weight"),
    _file("a tensor too many", "peft_unsupported", factors(more={"extra": ones(1)}), "extra"),
    _file("a base weight", "peft_unsupported", factors(more={f"{ODD}.weight": ones(OUT, IN)}), f"{ODD}.weight"),
    _file(
        "a DoRA vector",
        "peft_unsupported",
        factors(more={f"{ODD}.lora_magnitude_vector": ones(OUT)}),
        "lora_magnitude_vector",
    ),
    _file("an embedding", "peft_unsupported", factors(more={f"{ODD}.lora_embedding_A": ones(1, IN)}), "lora_embedding_A"),
    _file("a saved module", "peft_unsupported", factors(more={f"{ODD}.lora_A.bias": ones(1)}), "lora_A.bias"),
    _file("two modules", "peft_unsupported", factors(more={"other.lora_A.weight": ones(1, IN), "other.lora_B.weight": ones(OUT, 1)}), "other"),
    _file("factors of two modules", "peft_unsupported", factors(b=LEFT_OUT, more={"other.lora_A.weight": ones(1, IN)}), "other"),
    _file("a module of no name", "peft_unsupported", tensor_file({"lora_A.weight": ones(1, IN), "lora_B.weight": ones(OUT, 1)}), ".weight"),
    *(
        _file(
            f"a module called {module!a}",
            "invalid_name",
            tensor_file({f"{module}.lora_A.weight": ones(1, IN), f"{module}.lora_B.weight": ones(OUT, 1)}),
            TENSOR_FILE,
        )
        for module in ("../x", "a b", "a..b", ".a", "a\n", "a\0", "а", "a" * 300, "lin.*")  # noqa: RUF001
    ),
    _file("A of one dimension", "wrong_shape", factors(a=ones(OUT)), "lora_B.weight"),
    _file("B of one dimension", "wrong_shape", factors(b=ones(IN)), "lora_A.weight"),
    _file("B of three dimensions", "wrong_shape", factors(b=ones(1, IN, 1)), "lora_A.weight"),
    _file("B of no dimension", "wrong_shape", factors(b=ones()), "lora_A.weight"),
    _file("A of four dimensions", "wrong_shape", factors(a=ones(OUT, 1, 1, 1)), "lora_B.weight"),
    _file("A for another layer", "wrong_shape", factors(a=ones(OUT + 1, 1)), "(3, 1)"),
    _file("B for another layer", "wrong_shape", factors(b=ones(1, IN + 1)), "(1, 11)"),
    _file("factors of two ranks", "wrong_shape", factors(b=ones(2, IN)), "lora_A.weight"),
    _file("swapped factors", "wrong_shape", factors(a=ones(3, IN), b=ones(OUT, 3)), "swapped", r=3),
    _file("a bias of another length", "wrong_shape", factors(bias=ones(OUT + 1)), "lora_B.bias", lora_bias=True),
    _file("a bias of two dimensions", "wrong_shape", factors(bias=ones(OUT, 1)), "lora_B.bias", lora_bias=True),
    _file("rank 0", "out_of_range", factors(a=ones(OUT, 0), b=ones(0, IN)), "shape", r=0),
    _file("an empty A", "out_of_range", factors(a=ones(0, 1)), "(0, 1)"),
    _file(
        "a rank past the limit",
        "rank_too_large",
        factors(a=ones(OUT, MAX_RANK + 1), b=ones(MAX_RANK + 1, IN)),
        str(MAX_RANK),
        r=MAX_RANK + 1,
    ),
]  # fmt: skip

MADE_FOR = [
    _file(title, code, tensor_file({A_NAME: ones(OUT, 1), B_NAME: ones(1, IN)}, metadata=metadata), *says)
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

PAIRS = LENGTHS + HEADERS + ENTRIES + DTYPES + NOT_FINITE + TENSORS + MADE_FOR
CASES = [zipped for zipped, _ in PAIRS] + [in_parts for _, in_parts in PAIRS[::7]]
"""Both forms end in the same two files: parts for some of them."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_upload_is_refused_for(target: Target, case: Case) -> None:
    target.refuses(case)
