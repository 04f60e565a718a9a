"""Rows of a training, inline or from a data set: checked in full, and read part by part."""

# N rows · I in_features · O out_features · C labels · M documents
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32, is_finite, matrix, one_per_row, vector
from adapters.datasets.columns import ColumnSelector, parse_selector
from adapters.datasets.store import Datasets
from adapters.datasets.table import Table
from adapters.errors import BadRow, BadRows, IgnoredField, NotFinite, OutOfRange, WrongShape, WrongType
from adapters.lora.base_layer import BaseLayer
from adapters.names import parse_reference
from adapters.training.data_file import Column, DataFile, in_memory_column
from adapters.training.limits import MAX_DATASET_ROWS
from adapters.training.planning.request import CorpusColumns, DatasetColumns, InlineRows, RowSource
from adapters.training.planning.targets import (
    CLASSES_HINT,
    Classes,
    check_has_labels,
    check_shares,
    coded_targets,
    inline_targets,
    listed_names,
    share_names,
)
from adapters.training.settings import Loss

_NUMBERS_PER_PART = 2**21
Codes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Array that is read part by part, so that it is never in memory as a whole."""

    shape: tuple[int, ...]
    parts: Callable[[], Iterator[NDArray[Any]]]
    """Iterator over its rows in order, float32 or int64; a new one per call."""

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Numbers":
        """Return the numbers of an array in memory."""
        return cls(array.shape, lambda: iter([array]))

    def column(self, kind: str = "F32") -> Column:
        """Return the column of a data file."""
        return Column(kind, self.shape, self.parts())


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Group of each row."""

    codes_N: Codes
    """(N,) int64: positions in `values`."""
    values: Sequence[str | int]
    """Sorted; each occurs at least once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Checked rows, not yet stored."""

    inputs: Numbers
    """(N, I) float32."""
    targets: Numbers
    """(N, O) or (N, C) float32, or (N,) int64."""
    weights_N: Float32 | None
    classes_N: Codes | None
    """The targets if they are one class per row."""
    labels: tuple[str | int, ...] | None
    groups: Groups | None
    """Groups that a split keeps together."""
    fleet: Groups | None
    """Groups with one adapter each."""
    corpus: Numbers | None
    """(M, O) float32."""
    table: Table | None
    """The data set that they come from."""
    origin: Mapping[str, Any]
    """Data set and columns that they come from, as the job shows them; empty if inline."""

    @property
    def count(self) -> int:
        """Return N."""
        return self.inputs.shape[0]

    def description(self) -> dict[str, Any]:
        """Return what the rows are, as a job and a version show it."""
        return {**self.origin, "rows": self.count, "digest": DataFile(self.columns()).digest()}

    def columns(self, prefix: str = "") -> dict[str, Column]:
        """Return the columns of a data file, with names that begin with `prefix`."""
        columns = {
            f"{prefix}inputs_NI": self.inputs.column(),
            f"{prefix}targets": self.targets.column("F32" if self.classes_N is None else "I64"),
        }
        return columns if self.weights_N is None else columns | {f"{prefix}weights_N": in_memory_column(self.weights_N)}


def read_rows(source: RowSource, loss: Loss, *, datasets: Datasets, base: BaseLayer, field: str = "data") -> Rows:
    """Read and check the rows of a request for targets of this loss.

    Raises the `InvalidInput` that names the field and the row.
    """
    if isinstance(source, DatasetColumns):
        return _dataset_rows(source, loss, datasets=datasets, base=base, field=field)
    return _inline_rows(source, loss, base=base, field=field)


def _inline_rows(source: InlineRows, loss: Loss, *, base: BaseLayer, field: str) -> Rows:
    inputs_NI = matrix(source.inputs, field=f"{field}.inputs", columns=base.in_features)
    rows = len(inputs_NI)
    targets = inline_targets(
        source.targets, loss, field=f"{field}.targets", rows=rows, outputs=base.out_features, labels=source.labels
    )
    weights_N = None
    if source.weights is not None:
        weights_N = vector(source.weights, field=f"{field}.weights", length=rows)
        _check_weights(weights_N, field=f"{field}.weights")
    groups = None if source.groups is None else _inline_groups(source.groups, rows, field=f"{field}.groups")
    corpus = None
    if source.corpus is not None:
        _check_corpus(loss, field=f"{field}.corpus")
        corpus = Numbers.of(matrix(source.corpus, field=f"{field}.corpus", columns=base.out_features))
    return Rows(
        inputs=Numbers.of(inputs_NI),
        targets=Numbers.of(targets.values),
        weights_N=weights_N,
        classes_N=targets.classes,
        labels=targets.labels,
        groups=groups,
        fleet=groups,
        corpus=corpus,
        table=None,
        origin={},
    )


