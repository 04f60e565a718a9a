"""The rows that a request brings, inline or from a data set: checked in full, read part by part."""

# N rows · I in_features · O out_features · M documents
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.datasets.selection import Selection, parse_selection
from adapters.datasets.table import Table
from adapters.errors import BadRow, BadRows, IgnoredField, NotFinite, OutOfRange, WrongShape, WrongType
from adapters.matrices import Float32, is_finite, matrix, vector
from adapters.names import parse_reference
from adapters.training.data import Column, whole
from adapters.training.spec import Loss
from app.bodies import read_as
from app.service import Service
from app.training.schemas import DatasetData, InlineData
from app.training.targets import (
    Targets,
    check_has_labels,
    coded_targets,
    inline_targets,
    listed_targets,
    shares,
)

Codes = NDArray[np.int64]
_NUMBERS_AT_ONCE = 2**21


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which rows belong together."""

    codes_N: Codes
    """(N,) int64: places in `values`."""
    values: Sequence[str | int]
    """Sorted, each there at least once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Checked rows, not yet stored."""

    count: int
    inputs: Callable[[], Iterator[Float32]]
    """(n, I) parts, as often as asked."""
    targets: Callable[[], Iterator[NDArray[Any]]]
    """(n, O) or (n, C) float32 parts, or (n,) int64."""
    target_shape: Sequence[int]
    """Of all of them: (N, O), (N, C) or (N,)."""
    weights_N: Float32 | None
    classes_N: Codes | None
    labels: tuple[str | int, ...] | None
    groups: Groups | None
    fleet: Groups | None
    corpus_MO: Float32 | None
    table: Table | None
    """The data set that they are of."""
    shown: Mapping[str, Any]
    """How the job says what they are, but for `rows` and `digest`."""

    def columns(self, prefix: str = "") -> dict[str, Column]:
        """What a data file stores of them, under names that begin with `prefix`."""
        kind = "I64" if self.classes_N is not None else "F32"
        found = {
            f"{prefix}inputs_NI": Column("F32", (self.count, self.width), self.inputs()),
            f"{prefix}targets": Column(kind, self.target_shape, self.targets()),
        }
        if self.weights_N is not None:
            found[f"{prefix}weights_N"] = whole(self.weights_N)
        return found

    @property
    def width(self) -> int:
        """I."""
        return int(next(self.inputs()).shape[1])


def read_rows(
    service: Service,
    value: object,
    loss: Loss,
    *,
    field: str = "data",
    labels: object = None,
    as_dataset: DatasetData | None = None,
) -> Rows:
    """Rows from a request's `data`, or, with `as_dataset`, from the columns of another data set, which `value` names.

    `labels` win over those that the data would give. Raises the `InvalidInput` that names field and row.
    """
    if as_dataset is not None:
        again = as_dataset.model_copy(update={"dataset": value, "corpus": None, "group_by": None})
        return _from_dataset(service, again, loss, field=field, labels=labels)
    if not isinstance(value, dict):
        raise WrongType(f"{field} must be an object", field=field, given=value, expected="rows, or a data set")
    if "dataset" in value:
        body = read_as(DatasetData, value, within=field)
        return _from_dataset(service, body, loss, field=field, labels=labels if body.labels is None else body.labels)
    inline = read_as(InlineData, value, within=field)
    return _from_request(service, inline, loss, field=field, labels=labels if inline.labels is None else inline.labels)


def _from_request(service: Service, body: InlineData, loss: Loss, *, field: str, labels: object) -> Rows:
    base = service.base
    inputs_NI = matrix(body.inputs, field=f"{field}.inputs", columns=base.in_features)
    rows = len(inputs_NI)
    targets = inline_targets(
        body.targets, loss, field=f"{field}.targets", rows=rows, outputs=base.out_features, labels=labels
    )
    weights_N = None
    if body.weights is not None:
        weights_N = _weights(vector(body.weights, field=f"{field}.weights", length=rows), field=f"{field}.weights")
    groups = None if body.groups is None else _inline_groups(body.groups, rows, field=f"{field}.groups")
    corpus_MO = None
    if body.corpus is not None:
        _check_corpus(loss, field=f"{field}.corpus")
        corpus_MO = matrix(body.corpus, field=f"{field}.corpus", columns=base.out_features)
    return Rows(
        count=rows,
        inputs=lambda: iter([inputs_NI]),
        targets=lambda: iter([targets.values]),
        target_shape=targets.values.shape,
        weights_N=weights_N,
        classes_N=targets.values if targets.values.ndim == 1 else None,  # type: ignore[arg-type]  # (N,) is int64
        labels=targets.labels,
        groups=groups,
        fleet=groups,
        corpus_MO=corpus_MO,
        table=None,
        shown={},
    )


def _from_dataset(service: Service, body: DatasetData, loss: Loss, *, field: str, labels: object) -> Rows:
    base = service.base
    reference = parse_reference(body.dataset, field=f"{field}.dataset")
    version = service.datasets.find(reference, field=f"{field}.dataset")
    table = Table.open(service.datasets.path(version))
    inputs = parse_selection(body.inputs, field=f"{field}.inputs")
    targets = parse_selection(body.targets, field=f"{field}.targets")
    _check_width(table, inputs, base.in_features, field=f"{field}.inputs")
    table.check_numbers(inputs, field=f"{field}.inputs")
    known = _column_targets(table, targets, loss, field=f"{field}.targets", outputs=base.out_features, labels=labels)
    if known is None:
        _check_width(table, targets, base.out_features, field=f"{field}.targets")
        table.check_numbers(targets, field=f"{field}.targets")
    shape = (table.rows, base.out_features) if known is None else known.values.shape
    weights_N = None
    if body.weight is not None:
        column = Selection(column=body.weight)
        _check_width(table, column, 1, field=f"{field}.weight")
        weights_N = _weights(table.numbers(column, field=f"{field}.weight")[:, 0], field=f"{field}.weight")
    corpus_MO = None
    if body.corpus is not None:
        _check_corpus(loss, field=f"{field}.corpus")
        corpus_MO = _corpus(service, body.corpus.dataset, body.corpus.documents, field=f"{field}.corpus")
    shown: dict[str, Any] = {
        "dataset": str(version),
        "dataset_digest": version.digest,
        "inputs": inputs.to_json(),
        "targets": targets.to_json(),
    }
    shown |= {name: getattr(body, name) for name in ("weight", "group", "group_by") if getattr(body, name) is not None}

    def parts_of(selection: Selection, part: str) -> Iterator[Float32]:
        step = max(1, _NUMBERS_AT_ONCE // max(base.in_features, base.out_features))
        for begin in range(0, table.rows, step):
            yield table.numbers(selection, field=f"{field}.{part}", begin=begin, end=begin + step)

    return Rows(
        count=table.rows,
        inputs=lambda: parts_of(inputs, "inputs"),
        targets=lambda: parts_of(targets, "targets") if known is None else iter([known.values]),
        target_shape=shape,
        weights_N=weights_N,
        classes_N=known.values if known is not None and known.values.ndim == 1 else None,  # type: ignore[arg-type]
        labels=None if known is None else known.labels,
        groups=_column_groups(table, body.group, field=f"{field}.group"),
        fleet=_column_groups(table, body.group_by, field=f"{field}.group_by"),
        corpus_MO=corpus_MO,
        table=table,
        shown=shown,
    )


def _column_targets(
    table: Table, selection: Selection, loss: Loss, *, field: str, outputs: int, labels: object
) -> Targets | None:
    """Targets that are classes; None where they are numbers, which are read part by part."""
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
        return coded_targets(codes_N, values, field=field, outputs=outputs, labels=labels)
    if loss is not Loss.BINARY_CROSS_ENTROPY:
        return None
    if selection.column is not None and _lists_labels(table.type_of(selection.column, field=field), labels):
        return listed_targets(table.lists(selection.column, field=field), field=field, outputs=outputs, labels=labels)
    return shares(table.numbers(selection, field=field), field=field, outputs=outputs, labels=labels)


def _lists_labels(kind: str, labels: object) -> bool:
    """Whether a column lists labels, rather than 0 and 1 for each: labels that are numbers are listed."""
    return "string" in kind or (
        "int" in kind and isinstance(labels, list) and any(type(each) is int for each in labels)
    )


def _column_groups(table: Table, column: str | None, *, field: str) -> Groups | None:
    return None if column is None else Groups(*table.codes(column, field=field))


def _inline_groups(value: object, rows: int, *, field: str) -> Groups:
    expected = "one string or whole number a row"
    if not isinstance(value, list):
        raise WrongType(f"{field} must be a list", field=field, given=value, expected=expected)
    if len(value) != rows:
        raise WrongShape(
            f"{field} has {len(value)} rows, inputs has {rows}",
            field=field,
            given=f"{len(value)} rows",
            expected=expected,
        )
    for row, group in enumerate(value):
        if type(group) not in (str, int) or type(group) is not type(value[0]):
            kind = NotFinite if type(group) is float and not is_finite(group) else WrongType
            raise kind(
                f"{field}, row {row}: not {expected}, all of one kind",
                field=field,
                row=row,
                given=group,
                expected=expected,
            )
    values = sorted(set(value))
    place = {group: number for number, group in enumerate(values)}
    return Groups(np.array([place[group] for group in value], np.int64), values)


def _weights(weights_N: Float32, *, field: str) -> Float32:
    negative = np.flatnonzero(weights_N < 0)
    if len(negative):
        rows = [BadRow(int(row), None, f"the weight {weights_N[row]:g} is below 0") for row in negative[:20]]
        raise BadRows(f"{field}: {len(negative)} weights are below 0", rows=rows, field=field)
    if not weights_N.any():
        raise OutOfRange(f"{field}: every weight is 0", field=field, given=0, expected="a row that counts")
    return np.ascontiguousarray(weights_N)


def _check_width(table: Table, selection: Selection, wanted: int, *, field: str) -> None:
    width = table.width(selection, field=field)
    if width != wanted:
        raise WrongShape(
            f"{field} gives {width} numbers a row, expected {wanted}",
            field=field,
            given=f"{width} numbers",
            expected=f"{wanted} numbers",
        )


def _check_corpus(loss: Loss, *, field: str) -> None:
    if loss is not Loss.MULTIPLE_NEGATIVES:
        raise IgnoredField(
            f"{field} has no effect with {loss}: documents are searched with multiple_negatives",
            field=field,
            expected="no corpus, or multiple_negatives",
        )


def _corpus(service: Service, dataset: object, documents: object, *, field: str) -> Float32:
    reference = parse_reference(dataset, field=f"{field}.dataset")
    table = Table.open(service.datasets.path(service.datasets.find(reference, field=f"{field}.dataset")))
    selection = parse_selection(documents, field=f"{field}.documents")
    _check_width(table, selection, service.base.out_features, field=f"{field}.documents")
    return table.numbers(selection, field=f"{field}.documents")
