"""Targets of a request, checked and converted to what the fit reads: rows of numbers, or one class per row."""

# N rows · O outputs · C classes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32, class_indices, is_finite, matrix, one_per_row
from adapters.errors import (
    MAX_BAD_ROWS,
    BadRow,
    BadRows,
    InvalidCombination,
    NotFinite,
    OutOfRange,
    WrongShape,
    WrongType,
)
from adapters.lora.labels import MIN_LABELS, check_labels
from adapters.training.settings import Loss

Classes = NDArray[np.int64]
_NAMES = (str, int)
# Labels that an error lists at most.
_NAMED = 20


CLASSES_HINT = '; for one class a row, say "loss": "cross_entropy" in training'


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Targets of the rows, with the labels of the classes."""

    values: Float32 | Classes
    """(N, O) or (N, C) float32, or (N,) int64."""
    labels: tuple[str | int, ...] | None = None
    """Labels of the classes, if they have names."""

    @property
    def classes(self) -> Classes | None:
        """Return the targets if they are one class per row."""
        return self.values if self.values.dtype == np.int64 else None  # type: ignore[return-value]  # it is Classes


def inline_targets(value: object, loss: Loss, *, field: str, rows: int, outputs: int, labels: object) -> Targets:
    """Return the targets of rows in a request; raise the `InvalidInput` that names the field and the row.

    labels: those sent with the data, or None; then they are inferred if the classes are strings.
    """
    check_has_labels(loss, labels, field=field)
    if loss is Loss.CROSS_ENTROPY:
        if labels is None and not (isinstance(value, list) and value and all(type(each) is str for each in value)):
            return Targets(class_indices(value, field=field, rows=rows, classes=outputs))
        names = one_per_row(value, field=field, rows=rows, expected=f"{rows} rows: one class a row")
        return _named(names, labels, field=field, outputs=outputs)
    if loss is Loss.BINARY_CROSS_ENTROPY:
        lists = one_per_row(
            value, field=field, rows=rows, expected=f"{rows} rows: a list of labels, or of 0 and 1, a row"
        )
        if _lists_labels(lists, labels):
            return _several_named(lists, labels, field=field, outputs=outputs)
        values_NC = matrix(value, field=field, rows=rows)
        known = share_names(values_NC.shape[1], labels, field=field, outputs=outputs)
        check_shares(values_NC, field=field)
        return Targets(values_NC, known)
    numbers = _rows_of_one(value) if outputs == 1 else value
    try:
        return Targets(matrix(numbers, field=field, rows=rows, columns=outputs))
    except WrongType as error:
        if isinstance(value, list) and value and type(value[0]) in _NAMES:
            raise error.explain(after=CLASSES_HINT) from None
        raise


def _rows_of_one(value: object) -> object:
    """Return a flat list as rows of one entry, and any other value as it is."""
    if isinstance(value, list) and not any(isinstance(entry, list) for entry in value):
        return [[entry] for entry in value]
    return value


def coded_targets(
    codes_N: Classes, values: Sequence[str | int], *, field: str, outputs: int, labels: object
) -> Targets:
    """Return the classes of a column, which are positions in its sorted distinct values."""
    if labels is None and all(type(value) is int for value in values):
        # Whole numbers without labels are class indices, as they are in a request.
        for value in values:
            if not 0 <= int(value) < outputs:
                row = int(np.flatnonzero(codes_N == values.index(value))[0])
                raise OutOfRange(
                    f"{field}, row {row}: there is no class {value}; the layer has {outputs} outputs",
                    field=field,
                    row=row,
                    given=value,
                    expected=f"a whole number from 0 to {outputs - 1}, or labels",
                )
        return Targets(np.array(values, np.int64)[codes_N])
    names = _names(list(values), labels, field=field, outputs=outputs)
    place = {name: number for number, name in enumerate(names)}
    unknown = [code for code, value in enumerate(values) if value not in place]
    if unknown:
        first = {code: int(np.argmax(codes_N == code)) for code in unknown[:MAX_BAD_ROWS]}
        raise _no_such_label([(row, values[code]) for code, row in first.items()], names, field)
    return Targets(np.array([place[value] for value in values], np.int64)[codes_N], names)


def listed_names(
    values: Sequence[str | int], rows_K: Classes, codes_K: Classes, *, field: str, outputs: int, labels: object
) -> tuple[tuple[str | int, ...], Classes]:
    """Return the labels of a column of lists, and (K,) the position of each entry among them.

    codes_K: positions in the distinct values. rows_K: the row of each entry.
    """
    names = _names(list(values), labels, field=field, outputs=outputs)
    place = {name: number for number, name in enumerate(names)}
    unknown = [code for code, value in enumerate(values) if value not in place]
    if unknown:
        first = {code: int(rows_K[np.argmax(codes_K == code)]) for code in unknown[:MAX_BAD_ROWS]}
        raise _no_such_label([(row, values[code]) for code, row in first.items()], names, field)
    return names, np.array([place[value] for value in values], np.int64)[codes_K]


def share_names(width: int, labels: object, *, field: str, outputs: int) -> tuple[str | int, ...] | None:
    """Return the labels of `width` numbers per row; raise `WrongShape` if outputs or labels do not match them."""
    if width > outputs:
        raise WrongShape(
            f"{field} has {width} numbers a row, the layer has {outputs} outputs",
            field=field,
            given=f"{width} numbers",
            expected=f"at most {outputs} numbers",
        )
    if labels is None:
        return None
    names = check_labels(labels, field=field.replace("targets", "labels"), outputs=outputs)
    if len(names) != width:
        raise WrongShape(
            f"{field} has {width} numbers a row for {len(names)} labels",
            field=field,
            given=f"{width} numbers",
            expected=f"{len(names)} numbers, or lists of labels",
        )
    return names


def check_shares(values_NC: Float32, *, field: str, begin: int = 0) -> None:
    """Raise `OutOfRange` for a number outside 0 to 1; the first row counts as row `begin`."""
    wrong = np.argwhere((values_NC < 0) | (values_NC > 1))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise OutOfRange(
            f"{field}, row {begin + row}, column {column}: not from 0 to 1",
            field=field,
            row=begin + row,
            given=float(values_NC[row, column]),
            expected="0 where the label does not hold, 1 where it does",
        )


def check_has_labels(loss: Loss, labels: object, *, field: str) -> None:
    """Raise `InvalidCombination` if labels were sent and the targets are not classes."""
    if labels is not None and loss not in (Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY):
        raise InvalidCombination(
            f"labels name classes, and {loss} has none",
            field=field.replace("targets", "labels"),
            given=labels,
            expected="labels with cross_entropy or binary_cross_entropy",
        )


def _named(names: list[Any], labels: object, *, field: str, outputs: int) -> Targets:
    for row, name in enumerate(names):
        _check_name(name, field, row)
    known = _names(set(names), labels, field=field, outputs=outputs)
    place = {name: number for number, name in enumerate(known)}
    unknown = {name: row for row, name in reversed(list(enumerate(names))) if name not in place}
    if unknown:
        raise _no_such_label([(row, name) for name, row in unknown.items()], known, field)
    return Targets(np.array([place[name] for name in names], np.int64), known)


def _lists_labels(lists: Sequence[Any], labels: object) -> bool:
    """Return whether rows list labels instead of a 0 or 1 for each; integer labels are always listed."""
    if any(isinstance(each, list) and any(type(name) is str for name in each) for each in lists):
        return True
    return isinstance(labels, list) and (any(type(name) is int for name in labels) or not any(lists))


def _several_named(lists: Sequence[Sequence[Any]], labels: object, *, field: str, outputs: int) -> Targets:
    for row, names in enumerate(lists):
        if not isinstance(names, list):
            raise WrongType(
                f"{field}, row {row}, is not a list of labels", field=field, row=row, given=names, expected="a list"
            )
        for name in names:
            _check_name(name, field, row)
    known = _names({name for names in lists for name in names}, labels, field=field, outputs=outputs)
    place = {name: number for number, name in enumerate(known)}
    values_NC = np.zeros((len(lists), len(known)), np.float32)
    unknown: dict[str | int, int] = {}
    for row, names in enumerate(lists):
        for name in names:
            if name in place:
                values_NC[row, place[name]] = 1
            else:
                unknown.setdefault(name, row)
    if unknown:
        raise _no_such_label([(row, name) for name, row in unknown.items()], known, field)
    return Targets(values_NC, known)


def _names(found: Collection[str | int], labels: object, *, field: str, outputs: int) -> tuple[str | int, ...]:
    """Return the labels that were sent, or those that occur, sorted; errors about the latter name the targets."""
    if labels is not None:
        return check_labels(labels, field=field.replace("targets", "labels"), outputs=outputs)
    names = sorted(found, key=lambda name: (str(type(name)), name))
    if not MIN_LABELS <= len(names) <= outputs:
        raise OutOfRange(
            f"{field} has {len(names)} different labels ({_listed(names)}); at least {MIN_LABELS}, and at most one "
            f"for each of the layer's {outputs} outputs",
            field=field,
            given=f"{len(names)} labels",
            expected=f"{MIN_LABELS} to {outputs} different labels",
        )
    return check_labels(names, field=field, outputs=outputs)


def _check_name(name: object, field: str, row: int) -> None:
    if type(name) not in _NAMES:
        kind = NotFinite if type(name) is float and not is_finite(name) else WrongType
        raise kind(
            f"{field}, row {row}: a label is a string or a whole number",
            field=field,
            row=row,
            given=name,
            expected="a label",
        )


def _no_such_label(found: Sequence[tuple[int, str | int]], known: Sequence[str | int], field: str) -> BadRows:
    """Return the error for values that are no labels: the first row of each, and the value."""
    rows = [BadRow(row, None, f"there is no label {str(name)[:80]!r}") for row, name in sorted(found)[:MAX_BAD_ROWS]]
    return BadRows(
        f"{field}: {rows[0].reason}, which row {rows[0].row} has; the labels are: {_listed(known)}",
        rows=rows,
        field=field,
    )


def _listed(names: Sequence[str | int]) -> str:
    return ", ".join(str(name)[:40] for name in names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