def _dataset_rows(source: DatasetColumns, loss: Loss, *, datasets: Datasets, base: BaseLayer, field: str) -> Rows:
    version = datasets.find(parse_reference(source.dataset, field=f"{field}.dataset"), field=f"{field}.dataset")
    table = Table.open(datasets.local(version))
    if table.rows > MAX_DATASET_ROWS:
        raise OutOfRange(
            f"{field}.dataset has {table.rows} rows; one training takes at most {MAX_DATASET_ROWS}",
            field=f"{field}.dataset",
            given=f"{table.rows} rows",
            expected=f"at most {MAX_DATASET_ROWS} rows",
        )
    inputs = parse_selector(source.inputs, field=f"{field}.inputs")
    targets = parse_selector(source.targets, field=f"{field}.targets")
    numbers = _numbers(table, inputs, base.in_features, field=f"{field}.inputs")
    classes_N, target_numbers, labels = _dataset_targets(
        table, targets, loss, field=f"{field}.targets", outputs=base.out_features, labels=source.labels
    )
    weights_N = None
    if source.weight is not None:
        column = ColumnSelector(column=source.weight)
        _check_width(table, column, 1, field=f"{field}.weight")
        weights_N = np.ascontiguousarray(table.numbers(column, field=f"{field}.weight")[:, 0])
        _check_weights(weights_N, field=f"{field}.weight")
    columns = {"weight": source.weight, "group": source.group, "group_by": source.group_by}
    corpus = None
    if source.corpus is not None:
        corpus = _dataset_corpus(source.corpus, loss, datasets=datasets, base=base, field=f"{field}.corpus")
    return Rows(
        inputs=numbers,
        targets=target_numbers,
        weights_N=weights_N,
        classes_N=classes_N,
        labels=labels,
        groups=_dataset_groups(table, source.group, field=f"{field}.group"),
        fleet=_dataset_groups(table, source.group_by, field=f"{field}.group_by"),
        corpus=corpus,
        table=table,
        origin={
            "dataset": str(version),
            "dataset_digest": version.digest,
            "inputs": inputs.to_json(),
            "targets": targets.to_json(),
            **{name: column for name, column in columns.items() if column is not None},
        },
    )


def _dataset_targets(
    table: Table, selection: ColumnSelector, loss: Loss, *, field: str, outputs: int, labels: object
) -> tuple[Classes | None, Numbers, tuple[str | int, ...] | None]:
    """Return the classes if each row has one, the numbers that a data file stores, and the labels."""
    check_has_labels(loss, labels, field=field)
    if loss is Loss.CROSS_ENTROPY:
        if selection.column is None:
            raise WrongType(
                f"{field}: classes are in one column",
                field=field,
                given=selection.to_json(),
                expected='{"column": name}',
            )
        codes_N, values = table.codes(selection.column, field=field)
        targets = coded_targets(codes_N, values, field=field, outputs=outputs, labels=labels)
        return targets.classes, Numbers.of(targets.values), targets.labels
    if loss is not Loss.BINARY_CROSS_ENTROPY:
        try:
            return None, _numbers(table, selection, outputs, field=field), None
        except WrongType as error:
            raise error.explain(after=CLASSES_HINT) from None
    are_integers = isinstance(labels, list) and any(type(name) is int for name in labels)
    if selection.column is not None and table.lists_labels(selection.column, numbers=are_integers, field=field):
        rows_K, codes_K, values = table.listed(selection.column, field=field)
        names, labels_K = listed_names(values, rows_K, codes_K, field=field, outputs=outputs, labels=labels)
        return None, _indicators(table.rows, rows_K, labels_K, len(names)), names
    width = table.width(selection, field=field)
    known_labels = share_names(width, labels, field=field, outputs=outputs)
    shares = _numbers(table, selection, width, field=field)
    begin = 0
    for part_NC in shares.parts():
        check_shares(part_NC, field=field, begin=begin)
        begin += len(part_NC)
    return None, shares, known_labels


