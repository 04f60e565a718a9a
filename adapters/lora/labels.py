"""Class labels: their checks, and probabilities and ranking of the outputs that they name.

Labels name the first outputs. Outputs without a label are not part of the adapter's task.
"""

# N rows · C classes, the first of the outputs · T the most probable of them
import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32, is_finite
from adapters.errors import InvalidCombination, LoraplexError, NotFinite, OutOfRange, WrongType, shorten

Labels = tuple[str | int, ...]

MIN_LABELS = 2
MAX_LABEL_CHARACTERS = 200
# Largest numeric label. A client that reads JSON numbers as float64 would confuse larger ones.
MAX_LABEL = 2**53


def check_labels(value: object, *, field: str, outputs: int, least: int = MIN_LABELS) -> Labels:
    """Return the labels: `least` to `outputs` distinct strings of 1 to 200 characters, or integers within ±2⁵³.

    Raises `WrongType`, `NotFinite`, `OutOfRange`, or `InvalidCombination` (a duplicate label, or strings and numbers),
    with the position.
    """
    expected = f"{least} to {outputs} different strings, or as many whole numbers"
    if not isinstance(value, list | tuple):
        raise WrongType(f"{field} must be a list of labels", field=field, given=value, expected=expected)
    if not least <= len(value) <= outputs:
        count = f"{len(value)} entries"
        detail = f"{field} has {count}; the layer has {outputs} outputs, and each can have one label"
        raise OutOfRange(detail, field=field, given=count, expected=expected)
    positions: dict[object, int] = {}
    for position, label in enumerate(value):
        error = _label_error(label)
        if error is None and type(label) is not type(value[0]):
            error = InvalidCombination(f"{shorten(label)} and {shorten(value[0])}: strings and numbers together")
        elif error is None and label in positions:
            error = InvalidCombination(f"{shorten(label)} is already at position {positions[label]}")
        if error is not None:
            location = f"{field}, position {position}: "
            raise error.explain(before=location).at(field=field, given=label, expected=error.expected or expected)
        positions[label] = position
    return tuple(value)


def softmax(x_NC: Float32) -> Float32:
    """Return the probabilities of mutually exclusive classes, `exp(x) / Σ exp(x)`, (N, C) -> (N, C).

    The largest output of a row is subtracted first, in float64, so that nothing overflows.
    """
    wide_NC = x_NC.astype(np.float64)
    wide_NC = np.exp(wide_NC - wide_NC.max(axis=1, keepdims=True))
    probability_NC: Float32 = (wide_NC / wide_NC.sum(axis=1, keepdims=True)).astype(np.float32)
    return probability_NC


def sigmoid(x_NC: Float32) -> Float32:
    """Return the probabilities of independent labels, `1 / (1 + exp(-x))`, (N, C) -> (N, C).

    They are computed from `exp(-|x|)`, in float64, so that nothing overflows.
    """
    wide_NC = x_NC.astype(np.float64)
    small_NC = np.exp(-np.abs(wide_NC))
    probability_NC: Float32 = (np.where(wide_NC >= 0, 1.0, small_NC) / (1.0 + small_NC)).astype(np.float32)
    return probability_NC


def most_probable(x_NC: Float32, count: int) -> NDArray[np.intp]:
    """Return the indices of the `count` largest outputs of each row, (N, C) -> (N, T); ties go to the lower index.

    T is the smaller of `count` and C. The outputs are compared, not the probabilities, which have the same order but
    may be equal as float32.
    """
    largest_N: NDArray[np.intp] = x_NC.argmax(axis=1)
    if count == 1:
        return largest_N[:, np.newaxis]
    order_NC: NDArray[np.intp] = (-x_NC).argsort(axis=1, kind="stable")
    return order_NC[:, :count]


def _label_error(label: object) -> LoraplexError | None:
    """Return the error of one label, if it has one."""
    expected = f"a string of 1 to {MAX_LABEL_CHARACTERS} characters, or a whole number from -2^53 to 2^53"
    if type(label) is int:
        return OutOfRange(f"{shorten(label)} is past 2^53", expected=expected) if abs(label) > MAX_LABEL else None
    if type(label) is float and not is_finite(label):
        return NotFinite("not a finite number", expected=expected)
    if type(label) is not str:
        return WrongType("neither a string nor a whole number", expected=expected)
    if not 1 <= len(label) <= MAX_LABEL_CHARACTERS:
        return OutOfRange(f"a label of {len(label)} characters", expected=expected)
    if any("\ud800" <= character <= "\udfff" for character in label):
        return WrongType("has a lone surrogate, half of a character", expected=expected)
    return None
