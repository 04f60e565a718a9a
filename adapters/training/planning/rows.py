"""Rows of a training, inline or from a data set: checked in full, and read part by part."""

# N rows · I in_features · O out_features · C labels · M documents
import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.arrays import Float32, matrix, one_per_row, vector
from adapters.datasets.columns import ColumnSelector, parse_selector
from adapters.datasets.store import DatasetVersion
from adapters.datasets.table import Table
from adapters.errors import BadRow, BadRows, InvalidCombination, InvalidName, LoraplexError, MissingField, OutOfRange
from adapters.jobs.job_adapters import JobAdapter
from adapters.lora.base_layer import BaseLayer
from adapters.names import check_name
from adapters.training.data_file import Column, rows_digest
from adapters.training.limits import MAX_DATASET_ROWS
from adapters.training.planning.request import DatasetColumns, InlineRows, RowSource
from adapters.training.planning.targets import (
    Codes,
    TargetReader,
    Targets,
    check_one_kind,
    infer_loss,
    infer_loss_of_columns,
    read_numbers,
)
from adapters.training.settings import Loss, no_effect

# Lookup of a data set by its reference, which raises the error about the field with this name.
OpenTable = Callable[[object, str], tuple[DatasetVersion, Table]]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NO_SLUG = re.compile(r"[^a-z0-9]+")
_MAX_SLUG_CHARACTERS = 40


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

    inputs: Column
    """(N, I) float32."""
    targets: Targets
    weights_N: Float32 | None = None
    groups: Groups | None = None
    """Groups that a split keeps together."""
    fleet: Groups | None = None
    """Groups with one adapter each."""
    corpus: Column | None = None
    """(M, O) float32."""
    table: Table | None = None
    """The data set that they come from."""
    origin: Mapping[str, Any]
    """Data set and columns that they come from, as the job shows them; empty if inline."""

    @property
    def count(self) -> int:
        """Return N."""
        return self.inputs.shape[0]

    def job_adapters(self, name: str, *, is_fleet: bool, max_groups: int) -> list[JobAdapter]:
        """Return the adapters to train: of a fleet, one for each group, in the order of the group codes.

        name: of a fleet, the template of its names, such as `acme-{tenant}`. Raises the `InvalidInput` that names the
        field.
        """
        group_by = self.origin.get("group_by")
        if is_fleet:
            groups = _fleet_groups(name, self, "group" if self.table is None else group_by, max_groups=max_groups)
            sizes = np.bincount(groups.codes_N, minlength=len(groups.values)).tolist()
            names = _expand(name, groups.values)
            return [
                JobAdapter(adapter, str(value), size, position=position)
                for position, (adapter, value, size) in enumerate(zip(names, groups.values, sizes, strict=True))
            ]
        if group_by is not None:
            detail = f"data.group_by trains an adapter a group: the name has to have {{{group_by}}}"
            raise InvalidCombination(detail, field="name", expected=f"a template such as acme-{{{group_by}}}")
        return [JobAdapter(name, None, self.count)]

    def description(self) -> dict[str, Any]:
        """Return what the rows are, as a job and a version show it."""
        return {**self.origin, "rows": self.count, "digest": rows_digest(self.columns())}

    def columns(self, prefix: str = "") -> dict[str, Column]:
        """Return the columns of a data file, with names that begin with `prefix`."""
        columns = {f"{prefix}inputs_NI": self.inputs, f"{prefix}targets": self.targets.column}
        return columns if self.weights_N is None else columns | {f"{prefix}weights_N": Column.of(self.weights_N)}


