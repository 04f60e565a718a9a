"""Copies of the rows of every table from one database to another, with a sum of each table for the comparison.

The tables are those of the schema, so that a new one is copied without a change here.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from adapters.errors import MigrationFailed, OutOfRange
from adapters.storage.database import Database, to_json
from adapters.storage.schema import catalog, metadata, pending_blobs

# Rows in memory, and in one transaction.
_ROWS_AT_ONCE = 2_000
_SUM_MODULUS = 2**256

Report = Callable[[str], object]
"""Callback with a line about the progress."""


class TableSum(NamedTuple):
    """Number of rows of a table, and a digest of their content that does not depend on their order."""

    rows: int
    digest: str


def copied_tables() -> list[sa.Table]:
    """Return the tables whose rows are copied.

    The row of `catalog` says what a database is, so that `finish_copy` writes it last. The owners of pending blobs are
    processes on the storage that is left.
    """
    return [table for table in metadata.sorted_tables if table not in (catalog, pending_blobs)]


def sum_tables(connection: Connection) -> dict[str, TableSum]:
    """Return the sum of each table, by name, as one transaction sees them."""
    return {table.name: _sum(connection, table) for table in copied_tables()}


def copy_tables(source: Connection, target: Database, *, report: Report) -> dict[str, TableSum]:
    """Make the tables of `target` those that one transaction sees, in batches; return their sums.

    Tables that are equal already are left as they are, so that a copy which was interrupted goes on with the table that
    it had begun. Raises `MigrationFailed` if a table is another one afterwards.
    """
    sums = {}
    for table in copied_tables():
        with target.read() as connection:
            is_empty = connection.execute(sa.select(table).limit(1)).first() is None
            before = None if is_empty else _sum(connection, table)
        if before is not None and before == _sum(source, table):
            sums[table.name] = before
            continue
        expected = _replace(source, target, table, is_empty=is_empty)
        if expected.rows:
            report(f"table {table.name}: {expected.rows:,} rows")
        with target.read() as connection:
            sums[table.name] = _sum(connection, table)
        if sums[table.name] != expected:
            raise MigrationFailed(f"the copy of the table {table.name} differs: {sums[table.name]}, not {expected}")
    return sums


def finish_copy(source: Connection, target: Connection) -> None:
    """Write the row of `catalog`, and let the numbers of rows go on, in the transaction of `target`."""
    for table in copied_tables():
        column = table.autoincrement_column
        if column is not None and column.autoincrement is True:
            _write_last_number(target, column, _read_last_number(source, column))
    row = source.execute(sa.select(catalog)).one()._mapping
    target.execute(sa.update(catalog).values({name: row[name] for name in row if name != "id"}))


def _replace(source: Connection, target: Database, table: sa.Table, *, is_empty: bool) -> TableSum:
    """Copy the rows of a table, and remove those that are in `target`; return the sum of the copied ones."""
    if not is_empty:
        with target.write() as connection:
            connection.execute(sa.delete(table))
    running = _RunningSum(table)
    for rows in _read(source, table):
        running.add(rows)
        try:
            with target.write() as connection:
                connection.execute(sa.insert(table), [dict(row) for row in rows])
        except OutOfRange as error:
            raise MigrationFailed(f"a row of the table {table.name} cannot be copied: {error.detail}") from error
    return running.result()


def _sum(connection: Connection, table: sa.Table) -> TableSum:
    running = _RunningSum(table)
    for rows in _read(connection, table):
        running.add(rows)
    return running.result()


def _read(connection: Connection, table: sa.Table) -> Iterator[Sequence[RowMapping]]:
    """Yield the rows of a table in batches, without holding all of them in memory."""
    statement = sa.select(table).execution_options(yield_per=_ROWS_AT_ONCE)
    yield from connection.execute(statement).mappings().partitions()


class _RunningSum:
    """Sum of the digests of rows: databases return them in different orders."""

    def __init__(self, table: sa.Table) -> None:
        self._names = [column.name for column in table.columns]
        self._rows = self._total = 0

    def add(self, rows: Iterable[RowMapping]) -> None:
        for row in rows:
            values = [_plain(row[name]) for name in self._names]
            self._total += int.from_bytes(hashlib.sha256(to_json(values).encode()).digest())
            self._rows += 1

    def result(self) -> TableSum:
        return TableSum(self._rows, f"{self._total % _SUM_MODULUS:064x}")


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _read_last_number(connection: Connection, column: sa.Column[Any]) -> int:
    """Return the greatest number that a row of a table has had; SQLite does not remember that of each table."""
    last = int(connection.scalar(sa.select(sa.func.max(column))) or 0)
    if connection.dialect.name == "sqlite":
        statement = sa.text("SELECT max(seq) FROM sqlite_sequence WHERE name = :table")
        return max(last, int(connection.scalar(statement, {"table": column.table.name}) or 0))
    sequence = _sequence(connection, column)
    statement = sa.text(f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {sequence}")
    return max(last, int(connection.scalar(statement) or 0))


def _write_last_number(connection: Connection, column: sa.Column[Any], number: int) -> None:
    if connection.dialect.name != "sqlite":
        values = {"sequence": _sequence(connection, column), "number": max(number, 1), "is_used": number > 0}
        connection.execute(sa.text("SELECT setval(:sequence, :number, :is_used)"), values)
    elif column.table.dialect_options["sqlite"]["autoincrement"]:
        values = {"table": column.table.name, "number": number}
        connection.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = :table"), values)
        connection.execute(sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :number)"), values)


def _sequence(connection: Connection, column: sa.Column[Any]) -> str:
    names = {"table": column.table.name, "column": column.name}
    return str(connection.scalar(sa.text("SELECT pg_get_serial_sequence(:table, :column)"), names))