def _numbers(table: Table, selection: ColumnSelector, width: int, *, field: str) -> Numbers:
    """Return columns of numbers, checked in full and read part by part; raise `WrongShape` and `BadRows`."""
    _check_width(table, selection, width, field=field)
    table.check_numbers(selection, field=field)
    step = max(1, _NUMBERS_PER_PART // width)

    def parts() -> Iterator[NDArray[Any]]:
        for begin in range(0, table.rows, step):
            yield table.numbers(selection, field=field, begin=begin, end=begin + step)

    return Numbers((table.rows, width), parts)


def _indicators(rows: int, rows_K: Classes, labels_K: Classes, labels: int) -> Numbers:
    """Return (N, C) float32: 1 where the list of a row has the label."""
    step = max(1, _NUMBERS_PER_PART // labels)

    def parts() -> Iterator[Float32]:
        for begin in range(0, rows, step):
            part_NC = np.zeros((min(step, rows - begin), labels), np.float32)
            first, last = np.searchsorted(rows_K, [begin, begin + len(part_NC)])
            part_NC[rows_K[first:last] - begin, labels_K[first:last]] = 1
            yield part_NC

    return Numbers((rows, labels), parts)


def _dataset_corpus(source: CorpusColumns, loss: Loss, *, datasets: Datasets, base: BaseLayer, field: str) -> Numbers:
    _check_corpus(loss, field=field)
    reference = parse_reference(source.dataset, field=f"{field}.dataset")
    table = Table.open(datasets.local(datasets.find(reference, field=f"{field}.dataset")))
    selection = parse_selector(source.documents, field=f"{field}.documents")
    return _numbers(table, selection, base.out_features, field=f"{field}.documents")


def _check_width(table: Table, selection: ColumnSelector, expected: int, *, field: str) -> None:
    width = table.width(selection, field=field)
    if width != expected:
        raise WrongShape(
            f"{field} gives {width} numbers a row, expected {expected}",
            field=field,
            given=f"{width} numbers",
            expected=f"{expected} numbers",
        )


def _check_weights(weights_N: Float32, *, field: str) -> None:
    """Raise `BadRows` for weights below 0, and `OutOfRange` if no row counts."""
    negative = np.flatnonzero(weights_N < 0)
    if len(negative):
        rows = [BadRow(int(row), None, f"the weight {weights_N[row]:g} is below 0") for row in negative[:20]]
        raise BadRows(f"{field}: {len(negative)} weights are below 0", rows=rows, field=field)
    if not weights_N.any():
        raise OutOfRange(f"{field}: every weight is 0", field=field, given=0, expected="a row that counts")


def _check_corpus(loss: Loss, *, field: str) -> None:
    """Raise `IgnoredField` for a loss that searches no documents."""
    if loss is not Loss.MULTIPLE_NEGATIVES:
        raise IgnoredField(
            f"{field} has no effect with {loss}: documents are searched with multiple_negatives",
            field=field,
            expected="no corpus, or multiple_negatives",
        )


def _dataset_groups(table: Table, column: str | None, *, field: str) -> Groups | None:
    return None if column is None else Groups(*table.codes(column, field=field))


def _inline_groups(value: object, rows: int, *, field: str) -> Groups:
    expected = "one string or whole number a row"
    groups = one_per_row(value, field=field, rows=rows, expected=expected)
    for row, group in enumerate(groups):
        if type(group) not in (str, int) or type(group) is not type(groups[0]):
            kind = NotFinite if type(group) is float and not is_finite(group) else WrongType
            raise kind(
                f"{field}, row {row}: not {expected}, all of one kind",
                field=field,
                row=row,
                given=group,
                expected=expected,
            )
    values = sorted(set(groups))
    codes = {group: code for code, group in enumerate(values)}
    return Groups(np.array([codes[group] for group in groups], np.int64), values)