def read_rows(
    source: RowSource,
    loss: Loss,
    open_table: OpenTable,
    *,
    base: BaseLayer,
    field: str = "data",
    are_evaluated: bool = False,
) -> Rows:
    """Read and check the rows of a request for targets of this loss.

    are_evaluated: whether they are rows of an evaluation. Raises the `InvalidInput` that names the field and the row.
    """
    if source.corpus is not None and loss is not Loss.MULTIPLE_NEGATIVES:
        raise no_effect(f"{field}.corpus", f"with {loss}, which searches no documents")
    targets = TargetReader(
        loss=loss,
        outputs=base.out_features,
        labels=source.labels,
        field=f"{field}.targets",
        are_evaluated=are_evaluated,
        base_labels=base.labels,
    )
    if isinstance(source, DatasetColumns):
        rows = _dataset_rows(source, targets, open_table, base=base, field=field)
    else:
        rows = _inline_rows(source, targets, base=base, field=field)
    if rows.weights_N is not None:
        _check_weights(rows.weights_N, field=f"{field}.weights" if rows.table is None else f"{field}.weight")
    return rows


def loss_of(source: RowSource, open_table: OpenTable, *, base: BaseLayer) -> Loss:
    """Return the loss for the targets of a request that leaves it open; raise the error that names the field."""
    has_labels = source.labels is not None
    if isinstance(source, InlineRows):
        return infer_loss(source.targets, has_labels=has_labels, outputs=base.out_features)
    _, table = open_table(source.dataset, "data.dataset")
    field = "data.targets"
    selection = parse_selector(source.targets, field=field)
    return infer_loss_of_columns(table, selection, has_labels=has_labels, outputs=base.out_features, field=field)


def _inline_rows(source: InlineRows, targets: TargetReader, *, base: BaseLayer, field: str) -> Rows:
    inputs_NI = matrix(source.inputs, field=f"{field}.inputs", columns=base.in_features)
    count = len(inputs_NI)
    weights = None if source.weights is None else vector(source.weights, field=f"{field}.weights", length=count)
    corpus = None
    if source.corpus is not None:
        corpus = Column.of(matrix(source.corpus, field=f"{field}.corpus", columns=base.out_features))
    groups = None if source.groups is None else _inline_groups(source.groups, count, field=f"{field}.groups")
    return Rows(
        inputs=Column.of(inputs_NI),
        targets=targets.read_inline(source.targets, rows=count),
        weights_N=weights,
        groups=groups,
        fleet=groups,
        corpus=corpus,
        origin={},
    )


def _dataset_rows(
    source: DatasetColumns, targets: TargetReader, open_table: OpenTable, *, base: BaseLayer, field: str
) -> Rows:
    version, table = open_table(source.dataset, f"{field}.dataset")
    if table.rows > MAX_DATASET_ROWS:
        given, expected = f"{table.rows} rows", f"at most {MAX_DATASET_ROWS} rows"
        detail = f"{field}.dataset has {given}; one training takes {expected}"
        raise OutOfRange(detail, field=f"{field}.dataset", given=given, expected=expected)
    inputs = parse_selector(source.inputs, field=f"{field}.inputs")
    target_columns = parse_selector(source.targets, field=f"{field}.targets")
    weights_N = corpus = None
    if source.weight is not None:
        weights = read_numbers(table, ColumnSelector(column=source.weight), 1, field=f"{field}.weight")
        weights_N = np.concatenate([part_N1[:, 0] for part_N1 in weights.parts()])
    if source.corpus is not None:
        documents = parse_selector(source.corpus.documents, field=f"{field}.corpus.documents")
        _, documents_table = open_table(source.corpus.dataset, f"{field}.corpus.dataset")
        corpus = read_numbers(documents_table, documents, base.out_features, field=f"{field}.corpus.documents")
    columns = {"weight": source.weight, "group": source.group, "group_by": source.group_by}
    return Rows(
        inputs=read_numbers(table, inputs, base.in_features, field=f"{field}.inputs"),
        targets=targets.read_columns(table, target_columns),
        weights_N=weights_N,
        groups=_dataset_groups(table, source.group, field=f"{field}.group"),
        fleet=_dataset_groups(table, source.group_by, field=f"{field}.group_by"),
        corpus=corpus,
        table=table,
        origin={
            "dataset": str(version),
            "dataset_digest": version.digest,
            "inputs": inputs.to_json(),
            "targets": target_columns.to_json(),
            **{name: column for name, column in columns.items() if column is not None},
        },
    )


