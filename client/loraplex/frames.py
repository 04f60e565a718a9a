"""Results as DataFrames of pandas and polars, and as HTML tables in notebooks. Both libraries are optional.

A nested member becomes a column of its own, such as `live.version`, and a time a datetime in UTC.
"""

import html
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import datetime
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
# Values by the name of their column: lists or arrays.
Columns = Mapping[str, Any]

# Endings of the names of times.
_TIMES = ("_at", "hour")
# Members that are no values: a job has its client.
_OMITTED = ("client",)
# Columns that a notebook shows of a result, by the name of its class. Of others, it shows all that are not nested.
_SHOWN: Mapping[str, Sequence[str]] = {
    "Adapter": ("name", "live.version", "versions", "live.rank", "live.labels", "problem", "created_at"),
    "Version": ("adapter", "version", "rank", "alpha", "labels", "bytes", "source", "created_at"),
    "JobFields": ("id", "kind", "status", "adapter", "created_at", "finished_at", "result.version", "error"),
    "EvaluatedAdapter": ("adapter", "figure", "interval", "gain", "gain_error", "missing_rows", "problem"),
    "JobAdapter": ("name", "group", "rows", "version", "outcome", "gain", "moved_live", "error"),
}
# Member whose items are the rows of a result, by the name of its class.
_ROWS: Mapping[str, str] = {"EvaluationResult": "adapters", "Preview": "rows"}
_MAX_ROWS, _MAX_COLUMNS, _MAX_CHARACTERS = 20, 12, 80


def to_pandas(results: Any) -> Any:
    """Return a pandas DataFrame of one result of the client, or of several, such as `client.adapters()`."""
    return _library("pandas").DataFrame(columns_of(results))


def to_polars(results: Any) -> Any:
    """Return a polars DataFrame of one result of the client, or of several, such as `client.adapters()`."""
    polars = _library("polars")
    return polars.DataFrame([_series(polars, name, values) for name, values in columns_of(results).items()])


class Tabular:
    """Result that can be a DataFrame, and that a notebook shows as a table."""

    __slots__ = ()

    def to_pandas(self) -> Any:
        """Return the result as a pandas DataFrame."""
        return to_pandas(self)

    def to_polars(self) -> Any:
        """Return the result as a polars DataFrame."""
        return to_polars(self)

    def _columns(self) -> Columns:
        """Return the columns of the DataFrame: one row, or one for each item of the member in `_ROWS`."""
        member = _ROWS.get(type(self).__name__)
        return columns_of([self] if member is None else getattr(self, member))

    def _repr_html_(self) -> str:
        columns = self._columns()
        if any(len(values) != 1 for values in columns.values()):
            return _table(_shown(columns))
        shown = _shown(columns, self)
        return _table({"": list(shown), "value": [values[0] for values in shown.values()]}, max_rows=len(shown))


class Listing(Iterator[T]):
    """Items of a list of the service. Each page is requested when it is needed, and each item comes once."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._peeked: deque[T] = deque()

    def __next__(self) -> T:
        return self._peeked.popleft() if self._peeked else next(self._items)

    def to_pandas(self) -> Any:
        """Return the remaining items as a pandas DataFrame."""
        return to_pandas(self)

    def to_polars(self) -> Any:
        """Return the remaining items as a polars DataFrame."""
        return to_polars(self)

    def _repr_html_(self) -> str:
        # The items that are shown are kept for the iteration.
        self._peeked.extend(islice(self._items, max(0, _MAX_ROWS + 1 - len(self._peeked))))
        items = list(self._peeked)
        return _table(_shown(columns_of(items), *items[:1]))


class AsyncListing(AsyncIterator[T]):
    """Items of a list of the service. Each page is requested when it is needed, and each item comes once."""

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items

    async def __anext__(self) -> T:
        return await anext(self._items)

    async def to_pandas(self) -> Any:
        """Return the remaining items as a pandas DataFrame."""
        return to_pandas([item async for item in self])

    async def to_polars(self) -> Any:
        """Return the remaining items as a polars DataFrame."""
        return to_polars([item async for item in self])


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"to_{name} needs {name}, which is not installed: pip install {name}", name=name) from error


def columns_of(results: Any) -> Columns:
    """Return the columns of one result, or of an iterable of results; each value is None if a result lacks it."""
    if isinstance(results, Tabular):
        return results._columns()
    items = [results] if is_dataclass(results) or isinstance(results, Mapping) else results
    records: list[dict[str, Any]] = [dict(_flat("", item)) for item in items]
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    nested = {name.rpartition(".")[0] for name in names}
    # A member that is None in one result may be nested in another, and lists leave out long members.
    empty = {name for name, values in columns.items() if not any(values) and (name in nested or [] in values)}
    return {name: values for name, values in columns.items() if name not in empty}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    members: Iterable[tuple[str, Any]]
    if is_dataclass(value):
        members = ((field.name, getattr(value, field.name)) for field in fields(value) if field.name not in _OMITTED)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        members = value._asdict().items()
    elif isinstance(value, Mapping):
        members = ((str(key), member) for key, member in value.items())
    else:
        yield name, _cell(name, value)
        return
    for key, member in members:
        yield from _flat(f"{name}.{key}" if name else key, member)


def _cell(name: str, value: Any) -> Any:
    if isinstance(value, str):
        with suppress(ValueError):
            return datetime.fromisoformat(value) if name.endswith(_TIMES) else str(value)
    if isinstance(value, Exception):
        return f"{getattr(value, 'code', 'error')}: {value}"
    if isinstance(value, list | tuple):
        return [dict(_flat("", item)) if _is_nested(item) else _cell("", item) for item in value]
    return value


def _is_nested(value: Any) -> bool:
    return is_dataclass(value) or hasattr(value, "_asdict") or isinstance(value, Mapping)


def _series(polars: Any, name: str, values: Sequence[Any]) -> Any:
    if set(map(type, values)) - {type(None)} == {int, float}:
        values = [None if value is None else float(value) for value in values]
    try:
        return polars.Series(name, values)
    except (TypeError, ValueError, OverflowError, polars.exceptions.PolarsError):
        # A column has one type: others, such as lists of text in one row and of numbers in another, become JSON.
        return polars.Series(name, [None if value is None else json.dumps(value, default=str) for value in values])


def _shown(columns: Columns, *result: Any) -> Columns:
    """Return the columns of a result's class that a notebook shows."""
    bases = [base.__name__ for item in result for base in type(item).__mro__]
    names = next((_SHOWN[base] for base in bases if base in _SHOWN), None)
    if names is None:
        names = [name for name, values in columns.items() if "." not in name and not isinstance(values[0], list)]
    return {name: columns[name] for name in names if name in columns}


def _table(columns: Columns, *, max_rows: int = _MAX_ROWS) -> str:
    """Return an HTML table of the first rows and columns, with every text escaped."""
    names = list(columns)[:_MAX_COLUMNS]
    rows = list(islice(zip(*(columns[name] for name in names), strict=True), max_rows + 1))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows[:max_rows]
    )
    has_more = len(rows) > max_rows or len(columns) > len(names)
    more = "<p>… and more: to_pandas() has all.</p>" if has_more else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, datetime):
        return f"{cell:%Y-%m-%d %H:%M:%S}"
    if isinstance(cell, list):
        cell = ", ".join(map(str, cell))
    text = f"{cell:.4g}" if hasattr(cell, "is_integer") and not isinstance(cell, int) else str(cell)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
