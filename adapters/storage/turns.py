"""Turns: periodic tasks of maintenance, each done by one process of all machines at a time.

A row has the time at which a task was last begun. It is set in a transaction, so that one process wins. There is no
lock: if the process dies, another one does the task when its interval has passed.
"""

from collections.abc import Callable
from enum import StrEnum

import sqlalchemy as sa

from adapters.storage.database import Database
from adapters.storage.schema import turns


class Task(StrEnum):
    """A task of maintenance."""

    SWEEP = "sweep"
    """Move the blobs that are neither pending nor referenced into quarantine."""
    EXPIRE = "expire"
    """Remove what has expired: the trash, idempotency keys, usage, the quarantine."""


def take_turn(database: Database, task: Task, *, seconds: float, now: Callable[[], float]) -> bool:
    """Store that this process begins a task, and return True; False if any process began it in the last `seconds`.

    The time is that of the database if it has a clock, otherwise `now`, in seconds since the epoch. Raises what
    `Database.write` raises.
    """
    with database.write() as connection:
        time = database.server_time(connection)
        time = now() if time is None else time
        began_at = connection.scalar(sa.select(turns.c.began_at).where(turns.c.task == task))
        # A time in the future is that of a clock that was set back since, and says nothing.
        if began_at is not None and time - seconds < began_at <= time:
            return False
        row = {"task": task, "began_at": time}
        if began_at is None:
            connection.execute(sa.insert(turns).values(row))
        else:
            connection.execute(sa.update(turns).where(turns.c.task == task).values(row))
        return True
