"""Changes of many rows, in slices: each has a transaction of its own, so that none holds the write lock for long.

The slices before an error or a crash stay. Such a change has to be one that can be repeated to do the rest.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.storage.database import Database
from adapters.storage.schema import Item

# Rows that one transaction deletes: it takes a few milliseconds.
_DELETED_AT_ONCE = 500
_LONGEST_PAUSE_SECONDS = 0.02
_Conditions: TypeAlias = Sequence[sa.ColumnElement[bool]]


def write_in_slices(database: Database, slices: Iterable[Item], change: Callable[[Connection, Item], object]) -> None:
    """Call `change` with each slice, in a transaction for each. Raises what `Database.write` and it raise.

    What the slices come from is read between the transactions.
    """
    seconds = 0.0
    for part in slices:
        if seconds:
            let_others_write(seconds)
        with database.write() as connection:
            locked_at = time.monotonic()
            change(connection, part)
        seconds = time.monotonic() - locked_at


def let_others_write(seconds: float) -> None:
    """Pause for as long as a slice held the write lock: a process that waits for it looks only now and then."""
    time.sleep(min(seconds, _LONGEST_PAUSE_SECONDS))


def delete_in_slices(database: Database, column: sa.Column[Any], *conditions: sa.ColumnElement[bool]) -> int:
    """Delete the rows that fulfil these conditions, in the order of a column; return their number.

    An index has to have the columns of the conditions and then this one. Rows with the same value go together.
    """
    removed = 0

    def delete(connection: Connection, are_next: _Conditions) -> None:
        nonlocal removed
        removed += connection.execute(sa.delete(column.table).where(*are_next)).rowcount

    write_in_slices(database, slices_to_delete(database, column, *conditions), delete)
    return removed


def slices_to_delete(
    database: Database, column: sa.Column[Any], *conditions: sa.ColumnElement[bool]
) -> Iterator[_Conditions]:
    """Yield the conditions of each slice of `delete_in_slices`, for as long as there are such rows.

    Rows are looked for without the write lock. The caller deletes those of one slice before it takes the next.
    """
    values = sa.select(column).where(*conditions).order_by(column).limit(1)
    last_first = None
    while True:
        with database.read() as connection:
            first = connection.execute(values).first()
            # A damaged index still has a row that was deleted, or that never was.
            if first is None or first == last_first:
                return
            last_first = first
            last = connection.scalar(values.offset(_DELETED_AT_ONCE - 1))
        yield conditions if last is None else (*conditions, column <= last)
