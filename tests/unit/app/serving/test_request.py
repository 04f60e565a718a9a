"""The fast reading of a predict body against the exact one, which decides whatever the fast one does not take."""

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import LoraplexError
from adapters.lora.base_layer import load_base_layer
from adapters.strict_json import parse
from app.serving.request import InferenceRequest, read_fast, request_from_json

BASE = load_base_layer("random:3,2,1")
MAX_ROWS = 5
MANY = settings(max_examples=700, deadline=None, derandomize=True, database=None)

NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -0.0, 1e-400, 5e-324, 1e39, 3.4028235677973366e38, 3.4028235e38, 2**63, 2**64, 16777217]),
)
REFERENCES = st.none() | st.sampled_from(
    ["acme", "acme@3", "acme@live", "b-2.c_d", "a[b", 'q"', "\\", "é", "", "a@0", 7]
)
WANTED: list[list[tuple[str, Any]]] = [
    [("return", ["outputs"])],
    [("return", ["labels", "probabilities"])],
    [("top_k", 2), ("return", ["labels"])],
]
AWKWARD = st.sampled_from([True, None, "1", [], {}, [1.0], {"a": 1}, [[1]], "NaN"])
TOKENS = [
    token.encode("latin-1")
    for token in (
        *("[", "]", "{", "}", ",", ":", '"', "\\", "1", "-", ".", "e", " ", "\n", "\x00", "\xff", "\xef\xbb\xbf"),
        *("NaN", "Infinity", "null", "true", "1e400", "01", "[]", "[[1]]", '"adapter":', '"inputs":', "\\u0061"),
    )
]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Mostly good bodies, with a value or some bytes gone wrong in many."""
    rows: Any = [[draw(NUMBERS) for _ in range(3)] for _ in range(draw(st.integers(1, MAX_ROWS)))]
    if draw(st.booleans()):
        row = draw(st.integers(0, len(rows) - 1))
        spoil = draw(st.sampled_from(["none", "swap", "longer", "shorter", "row", "inputs"]))
        if spoil == "swap":
            rows[row][draw(st.integers(0, 2))] = draw(AWKWARD)
        elif spoil == "longer":
            rows[row].append(draw(NUMBERS))
        elif spoil == "shorter":
            rows[row].pop()
        elif spoil == "row":
            rows[row] = draw(AWKWARD)
        elif spoil == "inputs":
            rows = draw(AWKWARD)
    members: list[tuple[str, Any]] = [("inputs", rows)]
    if draw(st.booleans()):
        members.append(("adapter", draw(REFERENCES)))
    else:
        count = len(rows) if isinstance(rows, list) else 1
        members.append(("adapters", [draw(REFERENCES) for _ in range(count + draw(st.sampled_from([0, 0, 0, 1, -1])))]))
    members += draw(
        st.sampled_from([[], [], [], [("adapter", None)], [("inputs", [[1, 2, 3]])], [("more", 1)], *WANTED])
    )
    members = draw(st.permutations(members))
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in members) + "}"
    body = text.encode()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, end = draw(st.integers(0, len(body))), draw(st.sampled_from([0, 0, 1, 3]))
        body = body[:at] + draw(st.sampled_from(TOKENS)) + body[at + end :]
    return body


def _exactly(body: bytes) -> InferenceRequest | None:
    try:
        return request_from_json(parse(body), BASE, max_rows=MAX_ROWS)
    except LoraplexError:
        return None


def _same(quick: InferenceRequest, exact: InferenceRequest) -> bool:
    return (
        quick.inputs_NI.tobytes() == exact.inputs_NI.tobytes()
        and quick.inputs_NI.shape == exact.inputs_NI.shape
        and list(quick.references) == list(exact.references)
        and (quick.by_row, quick.options) == (exact.by_row, exact.options)
    )


@MANY
@given(bodies())
def test_what_the_fast_reading_takes_the_exact_one_takes_and_reads_the_same(body: bytes) -> None:
    quick = read_fast(body, BASE, max_rows=MAX_ROWS)
    if quick is not None:
        exact = _exactly(body)
        assert exact is not None, body
        assert _same(quick, exact), body


@pytest.mark.parametrize("by_row", [False, True])
def test_the_fast_reading_takes_what_clients_send(by_row: bool) -> None:
    order = random.Random(5)
    for rows in range(1, MAX_ROWS + 1):
        inputs = [[order.gauss(0, 1) * 10 ** order.randint(-30, 30), order.randint(-99, 99), 0.5] for _ in range(rows)]
        which = {"adapters": [None, "acme", "b@2", "c@live", "d"][:rows]} if by_row else {"adapter": "acme"}
        for text in (json.dumps({"inputs": inputs} | which), json.dumps(which | {"inputs": inputs}, indent=2)):
            quick = read_fast(text.encode(), BASE, max_rows=MAX_ROWS)
            assert quick is not None
            assert np.array_equal(quick.inputs_NI, np.array(inputs).astype(np.float32))
            assert _same(quick, request_from_json(parse(text.encode()), BASE, max_rows=MAX_ROWS))


@pytest.mark.parametrize(
    "body",
    [
        b'{"adapter":null,"inputs":[[[1,2],[],3]]}',
        b'{"adapter":null,"inputs":[[[1,2],3,[]],[4,5,6]]}',
        b'{"adapter":null,"inputs":[[1,2],[3,4,5,6]]}',
        b'{"adapter":null,"adapter":null,"inputs":[[1,2,3]]}',
        b'{"adapter":null,"\\u0061dapter":null,"inputs":[[1,2,3]]}',
        b'{"adapter":null,"inputs":[[1,2,3]],"inputs":[[1,2,3]]}',
        b'\xef\xbb\xbf{"adapter":null,"inputs":[[1,2,3]]}',
        b'{"adapter":null,"inputs":[[1,2,1e39]]}',
        b'{"adapter":null,"inputs":[[1,2,true]]}',
        b'{"adapter":null,"inputs":[[1,2,null]]}',
        b'{"adapter":null,"inputs":[[1,2,"3"]]}',
        b'{"adapters":[null,null],"inputs":[[1,2,3]]}',
        b'{"adapters":[[null]],"inputs":[[1,2,3]]}',
        b'{"adapters":"a","inputs":[[1,2,3]]}',
        b'{"adapters":{"a":1},"inputs":[[1,2,3]]}',
        b'{"adapter":null,"inputs":[]}',
        b'{"adapter":null,"inputs":[{"a":1,"b":2,"c":3}]}',
        b"[[1,2,3]]",
        b"",
    ],
)
def test_the_fast_reading_leaves_to_the_exact_one_what_that_refuses(body: bytes) -> None:
    assert _exactly(body) is None
    assert read_fast(body, BASE, max_rows=MAX_ROWS) is None


@pytest.mark.parametrize("which", [{"adapter": None}, {"adapters": ["acme"]}])
@pytest.mark.parametrize("asked", WANTED)
def test_the_fast_reading_leaves_to_the_exact_one_what_is_to_be_answered_otherwise(
    which: dict[str, Any], asked: list[tuple[str, Any]]
) -> None:
    body = json.dumps(which | {"inputs": [[1, 2, 3]]} | dict(asked)).encode()
    assert read_fast(body, BASE, max_rows=MAX_ROWS) is None
    exact = _exactly(body)
    assert exact is not None
    wanted = dict(asked)
    if wanted["return"] == ["outputs"]:
        assert exact.options is None
    else:
        assert exact.options is not None
        assert set(exact.options.members) == set(wanted["return"])
        assert exact.options.top_k == wanted.get("top_k")


def test_a_number_past_64_bits_is_read_by_the_exact_one() -> None:
    body = b'{"adapter":null,"inputs":[[1,2,%d]]}' % 10**30
    assert read_fast(body, BASE, max_rows=MAX_ROWS) is None
    exact = _exactly(body)
    assert exact is not None
    assert exact.inputs_NI[0, 2] == np.float32(1e30)
