"""Targets of a request, checked and converted to what the fit reads: rows of numbers, or one class per row."""

# N rows · K labels in all rows · O outputs · C classes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32, TruncatedList, is_finite, matrix, one_per_row
from adapters.datasets.columns import ColumnSelector
from adapters.datasets.table import Table
from adapters.errors import (
    MAX_BAD_ROWS,
    BadRow,
    BadRows,
    InvalidCombination,
    NotFinite,
    OutOfRange,
    WrongShape,
    WrongType,
    shorten,
)
from adapters.lora.labels import MIN_LABELS, Labels, check_labels
from adapters.training.data_file import Column
from adapters.training.settings import Loss

Codes = NDArray[np.int64]
# Labels that an error lists at most.
_MAX_LISTED = 20
# Most labels of the rows of an evaluation.
MAX_EVALUATED_LABELS = 10_000
_NUMBERS_PER_PART = 2**21
_CLASSES_HINT = '; for one class a row, say "loss": "cross_entropy" in training'


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Checked targets of the rows, with the labels of the classes."""

    column: Column
    """(N, O) or (N, C) float32, or (N,) int64."""
    labels: Labels | None = None
    """Labels of the classes, if they have names."""
    classes_N: Codes | None = None
    """The targets if they are one class per row."""


def infer_loss(value: object, *, has_labels: bool, outputs: int) -> Loss:
    """Return the loss for targets in a request: of classes, of lists of labels, or of numbers.

    Strings are classes, and so is one whole number per row if labels are given, or if the layer has several outputs
    and a row would need as many numbers. Other numbers are numbers, 0 and 1 too, unless labels are given.
    """
    if not isinstance(value, list) or not value:
        return Loss.MSE
    # Of a `TruncatedList` too, whose other entries cannot be iterated. Rows of another kind are errors of the reader.
    first = value[0]
    if isinstance(first, list):
        names = first if isinstance(value, TruncatedList) else chain.from_iterable(filter(_is_list, value))
        is_named = has_labels or isinstance(next(iter(names), None), str)
        return Loss.BINARY_CROSS_ENTROPY if is_named else Loss.MSE
    are_classes = has_labels or isinstance(first, str) or (type(first) is int and outputs > 1)
    return Loss.CROSS_ENTROPY if are_classes else Loss.MSE


def _is_list(row: object) -> bool:
    return isinstance(row, list)


def infer_loss_of_columns(
    table: Table, selection: ColumnSelector, *, has_labels: bool, outputs: int, field: str
) -> Loss:
    """Return the loss for targets in columns of a data set, as `infer_loss`; raise `InvalidInput`."""
    if selection.column is None:
        return Loss.BINARY_CROSS_ENTROPY if has_labels else Loss.MSE
    column_type = table.type_of(selection.column, field=field)
    if column_type.startswith("list"):
        return Loss.BINARY_CROSS_ENTROPY if has_labels or "string" in column_type else Loss.MSE
    are_classes = has_labels or column_type == "string" or (outputs > 1 and not column_type.startswith("float"))
    return Loss.CROSS_ENTROPY if are_classes else Loss.MSE


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReader:
    """Reader of the targets of one request for a loss.

    The methods raise the `InvalidInput` that names the field and the row.
    """

    loss: Loss
    outputs: int
    labels: object
    """Labels sent with the data, or None; then they are inferred if the classes are strings."""
    field: str
    base_labels: Labels | None = None
    """Labels of the base layer: one that occurs in the rows keeps its output."""
    are_evaluated: bool = False
    """Whether the targets are those of an evaluation: labels that occur, which need no output each."""

    def read_inline(self, value: object, *, rows: int) -> Targets:
        """Read targets in the request itself."""
        self._check_has_classes()
        field = self.field
        if self.loss is Loss.CROSS_ENTROPY:
            classes = one_per_row(value, field=field, rows=rows, expected=f"{rows} rows: one class a row")
            check_one_kind(classes, field=field)
            return self._classes(*_encode(classes))
        if self.loss is Loss.BINARY_CROSS_ENTROPY:
            expected = f"{rows} rows: a list of labels, or of 0 and 1, a row"
            lists = one_per_row(value, field=field, rows=rows, expected=expected)
            if self._lists_labels(lists):
                return self._name_lists(lists)
            return self._shares(Column.of(matrix(value, field=field, rows=rows)))
        if self.outputs == 1 and isinstance(value, list) and not any(isinstance(entry, list) for entry in value):
            value = [[number] for number in value]
        try:
            return Targets(Column.of(matrix(value, field=field, rows=rows, columns=self.outputs)))
        except WrongType as error:
            if isinstance(value, list) and value and type(value[0]) in (str, int):
                raise error.explain(after=_CLASSES_HINT) from None
            raise

    def read_columns(self, table: Table, selection: ColumnSelector) -> Targets:
        """Read columns of a data set."""
        self._check_has_classes()
        field, column = self.field, selection.column
        if self.loss is Loss.CROSS_ENTROPY:
            if column is None:
                given, expected = selection.to_json(), '{"column": name}'
                raise WrongType(f"{field}: classes are in one column", field=field, given=given, expected=expected)
            return self._classes(*table.codes(column, field=field))
        if self.loss is not Loss.BINARY_CROSS_ENTROPY:
            try:
                return Targets(read_numbers(table, selection, self.outputs, field=field))
            except WrongType as error:
                raise error.explain(after=_CLASSES_HINT) from None
        are_integers = isinstance(self.labels, list | tuple) and any(type(name) is int for name in self.labels)
        if column is not None and table.lists_labels(column, numbers=are_integers, field=field):
            rows_K, codes_K, values = table.listed(column, field=field)
            labels, classes_K = self._positions(codes_K, values, rows_K)
            return Targets(_indicators(table.rows, rows_K, classes_K, len(labels)), labels)
        return self._shares(read_numbers(table, selection, table.width(selection, field=field), field=field))

    def _check_has_classes(self) -> None:
        if self.labels is not None and self.loss not in (Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY):
            detail, expected = f"labels name classes, and {self.loss} has none", "no labels, or a loss with classes"
            raise InvalidCombination(detail, field=self._labels_field, given=self.labels, expected=expected)

    @property
    def _labels_field(self) -> str:
        return self.field.replace("targets", "labels")

    def _lists_labels(self, lists: Sequence[Any]) -> bool:
        """Return whether rows list labels instead of a 0 or 1 for each; integer labels are always listed."""
        if any(isinstance(entries, list) and any(type(name) is str for name in entries) for entries in lists):
            return True
        return isinstance(self.labels, list) and (any(type(name) is int for name in self.labels) or not any(lists))

    def _name_lists(self, lists: Sequence[Any]) -> Targets:
        for row, names in enumerate(lists):
            if not isinstance(names, list):
                detail = f"{self.field}, row {row}, is not a list of labels"
                raise WrongType(detail, field=self.field, row=row, given=names, expected="a list")
        rows_K = np.repeat(np.arange(len(lists)), [len(names) for names in lists])
        all_names = [name for names in lists for name in names]
        check_names(all_names, rows_K.tolist(), field=self.field)
        labels, classes_K = self._positions(*_encode(all_names), rows_K)
        return Targets(_indicators(len(lists), rows_K, classes_K, len(labels)), labels)

    def _classes(self, codes_N: Codes, values: Sequence[Any]) -> Targets:
        """Return one class per row; integers are indices of outputs, unless there are labels that they may be."""
        are_labels = self.labels is not None or self.are_evaluated
        are_labels |= self.base_labels is not None and type(self.base_labels[0]) is int
        if are_labels or not all(type(value) is int for value in values):
            labels, classes_N = self._positions(codes_N, values)
            return Targets(Column.of(classes_N), labels, classes_N)
        for code, value in enumerate(values):
            if not 0 <= value < self.outputs:
                row, outputs = int(np.argmax(codes_N == code)), self.outputs
                detail = f"{self.field}, row {row}: there is no class {shorten(value)}; the layer has {outputs} outputs"
                expected = f"a whole number from 0 to {outputs - 1}, or labels"
                raise OutOfRange(detail, field=self.field, row=row, given=value, expected=expected)
        classes_N = np.array(values, np.int64)[codes_N]
        return Targets(Column.of(classes_N), None, classes_N)

    def _positions(
        self, codes_K: Codes, values: Sequence[str | int], rows_K: Codes | None = None
    ) -> tuple[Labels, Codes]:
        """Return the labels, and (K,) the position of each entry among them.

        codes_K: positions in the distinct `values`. rows_K: the row of each entry; None if there is one per row.
        """
        labels = self._known_labels(values)
        position_of = {label: position for position, label in enumerate(labels)}
        unknown = [code for code, value in enumerate(values) if value not in position_of]
        if unknown:
            entries = [(int(np.argmax(codes_K == code)), values[code]) for code in unknown[:MAX_BAD_ROWS]]
            bad = [
                BadRow(k if rows_K is None else int(rows_K[k]), None, f"there is no label {str(value)[:80]!r}")
                for k, value in sorted(entries)
            ]
            detail = f"{self.field}: {bad[0].reason}, which row {bad[0].row} has; the labels are: {_listed(labels)}"
            raise BadRows(detail, rows=bad, field=self.field)
        return labels, np.array([position_of[value] for value in values], np.int64)[codes_K]

    def _known_labels(self, values: Sequence[str | int]) -> Labels:
        """Return the labels that were sent, or those that occur, sorted; errors about the latter name the targets.

        If labels of the base layer occur, all of them come first, so that each keeps its output.
        """
        if self.labels is not None:
            return check_labels(self.labels, field=self._labels_field, outputs=self.outputs)
        names = sorted(values, key=lambda name: (str(type(name)), name))
        if self.are_evaluated:
            return self._evaluated_labels(names)
        known = dict.fromkeys(self.base_labels or ())
        new = [name for name in names if name not in known]
        if len(new) < len(names):
            free, count = self.outputs - len(known), f"{len(new)} labels that the base layer lacks"
            if len(new) > free:
                detail = f"{self.field} has {count} ({_listed(new)}), and {free} of its outputs have no label"
                expected = f"at most {free} new labels, or the labels of all outputs in {self._labels_field}"
                raise OutOfRange(detail, field=self.field, given=count, expected=expected)
            return check_labels([*known, *new], field=self.field, outputs=self.outputs)
        if not MIN_LABELS <= len(names) <= self.outputs:
            expected = f"{MIN_LABELS} to {self.outputs} labels, at most one for each output"
            detail = f"{self.field} has {len(names)} different labels ({_listed(names)}), expected {expected}"
            raise OutOfRange(detail, field=self.field, given=f"{len(names)} labels", expected=expected)
        return check_labels(names, field=self.field, outputs=self.outputs)

    def _evaluated_labels(self, names: Sequence[str | int]) -> Labels:
        """Return the labels of an evaluation, which may be others than an adapter answers with."""
        if len(names) > MAX_EVALUATED_LABELS:
            detail, expected = (
                f"{self.field} has {len(names)} different labels",
                f"at most {MAX_EVALUATED_LABELS} labels",
            )
            raise OutOfRange(detail, field=self.field, given=f"{len(names)} labels", expected=expected)
        return check_labels(names, field=self.field, outputs=len(names), least=min(len(names), MIN_LABELS))

    def _shares(self, column: Column) -> Targets:
        """Return numbers from 0 to 1 as targets, one for each class."""
        width, labels = column.shape[1], None
        if width > self.outputs:
            raise _wrong_width(self.field, width, f"at most {self.outputs} numbers")
        if self.labels is not None:
            labels = check_labels(self.labels, field=self._labels_field, outputs=self.outputs)
            if len(labels) != width:
                raise _wrong_width(self.field, width, f"{len(labels)} numbers for {len(labels)} labels")
        begin = 0
        for part_NC in column.parts():
            wrong = np.argwhere((part_NC < 0) | (part_NC > 1))
            if len(wrong):
                index, output = map(int, wrong[0])
                row, given = begin + index, float(part_NC[index, output])
                detail = f"{self.field}, row {row}, column {output}: not from 0 to 1"
                expected = "0 where the label does not hold, 1 where it does"
                raise OutOfRange(detail, field=self.field, row=row, given=given, expected=expected)
            begin += len(part_NC)
        return Targets(column, labels)


def check_names(names: Sequence[object], rows: Sequence[int], *, field: str) -> None:
    """Raise `WrongType` or `NotFinite` for an entry that is no string or integer."""
    for name, row in zip(names, rows, strict=True):
        if type(name) not in (str, int):
            kind = NotFinite if type(name) is float and not is_finite(name) else WrongType
            expected = "a string or a whole number"
            raise kind(f"{field}, row {row}: not {expected}", field=field, row=row, given=name, expected=expected)


def check_one_kind(names: Sequence[object], *, field: str) -> None:
    """Raise the errors of `check_names` for one entry per row, and `WrongType` for strings and numbers together."""
    check_names(names, range(len(names)), field=field)
    for row, name in enumerate(names):
        if type(name) is not type(names[0]):
            detail = f"{field}, row {row}: strings and numbers together"
            raise WrongType(detail, field=field, row=row, given=name, expected="entries of one kind")


def read_numbers(table: Table, selection: ColumnSelector, width: int, *, field: str) -> Column:
    """Return columns of numbers, checked in full and read part by part; raise `WrongShape` and `BadRows`."""
    actual = table.width(selection, field=field)
    if actual != width:
        raise _wrong_width(field, actual, f"{width} numbers")
    table.check_numbers(selection, field=field)
    step = max(1, _NUMBERS_PER_PART // width)

    def parts() -> Iterator[NDArray[Any]]:
        for begin in range(0, table.rows, step):
            yield table.numbers(selection, field=field, begin=begin, end=begin + step)

    return Column("F32", (table.rows, width), parts)


def _wrong_width(field: str, width: int, expected: str) -> WrongShape:
    detail = f"{field} has {width} numbers a row, expected {expected}"
    return WrongShape(detail, field=field, given=f"{width} numbers", expected=expected)


def _encode(names: Sequence[str | int]) -> tuple[Codes, list[str | int]]:
    """Return names as positions in their distinct values, and these values."""
    codes: dict[str | int, int] = {}
    return np.array([codes.setdefault(name, len(codes)) for name in names], np.int64), list(codes)


def _indicators(rows: int, rows_K: Codes, classes_K: Codes, classes: int) -> Column:
    """Return (N, C) float32: 1 where the list of a row has the label."""
    step = max(1, _NUMBERS_PER_PART // classes)

    def parts() -> Iterator[Float32]:
        for begin in range(0, rows, step):
            part_NC = np.zeros((min(step, rows - begin), classes), np.float32)
            first, last = np.searchsorted(rows_K, [begin, begin + len(part_NC)])
            part_NC[rows_K[first:last] - begin, classes_K[first:last]] = 1
            yield part_NC

    return Column("F32", (rows, classes), parts)


def _listed(names: Sequence[str | int]) -> str:
    return ", ".join(str(name)[:40] for name in names[:_MAX_LISTED]) + (", …" if len(names) > _MAX_LISTED else "")
