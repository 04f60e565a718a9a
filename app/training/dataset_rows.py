"""The rows that a request takes from the columns of a data set, and the front of both ways to bring rows."""

# N rows · I in_features · O out_features · C labels
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32
from adapters.datasets.selectors import ColumnSelector, parse_selector
from adapters.datasets.table import Table
from adapters.errors import OutOfRange, WrongShape, WrongType
from adapters.names import parse_reference
from adapters.training.settings import Loss
from app.http.bodies import read_as
from app.service import Service
from app.training.rows import Groups, Numbers, Rows, check_corpus, check_weights, rows_of_request
from app.training.schemas import CorpusBody, DatasetData, InlineData
from app.training.targets import (
    CLASSES_HINT,
    Classes,
    check_has_labels,
    check_shares,
    coded_targets,
    listed_names,
    share_names,
)

MOST_ROWS = 2**23
"""What is looked at before a training is queued (groups, classes, rows on both sides) takes some 200 bytes a row."""
_NUMBERS_AT_ONCE = 2**21


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
        return _rows_of_dataset(service, again, loss, field=field, labels=labels)
    if not isinstance(value, dict):
        raise WrongType(f"{field} must be an object", field=field, given=value, expected="rows, or a data set")
    if "dataset" in value:
        body = read_as(DatasetData, value, within=field)
        known = labels if body.labels is None else body.labels
        return _rows_of_dataset(service, body, loss, field=field, labels=known)
    inline = read_as(InlineData, value, within=field)
    known = labels if inline.labels is None else inline.labels
    return rows_of_request(service, inline, loss, field=field, labels=known)


def _rows_of_dataset(service: Service, body: DatasetData, loss: Loss, *, field: str, labels: object) -> Rows:
    base = service.base
    reference = parse_reference(body.dataset, field=f"{field}.dataset")
    version = service.datasets.find(reference, field=f"{field}.dataset")
    table = Table.open(service.datasets.local(version))
    if table.rows > MOST_ROWS:
        raise OutOfRange(
            f"{field}.dataset has {table.rows} rows; one training takes at most {MOST_ROWS}",
            field=f"{field}.dataset",
            given=f"{table.rows} rows",
            expected=f"at most {MOST_ROWS} rows",
        )
    inputs = parse_selector(body.inputs, field=f"{field}.inputs")
    targets = parse_selector(body.targets, field=f"{field}.targets")
    numbers = _numbers(table, inputs, base.in_features, field=f"{field}.inputs")
    classes_N, wanted, names = _targets(
        table, targets, loss, field=f"{field}.targets", outputs=base.out_features, labels=labels
    )
    weights_N = None
    if body.weight is not None:
        column = ColumnSelector(column=body.weight)
        _check_width(table, column, 1, field=f"{field}.weight")
        weights_N = check_weights(table.numbers(column, field=f"{field}.weight")[:, 0], field=f"{field}.weight")
    shown: dict[str, Any] = {
        "dataset": str(version),
        "dataset_digest": version.digest,
        "inputs": inputs.to_json(),
        "targets": targets.to_json(),
    }
    shown |= {name: getattr(body, name) for name in ("weight", "group", "group_by") if getattr(body, name) is not None}
    return Rows(
        inputs=numbers,
        targets=wanted,
        weights_N=weights_N,
        classes_N=classes_N,
        labels=names,
        groups=_groups(table, body.group, field=f"{field}.group"),
        fleet=_groups(table, body.group_by, field=f"{field}.group_by"),
        corpus=None if body.corpus is None else _corpus(service, body.corpus, loss, field=f"{field}.corpus"),
        table=table,
        shown=shown,
    )


def _targets(
    table: Table, selection: ColumnSelector, loss: Loss, *, field: str, outputs: int, labels: object
) -> tuple[Classes | None, Numbers, tuple[str | int, ...] | None]:
    """The classes where each row has one; what a data file stores; the labels."""
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
        found = coded_targets(codes_N, values, field=field, outputs=outputs, labels=labels)
        return found.classes, Numbers.of(found.values), found.labels
    if loss is not Loss.BINARY_CROSS_ENTROPY:
        try:
            return None, _numbers(table, selection, outputs, field=field), None
        except WrongType as error:
            error.detail += CLASSES_HINT
            raise
    numbers = isinstance(labels, list) and any(type(name) is int for name in labels)
    if selection.column is not None and table.lists_labels(selection.column, numbers=numbers, field=field):
        rows_K, codes_K, values = table.listed(selection.column, field=field)
        names, places_K = listed_names(values, rows_K, codes_K, field=field, outputs=outputs, labels=labels)
        return None, _holds(table.rows, rows_K, places_K, len(names)), names
    width = table.width(selection, field=field)
    known = share_names(width, labels, field=field, outputs=outputs)
    shares = _numbers(table, selection, width, field=field)
    begin = 0
    for part_NC in shares.parts():
        check_shares(part_NC, field=field, begin=begin)
        begin += len(part_NC)
    return None, shares, known


def _numbers(table: Table, selection: ColumnSelector, wanted: int, *, field: str) -> Numbers:
    """Columns of numbers, looked at in full and read part by part; raises `WrongShape` and `BadRows`."""
    _check_width(table, selection, wanted, field=field)
    table.check_numbers(selection, field=field)
    step = max(1, _NUMBERS_AT_ONCE // wanted)

    def parts() -> Iterator[NDArray[Any]]:
        for begin in range(0, table.rows, step):
            yield table.numbers(selection, field=field, begin=begin, end=begin + step)

    return Numbers((table.rows, wanted), parts)


def _holds(rows: int, rows_K: Classes, places_K: Classes, labels: int) -> Numbers:
    """(N, C): 1 where a row's list has the label."""
    step = max(1, _NUMBERS_AT_ONCE // labels)

    def parts() -> Iterator[Float32]:
        for begin in range(0, rows, step):
            part_NC = np.zeros((min(step, rows - begin), labels), np.float32)
            first, last = np.searchsorted(rows_K, [begin, begin + len(part_NC)])
            part_NC[rows_K[first:last] - begin, places_K[first:last]] = 1
            yield part_NC

    return Numbers((rows, labels), parts)


def _groups(table: Table, column: str | None, *, field: str) -> Groups | None:
    return None if column is None else Groups(*table.codes(column, field=field))


def _corpus(service: Service, body: CorpusBody, loss: Loss, *, field: str) -> Numbers:
    check_corpus(loss, field=field)
    reference = parse_reference(body.dataset, field=f"{field}.dataset")
    table = Table.open(service.datasets.local(service.datasets.find(reference, field=f"{field}.dataset")))
    selection = parse_selector(body.documents, field=f"{field}.documents")
    return _numbers(table, selection, service.base.out_features, field=f"{field}.documents")


def _check_width(table: Table, selection: ColumnSelector, wanted: int, *, field: str) -> None:
    width = table.width(selection, field=field)
    if width != wanted:
        raise WrongShape(
            f"{field} gives {width} numbers a row, expected {wanted}",
            field=field,
            given=f"{width} numbers",
            expected=f"{wanted} numbers",
        )
