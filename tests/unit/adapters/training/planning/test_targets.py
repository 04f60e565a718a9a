"""Targets in a request: what is read, and what is refused at which row."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adapters.errors import OutOfRange, WrongShape, WrongType
from adapters.training.planning.targets import TargetReader
from adapters.training.settings import Loss

READER = TargetReader(loss=Loss.CROSS_ENTROPY, outputs=3, labels=None, field="data.targets")


def test_integers_are_indices_of_outputs() -> None:
    targets = READER.read_inline([0, 2, 1], rows=3)
    assert targets.classes_N is not None
    assert targets.classes_N.dtype == np.int64
    assert targets.classes_N.tolist() == [0, 2, 1]
    assert targets.labels is None


@pytest.mark.parametrize("bad", [1.0, "1", True, None, [1]])
def test_a_class_that_is_no_whole_number_is_refused(bad: object) -> None:
    with pytest.raises(WrongType) as caught:
        READER.read_inline([0, bad], rows=2)
    assert (caught.value.field, caught.value.row) == ("data.targets", 1)


@pytest.mark.parametrize("bad", [-1, 3, 10**30])
def test_a_class_that_the_layer_does_not_have_is_refused(bad: int) -> None:
    with pytest.raises(OutOfRange) as caught:
        READER.read_inline([0, bad], rows=2)
    assert caught.value.row == 1


@pytest.mark.parametrize("value", [[0], [0, 1, 2], []])
def test_there_is_one_class_a_row(value: list[int]) -> None:
    with pytest.raises(WrongShape):
        READER.read_inline(value, rows=2)


def test_strings_without_labels_are_the_labels_in_their_order() -> None:
    targets = READER.read_inline(["cow", "ant", "cow"], rows=3)
    assert targets.labels == ("ant", "cow")
    assert targets.classes_N is not None
    assert targets.classes_N.tolist() == [1, 0, 1]


HEAD = replace(READER, outputs=6, base_labels=("zulu", "mike", "alpha"))


@pytest.mark.parametrize(
    ("targets", "labels", "classes"),
    [
        (["mike", "zulu", "mike"], ("zulu", "mike", "alpha"), [1, 0, 1]),
        (["mike", "mike"], ("zulu", "mike", "alpha"), [1, 1]),
        (["yak", "alpha", "bee"], ("zulu", "mike", "alpha", "bee", "yak"), [4, 2, 3]),
        (["yak", "bee"], ("bee", "yak"), [1, 0]),
        ([5, 0], None, [5, 0]),
    ],
    ids=["known", "one class", "known and new", "only new", "indices"],
)
def test_labels_of_the_base_layer_keep_their_outputs_and_new_ones_take_free_outputs(
    targets: list[Any], labels: tuple[str, ...] | None, classes: list[int]
) -> None:
    read = HEAD.read_inline(targets, rows=len(targets))
    assert read.classes_N is not None
    assert (read.labels, read.classes_N.tolist()) == (labels, classes)


def test_integers_are_labels_if_those_of_the_base_layer_are() -> None:
    reader = replace(HEAD, base_labels=(30, 10))
    for targets, labels, classes in (([10, 5], (30, 10, 5), [1, 2]), ([7, 5], (5, 7), [1, 0])):
        read = reader.read_inline(targets, rows=2)
        assert read.classes_N is not None
        assert (read.labels, read.classes_N.tolist()) == (labels, classes)


def test_more_new_labels_than_free_outputs_are_refused_unless_the_request_gives_the_labels() -> None:
    with pytest.raises(OutOfRange, match=r"4 labels that the base layer lacks \(a, b, c, d\), and 3 of its") as caught:
        HEAD.read_inline(["a", "b", "c", "d", "mike"], rows=5)
    assert caught.value.field == "data.targets"
    labels = ["mike", "a", "b", "c", "d"]
    assert replace(HEAD, labels=labels).read_inline(labels, rows=5).labels == tuple(labels)


def test_lists_of_labels_keep_the_outputs_of_the_base_layer_too() -> None:
    reader = replace(HEAD, loss=Loss.BINARY_CROSS_ENTROPY)
    read = reader.read_inline([["alpha", "new"], [], ["zulu"]], rows=3)
    (part_NC,) = read.column.parts()
    assert read.labels == ("zulu", "mike", "alpha", "new")
    np.testing.assert_array_equal(part_NC, [[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
