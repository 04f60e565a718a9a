"""`POST /v2/models/{name}/infer` with bad tensors, as JSON and as bytes."""

import struct
from itertools import chain
from typing import Any

import pytest

from adapters.errors import LoraplexError
from app.serving.oip.request import check_model_name, read_exactly
from tests.integration.hostile.bodies import IN, JSON, LEFT_OUT, NOT_FINITE, NOT_NUMBERS, ROW, Raw, to_json, with_number
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.conftest import MAX_ROWS

LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/acme/infer"
CONTENT = struct.pack(f"<{IN}f", *ROW)
HUGE = 2**63


def named(value: object) -> str:
    """A value as the name of a test has it."""
    return "nothing" if value is LEFT_OUT else ascii(value)[:40]


def infer(title: str, code: str, /, *says: str, body: bytes, length: object = LEFT_OUT, **more: Any) -> Case:
    """A case of an infer request, with this header length where it has one."""
    headers = {"Content-Type": JSON} | more.pop("headers", {})
    if length is not LEFT_OUT:
        headers[LENGTH] = str(length)
    path = more.pop("path", INFER)
    return Case(name=title, method="POST", path=path, code=code, says=says, body=body, headers=headers, **more)


def _in_json(title: str, code: str, /, *says: str, request: object = LEFT_OUT, **changes: Any) -> Case:
    """A request with its numbers in JSON; `changes` are to its one input."""
    tensor = {"name": "inputs", "shape": [1, IN], "datatype": "FP32", "data": ROW} | changes
    whole = {"inputs": [tensor]} if request is LEFT_OUT else request
    return infer(title, code, *says, body=to_json(whole))


def _with(title: str, code: str, /, *says: str, **fields: Any) -> Case:
    """A good request with these fields beside its input."""
    tensor = {"name": "inputs", "shape": [1, IN], "datatype": "FP32", "data": ROW}
    return infer(title, code, *says, body=to_json({"inputs": [tensor]} | fields))


def _in_binary(title: str, code: str, /, *says: str, content: bytes = CONTENT, **changes: Any) -> Case:
    """A request with its numbers as bytes, and an honest header length."""
    own = {"name": "inputs", "shape": [1, IN], "datatype": "FP32", "parameters": {"binary_data_size": len(content)}}
    text = to_json({"inputs": [own | changes]})
    return infer(title, code, *says, body=text + content, length=len(text))


SHAPES = [
    _in_json(f"take {named(shape)} for the shape", code, "shape", *says, shape=shape)
    for shape, code, says in (
        (LEFT_OUT, "missing_field", ["missing"]),
        (None, "wrong_type", ["null"]),
        ("[1, 10]", "wrong_type", ["[1, 10]"]),
        (IN, "wrong_type", ["10"]),
        ({"0": 1}, "wrong_type", []),
        ([1.0, IN], "wrong_type", ["1.0"]),
        ([True, IN], "wrong_type", ["true"]),
        (["1", IN], "wrong_type", []),
        ([None, IN], "wrong_type", ["null"]),
        ([[1], IN], "wrong_type", []),
        ([Raw("1e400"), IN], "wrong_type", ["Infinity"]),
        ([Raw("NaN"), IN], "wrong_type", ["NaN"]),
        ([Raw("9" * 5000), IN], "wrong_type", ["Infinity"]),
        ([], "wrong_shape", ["[]"]),
        ([IN], "wrong_shape", ["[10]"]),
        ([1, 1, IN], "wrong_shape", ["[1, 1, 10]"]),
        ([1] * 100_000, "wrong_shape", []),
        ([0, IN], "wrong_shape", ["[0, 10]"]),
        ([-1, IN], "wrong_shape", ["[-1, 10]"]),
        ([-1, -IN], "wrong_shape", ["[-1, -10]"]),
        ([1, IN - 1], "wrong_shape", ["[1, 9]"]),
        ([IN, 1], "wrong_shape", ["[10, 1]"]),
        ([1, 0], "wrong_shape", ["[1, 0]"]),
        ([1, HUGE], "wrong_shape", [str(HUGE)]),
        ([HUGE, IN], "out_of_range", [str(HUGE)]),
        ([10**300, IN], "out_of_range", ["[1000000"]),
        ([MAX_ROWS + 1, IN], "out_of_range", [str(MAX_ROWS + 1)]),
    )
]

