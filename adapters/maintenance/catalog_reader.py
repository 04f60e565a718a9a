"""Short reads of a catalogue as it is, in portable SQL, for checks beside a running service.

SQLite's file is read past SQLAlchemy and never migrated, because one of an older release may lack tables and columns.
"""

import sqlite3
from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from adapters.errors import CatalogNotLoadable
from adapters.storage.database import Database
from adapters.storage.pending_blobs import live_owners
from adapters.storage.schema import metadata
from adapters.storage.store_identity import CATALOG, WRITERS, connected

# Rows, or names, that one short statement reads from SQLite: no other process can commit meanwhile.
_ROWS_AT_ONCE = 10_000


class CatalogReader(Protocol):
    """Reads of a catalogue; a statement has `?` in place of each value."""

    def rows(self, statement: str, values: Sequence[object] = ()) -> Sequence[Sequence[Any]]:
        """Return the rows of a statement."""

    def columns(self, table: str) -> Set[str]:
        """Return the names of the columns of a table; none if there is no such table."""

    def rows_where(self, table: str, columns: str, condition: str) -> Iterator[Sequence[Any]]:
        """Yield columns of the rows, called `t`, that fulfil a condition, without holding up writers."""

    def distinct(self, table: str, column: str) -> Iterator[str]:
        """Yield the values of a column. Raises `CatalogNotLoadable` if they are not in order, as in a damaged index."""

    def live_owners(self, owners: Collection[str]) -> Set[str]:
        """Return those owners of pending blobs that have not ended."""


class SqliteReader:
    """Reader of the file in a data folder."""

    def __init__(self, connection: sqlite3.Connection, folder: Path) -> None:
        self.connection = connection
        self._folder = folder

    def rows(self, statement: str, values: Sequence[object] = ()) -> Sequence[Sequence[Any]]:
        """Return the rows of a statement."""
        return self.connection.execute(statement, values).fetchall()

    def columns(self, table: str) -> Set[str]:
        """Return the names of the columns of a table; none if there is no such table."""
        return {row[1] for row in self.rows(f"PRAGMA table_info({table})")}

    def rows_where(self, table: str, columns: str, condition: str) -> Iterator[Sequence[Any]]:
        """Yield columns of the rows, called `t`, that fulfil a condition; reads a slice of the rows at a time."""
        ((last,),) = self.rows(f"SELECT max(rowid) FROM {table}")
        statement = f"SELECT {columns} FROM {table} AS t WHERE rowid BETWEEN ? AND ? AND ({condition})"
        for first in range(0, (last or 0) + 1, _ROWS_AT_ONCE):
            yield from self.rows(statement, (first, first + _ROWS_AT_ONCE - 1))

    def distinct(self, table: str, column: str) -> Iterator[str]:
        """Yield the values of a column, in the order of its index."""
        after = ""
        statement = f"SELECT DISTINCT {column} FROM {table} WHERE {column} > ? ORDER BY {column} LIMIT ?"
        while rows := self.rows(statement, (after, _ROWS_AT_ONCE)):
            yield from (name for (name,) in rows)
            ((last,),) = rows[-1:]
            if last <= after:
                # Otherwise the same names would come again without end.
                raise CatalogNotLoadable(f"the catalogue is damaged: the index of {table}.{column} has no order")
            after = last

    def live_owners(self, owners: Collection[str]) -> Set[str]:
        """Return those owners of pending blobs that have not ended."""
        return live_owners(self._folder / WRITERS).intersection(owners)


class DatabaseReader:
    """Reader of a database whose readers hold up no writers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @cached_property
    def _locks(self) -> Any:
        return self._database.writer_locks()

    def rows(self, statement: str, values: Sequence[object] = ()) -> Sequence[Sequence[Any]]:
        """Return the rows of a statement."""
        with self._database.read() as connection:
            return connection.exec_driver_sql(statement.replace("?", "%s"), tuple(values)).all()

    def columns(self, table: str) -> Set[str]:
        """Return the names of the columns of a table: a database is opened with the tables of this release only."""
        return set(metadata.tables[table].columns.keys())

    def rows_where(self, table: str, columns: str, condition: str) -> Iterator[Sequence[Any]]:
        """Yield columns of the rows, called `t`, that fulfil a condition."""
        yield from self.rows(f"SELECT {columns} FROM {table} AS t WHERE {condition}")

    def distinct(self, table: str, column: str) -> Iterator[str]:
        """Yield the values of a column."""
        statement = f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL"
        yield from (name for (name,) in self.rows(statement))

    def live_owners(self, owners: Collection[str]) -> Set[str]:
        """Return those owners of pending blobs that have not ended."""
        live: Set[str] = self._locks.live(owners)
        return live


@contextmanager
def opened_reader(folder: Path, database: Database | None = None) -> Iterator[CatalogReader]:
    """Read the catalogue of a database, or else the file in a data folder; raise what reading it raises."""
    if database is not None:
        yield DatabaseReader(database)
        return
    with connected(folder / CATALOG) as connection:
        yield SqliteReader(connection, folder)
