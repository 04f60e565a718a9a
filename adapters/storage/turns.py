"""Turns: periodic tasks of maintenance, each done by one process of all machines at a time.

A row has the time at which a task was last begun. It is set in a transaction, so that one process wins. There is no
lock: if the process dies, another one does the task when its interval has passed.
"""

import math
from collections.abc import Callable
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.storage.database import Database
from adapters.storage.schema import turns


class Task(StrEnum):
    """A task of maintenance."""

    SWEEP = "sweep"
    """Move the blobs that are neither pending nor referenced into quarantine."""
    EXPIRE = "expire"
    """Remove what has expired: the trash, idempotency keys, usage, the quarantine."""
    CORRECT = "correct"
    """Add to totals and tallies what a count says they lack."""


def take_turn(database: Database, task: Task, *, seconds: float, now: Callable[[], float]) -> bool:
    """Store that this process begins a task, and return True; False if any process began it in the last `seconds`.

    The time is that of the database if it has a clock, otherwise `now`, in seconds since the epoch. Raises what
    `Database.write` raises.
    """
    with database.write() as connection:
        time = _time(database, connection, now)
        began_at = last_turn(connection, task)
        # A time in the future is that of a clock that was set back since, and says nothing.
        if began_at is not None and time - seconds < began_at <= time:
            return False
        _store(connection, task, time)
        return True


def last_turn(connection: Connection, task: Task) -> float | None:
    """Return the time at which a task was last begun; None if it never was."""
    time: float | None = connection.scalar(sa.select(turns.c.began_at).where(turns.c.task == task))
    return time


def store_turn(database: Database, connection: Connection, task: Task, *, now: Callable[[], float]) -> float:
    """Store that a task begins, in a transaction that writes; return the time, which is later than the one before."""
    time, last = _time(database, connection, now), last_turn(connection, task)
    if last is not None and time <= last:
        time = math.nextafter(last, math.inf)
    _store(connection, task, time)
    return time


def _time(database: Database, connection: Connection, now: Callable[[], float]) -> float:
    time = database.server_time(connection)
    return now() if time is None else time


def _store(connection: Connection, task: Task, time: float) -> None:
    row = {"task": task, "began_at": time}
    if connection.execute(sa.update(turns).where(turns.c.task == task).values(row)).rowcount == 0:
        connection.execute(sa.insert(turns).values(row))
