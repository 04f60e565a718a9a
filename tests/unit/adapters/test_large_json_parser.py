"""Large JSON is read like small JSON, with tables as arrays."""

import json
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.arrays import TruncatedList, matrix, vector
from adapters.errors import DuplicateKey, InvalidInput, LoraplexError, NotJson, OutOfRange, WrongShape, WrongType
from adapters.large_json import parser as large_json
from adapters.large_json.parser import read_large
from adapters.large_json.reader import read_in_process
from adapters.strict_json import parse

MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
NUMBERS = st.sampled_from([0, 1, -2, 0.5, 1e-300, 3.4e38, 12345678901234567890])
ODD = st.sampled_from([None, True, "a", "", [], [1], {"a": 1}, 1e39, 10**300, float("inf"), float("nan")])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of a few rows have several batches."""
    monkeypatch.setattr(large_json, "_BATCH_CHARACTERS", 30)


@st.composite
def tables(draw: st.DrawFn) -> list[Any]:
    """Rows of numbers, often all of one length, with or without faults."""
    width = draw(st.integers(1, 3))
    rows: list[Any] = draw(st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1, max_size=8))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        row = draw(st.integers(0, len(rows) - 1))
        if isinstance(rows[row], list) and rows[row] and draw(st.booleans()):
            rows[row][draw(st.integers(0, len(rows[row]) - 1))] = draw(ODD)
        else:
            rows[row] = draw(ODD | st.lists(NUMBERS, max_size=4))
    return rows


def _outcome(value: object, **shape: int) -> object:
    try:
        array = matrix(value, field="m", **shape)
        return array.shape, array.tobytes()
    except LoraplexError as error:
        return error.members()


@MANY
@given(table=tables(), shape=st.sampled_from([{}, {"columns": 2}, {"rows": 3}, {"max_rows": 4}]))
def test_a_table_is_taken_or_refused_as_the_list_that_it_is(table: list[Any], shape: dict[str, int]) -> None:
    text = json.dumps({"m": table})
    whole, large = parse(text.encode()), read_large(text)
    assert isinstance(whole, dict)
    assert isinstance(large, dict)
    assert _outcome(large["m"], **shape) == _outcome(whole["m"], **shape)


@MANY
@given(table=tables().filter(lambda table: isinstance(table[0], list)))
def test_a_table_whose_width_is_known_is_refused_while_it_is_read(table: list[Any]) -> None:
    text = json.dumps({"m": table})
    expected = _outcome(table, columns=2)
    if isinstance(expected, tuple):
        value = read_large(text, columns={"m": 2})
        assert isinstance(value, dict)
        assert _outcome(value["m"], columns=2) == expected
    else:
        with pytest.raises(InvalidInput) as raised:
            read_large(text, columns={"m": 2})
        # Of two faults it names the first batch's: one of another kind may be further on.
        assert raised.value.field == "m"


@MANY
@given(value=VALUES, indent=st.sampled_from([None, 2]), cut=st.sampled_from([0, 0, 1, 5]))
def test_everything_else_is_read_as_it_is(value: object, indent: int | None, cut: int) -> None:
    text = json.dumps(value, indent=indent)
    text = text[: len(text) - cut]
    try:
        expected = parse(text.encode())
    except NotJson as error:
        with pytest.raises(NotJson, match=re.escape(error.detail)):
            read_large(text)
    else:
        assert _same(read_large(text), expected)


def _same(large: Any, whole: Any) -> bool:
    if isinstance(large, TruncatedList):
        return len(large) == len(whole) and _outcome(large) == _outcome(whole)
    if isinstance(whole, dict):
        return large.keys() == whole.keys() and all(_same(large[key], whole[key]) for key in whole)
    if isinstance(whole, list):
        return len(large) == len(whole) and all(map(_same, large, whole))
    return type(large) is type(whole) and large == whole


@pytest.mark.parametrize("rows", [[["a"], [], ["b", "c"]], [[1, 2], [3]], [[], []]])
def test_targets_that_list_labels_stay_lists(rows: list[Any]) -> None:
    assert read_large(json.dumps({"data": {"targets": rows}})) == {"data": {"targets": rows}}


def test_a_key_twice_and_too_many_keys_end_the_reading() -> None:
    with pytest.raises(DuplicateKey):
        read_large('{"a":1,"b":2,"a":3,')
    many = ",".join(f'"k{number}":0' for number in range(large_json.MAX_KEYS + 1))
    with pytest.raises(OutOfRange, match="keys"):
        read_large("{" + many + "}")


@pytest.mark.parametrize(
    "text",
    [
        *('{"a":1,\n "b" 2}', '{"a":\n[1,;]}', '{"a":', "[[1],[2]\n\n", '{"a":1,}', '{"a" :1 , "b":2 x'),
        *('[{"a":1} 5]', "{ ", "[[1], ]", "[[1] 2", '{"a":1 ', '{"a":1}  x', '[{"a":1},', "[[1],[2", '"abc'),
        *('{"abc', '\ufeff{"a":1}', ""),
    ],
)
def test_malformed_json_is_the_error_of_the_exact_reading(text: str) -> None:
    with pytest.raises(NotJson) as expected:
        parse(text.encode())
    with pytest.raises(NotJson) as raised:
        read_large(text)
    assert raised.value.members() == expected.value.members()


def test_a_table_is_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "_BATCH_CHARACTERS", 2**15)
    rows, columns = 2**14, 2**6
    text = "[" + ",".join(["[" + ",".join(["1"] * columns) + "]"] * rows) + "]"
    tracemalloc.start()
    try:
        value: Any = read_large(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    numbers_NC = matrix(value, field="m")
    assert (numbers_NC.shape, float(numbers_NC.sum())) == ((rows, columns), rows * columns)
    assert peak < 1.6 * numbers_NC.nbytes


@pytest.mark.parametrize(("columns", "kind"), [({"m": 1}, WrongType), ({"m": 2}, WrongShape)])
def test_rows_of_long_lists_are_not_collected(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, int], kind: type[InvalidInput]
) -> None:
    monkeypatch.setattr(large_json, "_BATCH_CHARACTERS", 2**19)
    scanned: list[int] = []
    scan = large_json._scan

    def counted(text: str, at: int) -> tuple[Any, int]:
        scanned.append(at)
        return scan(text, at)

    monkeypatch.setattr(large_json, "_scan", counted)
    row = "[[" + ",".join(["1"] * 500_000) + "]]"
    with pytest.raises(kind, match="row 0"):
        read_large('{"m":[' + ",".join([row] * 10) + "]}", columns=columns)
    assert len(scanned) < 5


ONE_NUMBER_ROWS = ",".join(["[1]"] * 1000)
INPUTS = ",".join(["[1,2]"] * 10)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (f'"inputs":[{INPUTS}],"targets":[{ONE_NUMBER_ROWS},[', "more than 10 rows, more than data.inputs has"),
        (f'"targets":[{ONE_NUMBER_ROWS},[', "more than data.inputs has, or can have in a body of this length"),
    ],
)
def test_targets_with_more_rows_than_inputs_end_the_reading(data: str, said: str) -> None:
    with pytest.raises(WrongShape, match=said) as raised:
        read_large('{"data":{' + data, columns={"data.inputs": 2})
    assert raised.value.field == "data.targets"


def test_targets_may_have_as_many_rows_as_inputs_in_either_order() -> None:
    for order in ("inputs", "targets"), ("targets", "inputs"):
        content = {"inputs": "[1,1]", "targets": "[1]"}
        members = [f'"{name}":[' + ",".join([content[name]] * 1000) + "]" for name in order]
        value: Any = read_large('{"data":{' + ",".join(members) + "}}", columns={"data.inputs": 2})
        assert (len(value["data"]["inputs"]), len(value["data"]["targets"])) == (1000, 1000)


def test_another_table_with_far_too_many_rows_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "_MAX_ROWS", 100)
    with pytest.raises(OutOfRange, match="x has more than 100 rows"):
        read_large(f'{{"x":[{ONE_NUMBER_ROWS},[')
    value: Any = read_large(f'{{"x":[{ONE_NUMBER_ROWS}]}}', longest=1000)
    assert len(value["x"]) == 1000


def test_the_process_gives_back_what_it_read() -> None:
    rows = np.random.default_rng(0).standard_normal((500, 3))
    value = {
        "inputs": rows.tolist(),
        "targets": [f"class {row % 7}" for row in range(500)] * 4,
        "few": [1, 2.5, None, True, "ä", ["a"], {"b": []}],
        "long": list(range(3000)),
        "flat": [[[1]]],
        "huge": 10**450,
    }
    large: Any = read_in_process(json.dumps(value).encode(), longest=2000)
    assert np.array_equal(matrix(large["inputs"], field="inputs"), rows.astype(np.float32))
    assert (large["targets"], large["few"]) == (value["targets"], value["few"])
    assert large["huge"] == float("inf")
    with pytest.raises(InvalidInput, match="has 3000 numbers, expected 2"):
        vector(large["long"], field="long", length=2)
    with pytest.raises(OutOfRange, match="3000 entries"):
        set(large["long"])


@pytest.mark.parametrize("text", [b'{"a":1,"a":2}', b'{"a":', b"\xff", b"[[" * 1_000_000, b'{"a":"\x01"}'])
def test_an_error_in_the_process_is_the_error_of_the_exact_reading(text: bytes) -> None:
    with pytest.raises(LoraplexError) as expected:
        parse(text)
    with pytest.raises(type(expected.value)) as raised:
        read_in_process(text, longest=10)
    assert raised.value.members() == expected.value.members()


def test_a_body_that_takes_too_much_memory_is_refused() -> None:
    with pytest.raises(InvalidInput, match="memory"):
        read_in_process(b'{"labels":[' + b",".join([b'"ab"'] * 12_000_000) + b"]}", longest=10)
    with pytest.raises(OutOfRange, match="JSON"):
        read_in_process(b'{"groups":[' + b",".join([b'"abcdefgh"'] * 2_000_000) + b"]}", longest=10_000_000)