def _check_weights(weights_N: Float32, *, field: str) -> None:
    """Raise `BadRows` for weights below 0, and `OutOfRange` if no row counts."""
    negative = np.flatnonzero(weights_N < 0)
    if len(negative):
        rows = [BadRow(int(row), None, f"the weight {weights_N[row]:g} is below 0") for row in negative[:20]]
        raise BadRows(f"{field}: {len(negative)} weights are below 0", rows=rows, field=field)
    if not weights_N.any():
        raise OutOfRange(f"{field}: every weight is 0", field=field, given=0, expected="a row that counts")


def _dataset_groups(table: Table, column: str | None, *, field: str) -> Groups | None:
    return None if column is None else Groups(*table.codes(column, field=field))


def _inline_groups(value: object, rows: int, *, field: str) -> Groups:
    groups = one_per_row(value, field=field, rows=rows, expected="one string or whole number a row")
    check_one_kind(groups, field=field)
    values = sorted(set(groups))
    code_of = {group: code for code, group in enumerate(values)}
    return Groups(np.array([code_of[group] for group in groups], np.int64), values)


def _fleet_groups(template: str, rows: Rows, column: object, *, max_groups: int) -> Groups:
    """Return the groups of a fleet if the template of its names has the placeholder for their column."""
    placeholders = _PLACEHOLDER.findall(template)
    if not placeholders:
        check_name(template)
    if rows.fleet is None:
        field = "data.groups" if rows.table is None else "data.group_by"
        detail = f"name has a placeholder, so each group gets an adapter: say with {field} which group a row is of"
        raise MissingField(detail, field=field, given=template, expected="groups, or a name without a placeholder")
    if placeholders != [column]:
        detail = f"name has to have {{{column}}}, once, and no other placeholder"
        raise InvalidName(detail, field="name", given=template, expected=f"a template such as acme-{{{column}}}")
    count = len(rows.fleet.values)
    if count > max_groups:
        detail = f"the fleet has {count} groups, at most {max_groups} are accepted (LORAPLEX_MAX_GROUPS)"
        raise OutOfRange(detail, field="data", given=f"{count} groups", expected=f"at most {max_groups} groups")
    return rows.fleet


def _expand(template: str, values: Sequence[str | int]) -> list[str]:
    """Return the name of each group's adapter; raise `InvalidName`, and `InvalidCombination` for a name of two groups.

    A value that makes no valid name is replaced by its slug and its hash, which are the same in every job.
    """
    group_of: dict[str, str | int] = {}
    for value in values:
        name = _fill(template, value)
        try:
            check_name(name)
        except LoraplexError as error:
            try:
                name = check_name(_fill(template, _slug(str(value))))
            except LoraplexError:
                raise error.explain(before=f"the group {str(value)[:80]!r} makes no name: ") from None
        if name in group_of:
            first, second = (repr(str(group)[:80]) for group in (group_of[name], value))
            detail, expected = f"the groups {first} and {second} both make the name {name}", "groups of different names"
            raise InvalidCombination(detail, field="name", given=name, expected=expected)
        group_of[name] = value
    return list(group_of)


def renamed(template: str, adapters: Sequence[JobAdapter]) -> list[dict[str, str]]:
    """Return the adapters of groups whose value is not in the name as it is."""
    return [
        {"group": adapter.group, "name": adapter.name}
        for adapter in adapters
        if adapter.group is not None and adapter.name != _fill(template, adapter.group)
    ]


def _fill(template: str, value: object) -> str:
    return _PLACEHOLDER.sub(lambda _: str(value), template)


def _slug(value: str) -> str:
    """Return `<slug>-<8 hex digits>`: the letters and digits of a value as lower-case ASCII, and its SHA-256."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", value) if not unicodedata.combining(char))
    slug = _NO_SLUG.sub("-", plain.lower()).strip("-")[:_MAX_SLUG_CHARACTERS].rstrip("-") or "group"
    return f"{slug}-{hashlib.sha256(value.encode(errors='surrogatepass')).hexdigest()[:8]}"
