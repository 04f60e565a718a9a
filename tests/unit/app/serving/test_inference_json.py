"""The fast reading of an infer request in JSON against the exact one."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.arrays import Float32
from adapters.errors import LoraplexError
from app.serving.oip.request import MAX_CACHED_BYTES, InferHeader, read_exactly, read_header_cached, read_infer_fast
from tests.unit.app.serving.test_request import AWKWARD, MANY, MAX_ROWS, NUMBERS, TOKENS

I = 3
MORE_TOKENS = [*TOKENS, b'"data":', b'"data"', b'"d\\u0061ta":[1,2,3],', b'\\"data\\":[', b'"id":"', b'"shape":[1,3],']


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Mostly good bodies, flat and nested, with a value or some bytes gone wrong in many."""
    rows = draw(st.integers(1, MAX_ROWS))
    data: Any = [[draw(NUMBERS) for _ in range(I)] for _ in range(rows)]
    if draw(st.booleans()):
        data = [number for row in data for number in row]
    if draw(st.sampled_from([False, False, True])):
        holder = data[0] if isinstance(data[0], list) and draw(st.booleans()) else data
        change = draw(st.sampled_from(["swap", "longer", "shorter"]))
        if change == "swap":
            holder[draw(st.integers(0, len(holder) - 1))] = draw(AWKWARD)
        elif change == "longer":
            holder.append(draw(NUMBERS))
        else:
            holder.pop()
    datatype = draw(st.sampled_from(["FP32", "FP32", "FP64", "FP16", "BF16", "INT8"]))
    tensor = [("name", "inputs"), ("shape", [rows, I]), ("datatype", datatype), ("data", data)]
    tensor += draw(st.sampled_from([[], [], [("parameters", {"binary_data_size": 12})], [("data", [])]]))
    request = [("inputs", [tensor])]
    request += draw(
        st.sampled_from(
            [
                [],
                [("id", "7")],
                [("id", "data")],
                [("id", 'x"data')],
                [("id", '"data":[1]')],
                [("outputs", [[("name", "outputs")]])],
                [("outputs", [[("name", "outputs"), ("data", [1])]])],
                [("parameters", [("binary_data_output", True)])],
                [("parameters", [("data", [1])])],
            ]
        )
    )

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], tuple):
            return (
                "{"
                + ",".join(f"{json.dumps(name)}:{text(inner)}" for name, inner in draw(st.permutations(value)))
                + "}"
            )
        return "[" + ",".join(map(text, value)) + "]" if isinstance(value, list) else json.dumps(value)

    body = text(request).encode()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, end = draw(st.integers(0, len(body))), draw(st.sampled_from([0, 0, 1, 3]))
        body = body[:at] + draw(st.sampled_from(MORE_TOKENS)) + body[at + end :]
    return body


def _exactly(body: bytes) -> tuple[InferHeader, Float32] | None:
    try:
        return read_exactly(body, None, I, MAX_ROWS)
    except LoraplexError:
        return None


def _without_data(header: InferHeader) -> list[object]:
    return [getattr(header, name) for name in InferHeader.__slots__ if name != "data"]


@MANY
@given(bodies())
def test_what_the_fast_reading_takes_the_exact_one_takes_and_reads_the_same(body: bytes) -> None:
    quick = read_infer_fast(body, I, MAX_ROWS)
    if quick is not None:
        exact = _exactly(body)
        assert exact is not None, body
        assert _without_data(quick[0]) == _without_data(exact[0]), body
        assert quick[1].tobytes() == exact[1].tobytes(), body
        assert quick[1].shape == exact[1].shape


def test_only_what_is_short_is_remembered() -> None:
    def body(around: int) -> bytes:
        tensor = {"name": "inputs", "shape": [1, I], "datatype": "FP32", "data": [1, 2, 3]}
        return json.dumps({"id": "x" * around, "inputs": [tensor]}).encode()

    assert read_infer_fast(body(around=100), I, MAX_ROWS) is not None
    read_header_cached.cache_clear()
    assert read_infer_fast(body(around=MAX_CACHED_BYTES), I, MAX_ROWS) is None
    assert read_header_cached.cache_info().currsize == 0


def test_parameters_that_have_no_meaning_where_they_are_may_have_any_value() -> None:
    others = {"x": 1.5, "shared_memory": "r", "data": "d"}
    tensor = {"name": "inputs", "shape": [1, I], "datatype": "FP32", "data": [1, 2, 3]}
    request = {
        "parameters": others | {"shared_memory_region": "r", "binary_data": "yes"},
        "inputs": [tensor | {"parameters": others | {"binary_data": 1, "binary_data_output": "yes"}}],
        "outputs": [{"name": "outputs", "parameters": others | {"binary_data_output": 1, "binary_data_size": "x"}}],
    }

    header, inputs_NI = read_exactly(json.dumps(request).encode(), None, I, MAX_ROWS)

    assert inputs_NI.tolist() == [[1, 2, 3]]
    assert not header.binary_output


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_fast_reading_takes_what_clients_send(nested: bool, indent: int | None) -> None:
    for rows in range(1, MAX_ROWS + 1):
        wanted_NI = np.random.default_rng(rows).standard_normal((rows, I))
        data = wanted_NI.tolist() if nested else wanted_NI.reshape(-1).tolist()
        tensor = {"name": "inputs", "shape": [rows, I], "datatype": "FP32", "data": data}
        request = {
            "id": "7",
            "inputs": [tensor],
            "outputs": [{"name": "outputs", "parameters": {"binary_data": False}}],
        }

        quick = read_infer_fast(json.dumps(request, indent=indent).encode(), I, MAX_ROWS)

        assert quick is not None
        assert np.array_equal(quick[1], wanted_NI.astype(np.float32))
        assert (quick[0].id, quick[0].rows, quick[0].binary_output) == ("7", rows, False)
