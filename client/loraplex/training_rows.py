"""Rows of a training in the form in which they are sent: in the request, or as temporary data sets."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.arrays import array, finite, lists_of_vectors, stack_columns, table_columns
from loraplex.calls import encoded
from loraplex.errors import InvalidCombination, InvalidInput, WrongShape, WrongType
from loraplex.tables import LINES, write_table

# Numbers of inputs, targets and the rest that are sent in the request: about 4 MiB of JSON.
INLINE_NUMBERS = 200_000
_IN_TABLE = ("inputs", "targets", "weights", "groups")
ARRAYS = ("targets", "weights", "groups", "corpus")
"""Fields of the rows, beside the inputs, that have a value for each row or document."""


def rows_of_table(rows: Mapping[str, Any], data: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the rows of a table as arrays, with no data; return rows and data unchanged if the data are no table.

    In a table, the inputs, targets, weights and groups are names of columns. The inputs may be a list of them, and so
    may the targets; by default, the inputs are all other columns.
    """
    table = None if isinstance(data, Mapping) else table_columns(data)
    if table is None:
        return rows, data
    columns = dict(table)
    if len(columns) < len(table):
        repeated = next(name for index, (name, _) in enumerate(table) if name in dict(table[:index]))
        detail = f"the table has two columns {repeated!r}"
        raise InvalidInput(detail, field="data", given=repeated, expected="columns of different names")
    names = {name: _names(rows[name]) for name in _IN_TABLE if name in rows}
    if "targets" not in names:
        detail = "the rows are a table: say which of its columns are the targets"
        raise InvalidCombination(detail, field="targets", expected='targets="name of a column"')
    taken = {name for columns_taken in names.values() for name in columns_taken}
    names.setdefault("inputs", [name for name in columns if name not in taken])
    missing = [name for selected in names.values() for name in selected if name not in columns]
    if missing:
        present = ", ".join(list(columns)[:20])
        detail = f"the table has no column {missing[0]!r}; it has: {present}"
        raise InvalidInput(detail, field="data", given=missing[0], expected="a column of the table")
    arrays = {
        name: columns[selected[0]]
        # One column of numbers is no single row of inputs.
        if len(selected) == 1 and name != "inputs"
        else stack_columns([(column, columns[column]) for column in selected], field=f"data.{name}")
        for name, selected in names.items()
    }
    return {**rows, **arrays}, None


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(map(str, value))


def fits_in_request(rows: Mapping[str, Any]) -> bool:
    """Return whether the arrays are small enough for a request in JSON."""
    return sum(value.size for value in rows.values() if isinstance(value, np.ndarray)) <= INLINE_NUMBERS


def temporary_name(columns: Mapping[str, Any], key: str) -> str:
    """Return the name of the temporary data set of a request with an idempotency key.

    A repeated request is the same only if it has the same names, and another one with the same key if it has others.
    """
    digest = hashlib.sha256(key.encode())
    for name, column in columns.items():
        is_numbers = isinstance(column, np.ndarray) and column.dtype.kind in "biuf"
        digest.update(encoded([name, str(column.dtype), column.shape] if is_numbers else [name]))
        digest.update(np.ascontiguousarray(column).data if is_numbers else encoded(column))
    return f"loraplex-client-{digest.hexdigest()[:32]}"


def columns_of(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the data set that holds the arrays, without the documents."""
    columns = {"inputs": "inputs", "targets": "targets", "weights": "weights", "groups": "group"}
    return {column: rows[name] for name, column in columns.items() if name in rows}


def references(rows: Mapping[str, Any], dataset: str, *, fleet: bool) -> dict[str, Any]:
    """Return the `data` of a request whose arrays are in a data set, without the documents."""
    data = {name: value for name, value in rows.items() if name != "inputs" and name not in ARRAYS}
    data |= {"dataset": dataset, "inputs": {"column": "inputs"}, "targets": {"column": "targets"}}
    if "weights" in rows:
        data["weight"] = "weights"
    if "groups" in rows:
        # The placeholder of a fleet is the name of its column, which is `{group}` for rows in the request.
        data["group_by" if fleet else "group"] = "group"
    return data


def write_columns(columns: Mapping[str, Any], file: Path) -> str:
    """Write arrays and lists of labels to a file, and return its media type."""
    # Lists of labels differ in length, which NPZ cannot represent.
    if all(isinstance(column, np.ndarray) for column in columns.values()):
        return write_table(columns, file)
    # A scalar has no length.
    lengths = {name: len(column) if getattr(column, "ndim", 1) else None for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        detail = "columns differ in length: " + ", ".join(f"{name} has {rows}" for name, rows in lengths.items())
        raise WrongShape(detail, given=lengths, expected="a value for each row")
    with file.open("wb") as opened:
        for row in zip(*columns.values(), strict=True):
            opened.write(encoded(dict(zip(columns, row, strict=True))) + b"\n")
    return LINES


def values_of(value: Any, *, field: str) -> Any:
    """Return an array, with floats finite as float32; return a list of lists of labels unchanged.

    Raises `WrongType` for values of several types, which an array would convert to one (["cat", 1] to two texts), and
    for those that are neither numbers, text nor truth values, such as a missing label.
    """
    columns = table_columns(value)
    if columns is not None and len(columns) == 1:
        value = columns[0][1]
    elif columns is not None:
        value = stack_columns(columns, field=field)
    value = lists_of_vectors(value, field=field)
    if isinstance(value, list | tuple):
        if all(isinstance(row, list | tuple) for row in value):
            has_names = any(isinstance(name, str) for row in value for name in row)
            if has_names or len({len(row) for row in value}) > 1:
                return [list(row) for row in value]
        else:
            _check_kinds(value, field=field)
    values = array(value, field=field)
    if values.dtype.kind not in "biufUO":
        detail, expected = f"{field} are of the type {values.dtype}", "numbers, text, or true and false"
        raise WrongType(detail, field=field, given=str(values.dtype), expected=expected)
    if values.dtype.kind == "O" and values.ndim == 1:
        _check_kinds(values.tolist(), field=field)
    return finite(values, field=field) if values.dtype.kind == "f" else values


def _check_kinds(values: Sequence[Any], *, field: str) -> None:
    """Raise `WrongType` with the first row that has no number, text or truth value, or for rows of several kinds."""
    kinds = {type_: _kind(type_) for type_ in set(map(type, values))}
    for row, value in enumerate(values if None in kinds.values() or len(set(kinds.values())) > 1 else ()):
        # A text column of pandas has NaN where it has no value.
        is_missing = isinstance(value, float) and value != value and "text" in kinds.values()
        if kinds[type(value)] is None or is_missing:
            detail, expected = f"{field}, row {row}: {str(value)[:80]} cannot be used", "a number, text, true or false"
            raise WrongType(detail, field=field, row=row, given=str(value)[:80], expected=expected)
    if len(set(kinds.values())) > 1:
        names, expected = ", ".join(sorted(type_.__name__ for type_ in kinds)), "numbers, text, or true and false alone"
        raise WrongType(f"{field} are of several kinds", field=field, given=names, expected=expected)


def _kind(type_: type) -> str | None:
    """Return the kind of the labels of a type; None for one of no labels. Vectors and tensors count as numbers."""
    if issubclass(type_, str):
        return "text"
    if issubclass(type_, bool | np.bool_):
        return "truth"
    is_number = issubclass(type_, int | float | np.integer | np.floating | list | tuple) or hasattr(type_, "__array__")
    return "number" if is_number else None
