"""What classes are called, and what the outputs of a row say about them.

Labels name the first outputs; what is past them is no part of the adapter's task.
"""

# N rows · C classes, the first of the outputs · T the most probable of them
import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32, is_finite
from adapters.errors import InvalidCombination, LoraplexError, NotFinite, OutOfRange, WrongType, shorten

MIN_LABELS = 2
MAX_LABEL_CHARACTERS = 200
MAX_LABEL = 2**53
"""Past it, a client that reads JSON's numbers as float64 takes one label for another."""


def check_labels(value: object, *, field: str, outputs: int) -> tuple[str | int, ...]:
    """A list of 2 to `outputs` distinct strings of 1 to 200 characters, or of whole numbers within ±2⁵³.

    Raises `WrongType`, `NotFinite`, `OutOfRange` and `InvalidCombination` (a label twice, or strings among numbers),
    naming the position.
    """
    expected = f"{MIN_LABELS} to {outputs} different strings, or as many whole numbers"
    if not isinstance(value, list | tuple):
        raise WrongType(f"{field} must be a list of labels", field=field, given=value, expected=expected)
    if not MIN_LABELS <= len(value) <= outputs:
        raise OutOfRange(
            f"{field} has {len(value)} entries; at least {MIN_LABELS}, and at most one for each of the layer's"
            f" {outputs} outputs",
            field=field,
            given=f"{len(value)} entries",
            expected=expected,
        )
    first: dict[object, int] = {}
    for position, label in enumerate(value):
        place = f"{field}, position {position}"
        error = _label_error(label, place, field)
        if error is not None:
            raise error
        if type(label) is not type(value[0]):
            raise InvalidCombination(
                f"{place}: {shorten(label)} and {shorten(value[0])}: strings and numbers together",
                field=field,
                given=label,
                expected=expected,
            )
        if label in first:
            raise InvalidCombination(
                f"{place}: {shorten(label)} stands at position {first[label]} already",
                field=field,
                given=label,
                expected=expected,
            )
        first[label] = position
    return tuple(value)


def softmax(x_NC: Float32) -> Float32:
    """(N, C) outputs → (N, C) probabilities of classes of which one is right, `exp(x) / Σ exp(x)`, each row's sum 1.

    In float64, the largest output taken off first: nothing overflows.
    """
    wide_NC = x_NC.astype(np.float64)
    wide_NC = np.exp(wide_NC - wide_NC.max(axis=1, keepdims=True))
    probability_NC: Float32 = (wide_NC / wide_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    return probability_NC


def sigmoid(x_NC: Float32) -> Float32:
    """(N, C) outputs → (N, C) probabilities of classes of which each is right or not by itself, `1 / (1 + exp(-x))`.

    In float64, by `exp(-|x|)`: nothing overflows.
    """
    wide_NC = x_NC.astype(np.float64)
    small_NC = np.exp(-np.abs(wide_NC))
    probability_NC: Float32 = (np.where(wide_NC >= 0, 1.0, small_NC) / (1.0 + small_NC)).astype(np.float32)
    return probability_NC


def most_probable(x_NC: Float32, count: int) -> NDArray[np.intp]:
    """(N, C) outputs → (N, T) indices of the `count` largest, or of all where there are fewer; ties to the lower one.

    By the outputs themselves: their order is that of the probabilities, and outputs that differ may have probabilities
    that float32 does not tell apart.
    """
    largest_N: NDArray[np.intp] = x_NC.argmax(axis=1)
    if count == 1:
        return largest_N[:, np.newaxis]
    order_NC: NDArray[np.intp] = (-x_NC).argsort(axis=1, kind="stable")
    return order_NC[:, :count]


def _label_error(label: object, place: str, field: str) -> LoraplexError | None:
    """What is wrong with a label by itself."""
    expected = f"a string of 1 to {MAX_LABEL_CHARACTERS} characters, or a whole number from -2^53 to 2^53"
    if type(label) is float and not is_finite(label):
        return NotFinite(f"{place}: not a finite number", field=field, given=label, expected=expected)
    if type(label) is int:
        if abs(label) <= MAX_LABEL:
            return None
        return OutOfRange(f"{place}: {shorten(label)} is past 2^53", field=field, given=label, expected=expected)
    if type(label) is not str:
        return WrongType(f"{place}: neither a string nor a whole number", field=field, given=label, expected=expected)
    if not 1 <= len(label) <= MAX_LABEL_CHARACTERS:
        return OutOfRange(f"{place}: a label of {len(label)} characters", field=field, given=label, expected=expected)
    if any("\ud800" <= character <= "\udfff" for character in label):
        return WrongType(
            f"{place}: has a lone surrogate, half of a character", field=field, given=label, expected=expected
        )
    return None
