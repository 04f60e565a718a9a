"""Targets in a request: what is read, and what is refused at which row."""

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
