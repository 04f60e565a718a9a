"""`adapter_model.safetensors` that lies about itself: its length, its header, its entries."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import A_NAME, B_NAME, IN, LEFT_OUT, OUT, TENSOR_FILE, Raw, factors, safetensors
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.upload_forms import Both, cases, tensors

B_ENTRY = {"dtype": "F32", "shape": [1, IN], "data_offsets": [0, 4 * IN]}
A_ENTRY = {"dtype": "F32", "shape": [OUT, 1], "data_offsets": [4 * IN, 4 * IN + 4 * OUT]}
CONTENT = b"\0\0\x80\x3f" * (IN + OUT)


def _header(title: str, header: dict[str, Any] | bytes, *says: str, content: bytes = CONTENT) -> Both:
    """A file with a header of its own, which is at fault."""
    return tensors(title, "invalid_safetensors", safetensors(header, content), *says or (TENSOR_FILE,))


def _entry(title: str, **changes: Any) -> Both:
    """A good file, but for what its header says of B."""
    entry = {key: value for key, value in (B_ENTRY | changes).items() if value is not LEFT_OUT}
    return _header(title, {B_NAME: entry, A_NAME: A_ENTRY})


LENGTHS = [
    tensors("an empty file", "invalid_safetensors", b"", TENSOR_FILE),
    tensors("seven bytes", "invalid_safetensors", b"\0" * 7, TENSOR_FILE),
    tensors("eight bytes of nothing", "invalid_safetensors", b"\0" * 8, TENSOR_FILE),
    tensors("a header that ends past the end", "invalid_safetensors", safetensors(b"{}", length=3), TENSOR_FILE),
    tensors("a header of 2^62 bytes", "invalid_safetensors", safetensors(b"{}", length=2**62), TENSOR_FILE),
    tensors("a header of 2^63 bytes", "invalid_safetensors", safetensors(b"{}", length=2**63), TENSOR_FILE),
    tensors("a header of 2^64 - 1 bytes", "invalid_safetensors", safetensors(b"{}", length=2**64 - 1), TENSOR_FILE),
    tensors("a header cut in two", "invalid_safetensors", safetensors(b'{"a": {}}', length=4), TENSOR_FILE),
    _header("a header past 64 KiB", b"{}" + b" " * 65_535, "65537", "header"),
    _header("metadata past 64 KiB", {"__metadata__": {"x": "y" * 70_000}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}, "header"),
    tensors("a pickle", "invalid_safetensors", b"\x80\x02}q\0.PK\x03\x04" * 9, TENSOR_FILE),
    tensors("a file cut short", "invalid_safetensors", factors()[:-1], TENSOR_FILE),
    tensors("a file with a byte too many", "invalid_safetensors", factors() + b"\0", TENSOR_FILE),
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
    _header(
        "metadata of ours that are not JSON", {"__metadata__": {"loraplex": "{"}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}
    ),
    _header("metadata of ours with a key twice", {"__metadata__": {"loraplex": '{"a":1,"a":1}'}, B_NAME: B_ENTRY}),
    _header(
        "metadata of ours nested deeply", {"__metadata__": {"loraplex": "[" * 20_000}, B_NAME: B_ENTRY, A_NAME: A_ENTRY}
    ),
    _header("metadata of ours with a lone surrogate", {"__metadata__": {"loraplex": "\ud800"}, B_NAME: B_ENTRY}),
    _header("a name that is a lone surrogate", {"\ud800": B_ENTRY, A_NAME: A_ENTRY}),
    _header("an entry that is a list", {B_NAME: [1, IN], A_NAME: A_ENTRY}),
    _header("an entry that is null", {B_NAME: None, A_NAME: A_ENTRY}),
]

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


@pytest.mark.parametrize("case", cases(LENGTHS + HEADERS + ENTRIES), ids=lambda case: case.name)
def test_an_upload_is_refused_for(target: Target, case: Case) -> None:
    target.refuses(case)