DATATYPES = [
    _in_json(f"take {named(datatype)} for the datatype", code, "datatype", *says, datatype=datatype)
    for datatype, code, says in (
        (LEFT_OUT, "missing_field", []),
        (None, "wrong_type", ["null"]),
        (32, "wrong_type", ["32"]),
        ("fp32", "out_of_range", ["fp32", "FP32"]),
        ("INT32", "out_of_range", ["INT32"]),
        ("BYTES", "out_of_range", ["BYTES"]),
        ("", "out_of_range", []),
        ("FP32\0", "out_of_range", []),
        ("x" * 100_000, "out_of_range", ["xxxx"]),
    )
] + [
    _in_json("take BF16 as JSON", "invalid_combination", "BF16", datatype="BF16"),
    _in_binary("take FP32 for FP64", "wrong_shape", "80 bytes", "is 40", datatype="FP64"),
    _in_binary("take FP32 for FP16", "wrong_shape", "20 bytes", datatype="FP16"),
    _in_binary("take FP32 for BF16", "wrong_shape", "20 bytes", datatype="BF16"),
]

NUMBERS = (
    [
        _in_json(f"take {name}, {form}", "not_finite", "row 1, column 3", shape=[3, IN], data=data)
        for name, number in NOT_FINITE.items()
        for form, data in (
            ("nested", with_number(3, 1, 3, number)),
            ("flat", list(chain.from_iterable(with_number(3, 1, 3, number)))),
        )
    ]
    + [
        _in_json(f"take {name} for a number, {form}", "wrong_type", "column 3", data=data)
        for name, value in (NOT_NUMBERS | {"null": None, "a lone surrogate": "\ud800"}).items()
        for form, data in (("nested", with_number(1, 0, 3, value)), ("flat", with_number(1, 0, 3, value)[0]))
    ]
    + [
        _in_json("take 1e300 as FP64", "not_finite", "row 0", datatype="FP64", data=[*ROW[1:], 1e300]),
        _in_json(
            "take 65520 as FP16", "not_finite", "row 0, column 9", "FP16", datatype="FP16", data=[*ROW[1:], 65520]
        ),
        _in_json("answer past float32", "output_not_finite", "row 1", shape=[2, IN], data=[ROW, [3e38] * IN]),
    ]
)

BAD_BITS: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "FP32": (
        struct.pack("<f", 1),
        {
            "NaN": b"\0\0\xc0\x7f",
            "a signalling NaN": b"\1\0\x80\x7f",
            "infinity": b"\0\0\x80\x7f",
            "-infinity": b"\0\0\x80\xff",
        },
    ),
    "FP64": (
        struct.pack("<d", 1),
        {name: struct.pack("<d", float(name)) for name in ("NaN", "1e300", "-1e39", "3.5e38", "Infinity")},
    ),
    "FP16": (b"\0\x3c", {"NaN": b"\0\x7e", "a signalling NaN": b"\1\x7c", "infinity": b"\0\x7c"}),
    "BF16": (b"\x80\x3f", {"NaN": b"\xc0\x7f", "-infinity": b"\x80\xff"}),
}
"""By datatype: the bytes of 1, and bytes of what is no finite float32."""
BITS = [
    _in_binary(
        f"take {name} in {datatype} bytes",
        "not_finite",
        "row 1, column 3",
        content=one * (IN + 3) + bad + one * (IN - 4),
        shape=[2, IN],
        datatype=datatype,
    )
    for datatype, (one, bits) in BAD_BITS.items()
    for name, bad in bits.items()
]

DATA = [
    _in_json(f"take {title}", code, *says, **changes)
    for title, code, says, changes in (
        ("no data", "missing_field", ["either data or the parameter binary_data_size"], {"data": LEFT_OUT}),
        ("null for data", "wrong_type", ["inputs.data", "null"], {"data": None}),
        ("a string for data", "wrong_type", ["inputs.data"], {"data": "0123456789"}),
        ("an object for data", "wrong_type", ["inputs.data"], {"data": {"0": 1}}),
        ("empty data", "wrong_shape", ["0 numbers"], {"data": []}),
        ("too few numbers", "wrong_shape", ["9 numbers", "expected 10"], {"data": ROW[1:]}),
        ("too many numbers", "wrong_shape", ["11 numbers"], {"data": [*ROW, 1]}),
        ("numbers of another shape", "wrong_shape", ["10 numbers", "expected 20"], {"shape": [2, IN]}),
        ("too few rows", "wrong_shape", ["1 rows, expected 2"], {"shape": [2, IN], "data": [ROW]}),
        ("too many rows", "wrong_shape", ["2 rows, expected 1"], {"data": [ROW, ROW]}),
        ("ragged rows", "wrong_shape", ["row 1", "9 numbers"], {"shape": [2, IN], "data": [ROW, ROW[1:]]}),
        ("ragged rows that add up", "wrong_shape", ["row 0"], {"shape": [2, IN], "data": [ROW[1:], [*ROW, 1]]}),
        ("rows nested once more", "wrong_shape", ["1 numbers"], {"data": [[ROW]]}),
        ("a row among numbers", "wrong_type", ["column 9"], {"data": [*ROW[1:], ROW]}),
        ("numbers after a row", "wrong_type", ["row 1"], {"shape": [2, IN], "data": [ROW, 1]}),
    )
]

