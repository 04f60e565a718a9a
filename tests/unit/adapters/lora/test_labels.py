"""Labels: the rule for them, their place in an adapter's bytes and files, and what outputs say of classes."""

# N rows · C classes
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.special import expit
from scipy.special import softmax as scipy_softmax

from adapters.arrays import Float32
from adapters.errors import InvalidCombination, NotFinite, OutOfRange, WrongType
from adapters.lora.adapter import Adapter, from_canonical_bytes
from adapters.lora.labels import check_labels, most_probable, sigmoid, softmax
from adapters.peft.weights import MAX_HEADER_BYTES, read_peft, write_peft
from tests.support.dense_oracle import layer, random_adapter

MANY = settings(max_examples=300, deadline=None, derandomize=True, database=None)
FEW_VALUES = st.sampled_from([-1e30, -3.0, -1.0, -0.0, 0.0, 1e-30, 1.0, 1.0000001, 3.0, 88.0, 3e38])
OUTPUTS = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=FEW_VALUES | st.floats(-50, 50, width=32)
)
FACTORS = Adapter(torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5, 0.25, 3.0]]), None, 1.0)


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b"],
        ["x", "x" * 200, "é" * 200],
        [0, 1, 2],
        [2**53, -(2**53), 0],
        ["1", "01", "1.0", "true"],
        ["a", "A", " a", "😀:\n"],
    ],
)
def test_labels_are_taken_as_they_are(labels: list[str | int]) -> None:
    taken = check_labels(labels, field="labels", outputs=4)
    assert taken == tuple(labels)
    assert [type(label) for label in taken] == [type(label) for label in labels]


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (None, WrongType, "must be a list"),
        ("ab", WrongType, "must be a list"),
        ({"a": 1, "b": 2}, WrongType, "must be a list"),
        ([], OutOfRange, "0 entries"),
        (["a"], OutOfRange, "1 entries"),
        (list("abcde"), OutOfRange, "5 entries"),
        (["a", ""], OutOfRange, "position 1"),
        (["a", "b", "x" * 201], OutOfRange, "position 2: a label of 201 characters"),
        ([0, 2**53 + 1], OutOfRange, "position 1"),
        ([-(2**53) - 1, 0], OutOfRange, "position 0"),
        ([0, 10**400], OutOfRange, "position 1"),
        ([0, float("inf")], NotFinite, "position 1"),
        ([0, float("nan")], NotFinite, "position 1"),
        ([0, True], WrongType, "position 1"),
        ([False, True], WrongType, "position 0"),
        ([0, 1.0], WrongType, "position 1"),
        (["a", None], WrongType, "position 1"),
        ([["a"], ["b"]], WrongType, "position 0"),
        (["a", "\ud800"], WrongType, "position 1: has a lone surrogate"),
        (["a", 1], InvalidCombination, "position 1"),
        ([1, 2, "a"], InvalidCombination, "position 2"),
        (["a", "b", "a"], InvalidCombination, "position 2: a is already at position 0"),
        ([7, 8, 8], InvalidCombination, "position 2: 8 is already at position 1"),
    ],
)
def test_what_are_no_labels_is_refused_by_position(labels: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as refused:
        check_labels(labels, field="names", outputs=4)
    assert type(refused.value) is error
    assert refused.value.field == "names"  # type: ignore[attr-defined]  # of every error of ours


@pytest.mark.parametrize(("labels", "text"), [(("no", "é"), '["no","\\u00e9"]'), ((7, -1), "[7,-1]")])
def test_labels_are_in_the_bytes_that_an_adapter_is_stored_as(labels: tuple[str | int, ...], text: str) -> None:
    about = f'{{"alpha":1.0,"format":1,"labels":{text},"rslora":false}}'
    header = {
        "__metadata__": {"loraplex": about},
        "A": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "B": {"dtype": "F32", "shape": [1, 3], "data_offsets": [8, 20]},
    }
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    adapter = replace(FACTORS, labels=labels)
    by_hand = struct.pack("<Q", len(written)) + written + struct.pack("<5f", 1.0, -2.0, 0.5, 0.25, 3.0)
    assert adapter.canonical_bytes == by_hand
    assert from_canonical_bytes(by_hand).labels == labels
    assert adapter.digest != FACTORS.digest
    assert from_canonical_bytes(FACTORS.canonical_bytes).labels is None


def _there_and_back(adapter: Adapter) -> tuple[dict[str, bytes], Adapter]:
    base = layer(torch.ones(adapter.a_OR.shape[0], adapter.b_RI.shape[1]))
    files = write_peft(adapter, module="linear", base_fingerprint=base.fingerprint)
    config, tensors = files["adapter_config.json"], files["adapter_model.safetensors"]
    return files, read_peft(config, tensors, base=base, feature_space=adapter.feature_space, max_rank=9)[0]


@pytest.mark.parametrize("labels", [("yes", "no", "maybé"), (10, -3), tuple(f"class {k}" for k in range(4)), None])
def test_labels_go_to_peft_and_come_back(labels: tuple[str | int, ...] | None) -> None:
    adapter = replace(random_adapter(4, 3, 2, bias=True), labels=labels, feature_space="encodeur é@2")
    _, back = _there_and_back(adapter)
    assert back.labels == labels
    assert back.digest == adapter.digest


def test_labels_that_peft_s_header_has_no_room_for_are_left_out_of_a_download() -> None:
    adapter = random_adapter(1000, 3, 1)
    for length, fits in ((50, True), (70, False)):
        labelled = replace(adapter, labels=tuple(f"{k:0{length}}" for k in range(1000)))
        files, back = _there_and_back(labelled)
        assert int.from_bytes(files["adapter_model.safetensors"][:8], "little") <= MAX_HEADER_BYTES
        assert back.digest == (labelled if fits else adapter).digest


@MANY
@given(OUTPUTS)
def test_probabilities_are_scipy_s(x_NC: Float32) -> None:
    for given_NC, wanted_NC in (
        (softmax(x_NC), scipy_softmax(x_NC.astype(np.float64), axis=1)),
        (sigmoid(x_NC), expit(x_NC.astype(np.float64))),
    ):
        assert given_NC.dtype == np.float32
        np.testing.assert_allclose(given_NC, wanted_NC, rtol=1e-6, atol=1e-44)


def _by_hand(row: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda index: (-row[index], index))[:count]


@MANY
@given(OUTPUTS, st.integers(1, 9))
def test_the_most_probable_come_first_and_ties_go_to_the_lower_index(x_NC: Float32, count: int) -> None:
    order_NT = most_probable(x_NC, count)
    assert order_NT.tolist() == [_by_hand(row, count) for row in x_NC.tolist()]
    for probability_NC in (softmax(x_NC), sigmoid(x_NC)):
        assert (np.diff(np.take_along_axis(probability_NC, order_NT, axis=1), axis=1) <= 0).all()


def test_outputs_that_differ_by_less_than_their_probabilities_show_are_in_their_own_order() -> None:
    x_NC = np.array([[0.0, -2000.0, -1000.0]], np.float32)
    assert softmax(x_NC).tolist() == [[1.0, 0.0, 0.0]]
    assert most_probable(x_NC, 3).tolist() == [[0, 2, 1]]