FIELDS = [
    _in_json("take no inputs", "missing_field", "inputs", request={}),
    _in_json("take null for inputs", "wrong_type", "inputs", "null", request={"inputs": None}),
    _in_json("take an object for inputs", "wrong_type", "inputs", request={"inputs": {"name": "inputs"}}),
    _in_json("take an empty list of inputs", "wrong_shape", "0 tensors", request={"inputs": []}),
    _in_json("take a number for an input", "wrong_type", "inputs", "7", request={"inputs": [7]}),
    _in_json("take an input twice", "wrong_shape", "2 tensors", request={"inputs": [{"name": "inputs"}] * 2}),
    _in_json("take a list for the request", "wrong_type", "the request", request=[{"inputs": []}]),
    _in_json("take null for the request", "wrong_type", "the request", request=None),
    _in_json("take an input without a name", "missing_field", "inputs.name", name=LEFT_OUT),
    _in_json("take an input of another name", "unknown_field", "x_1", name="x_1"),
    _in_json("take an input of no name", "wrong_type", "inputs", name=None),
    _in_json("take an unknown field of an input", "unknown_field", "dtype", dtype="FP32"),
    _in_json("take null for an input's parameters", "wrong_type", "inputs.parameters", parameters=None),
    _in_json("take shared memory", "invalid_input", "shared_memory_region", parameters={"shared_memory_region": "r"}),
    _with("take an unknown field", "unknown_field", "input", input=[]),
    _with("take a number for the id", "wrong_type", "id", id=7),
    _with("take null for the id", "wrong_type", "id", "null", id=None),
    _with("take the name of another model", "invalid_combination", "globex", "acme", model_name="globex"),
    _with("take a list for parameters", "wrong_type", "parameters", parameters=[]),
    _with("take a list for a parameter", "wrong_type", "parameters.x", parameters={"x": []}),
    _with("take a string for a flag", "wrong_type", "binary_data_output", parameters={"binary_data_output": "yes"}),
    _with("take 1 for a flag", "wrong_type", "binary_data_output", parameters={"binary_data_output": 1}),
    _with("take a time-out in the past", "wrong_type", "timeout", parameters={"timeout": -1}),
    _with("take a time-out of 1.5 µs", "wrong_type", "timeout", parameters={"timeout": 1.5}),
    _with("take true for a time-out", "wrong_type", "timeout", parameters={"timeout": True}),
    _with("take null for outputs", "wrong_type", "outputs", outputs=None),
    _with("take a string for an output", "wrong_type", "outputs", outputs=["outputs"]),
    _with("take an output without a name", "missing_field", "outputs.name", outputs=[{}]),
    _with("give an output that there is not", "unknown_field", "logits", outputs=[{"name": "logits"}]),
    _with("give an output twice", "invalid_combination", "2 tensors", outputs=[{"name": "outputs"}] * 2),
    _with("take an output's data", "unknown_field", "data", outputs=[{"name": "outputs", "data": []}]),
    *(
        _with(title, code, key, outputs=[{"name": "outputs", "parameters": {key: value}}])
        for title, code, key, value in (
            ("take a string for the number of classes", "wrong_type", "classification", "3"),
            ("answer into shared memory", "invalid_input", "shared_memory_region", "r"),
            ("take a string for an output's flag", "wrong_type", "binary_data", "true"),
            ("take null for an output's flag", "wrong_type", "binary_data", None),
        )
    ),
]


@pytest.mark.parametrize("case", SHAPES + DATATYPES + NUMBERS + BITS + DATA + FIELDS, ids=lambda case: case.name)
def test_infer_refuses_to(target: Target, case: Case) -> None:
    target.refuses_in_protocol(case)


def check_code(case: Case) -> None:
    """Fails unless the error has the code of the case, which the log and the traces have; the answer does not."""
    with pytest.raises(LoraplexError) as raised:
        _read(case)
    assert raised.value.code == case.code, raised.value


def _read(case: Case) -> None:
    assert isinstance(case.body, bytes)
    length = case.headers.get(LENGTH)
    header, _ = read_exactly(case.body, None if length is None else int(length), IN, MAX_ROWS)
    check_model_name(header, "acme")


@pytest.mark.parametrize("case", SHAPES + DATATYPES + BITS + DATA + FIELDS, ids=lambda case: case.name)
def test_the_log_has_the_code_of_who_tries_to(case: Case) -> None:
    check_code(case)
