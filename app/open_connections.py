"""The open connections of one worker: how many there may be, and which are closed when they bring nothing."""

import asyncio
import logging
import resource
from typing import Protocol

_MOST_FILES = 2**16
_LEAST_RESERVED_FILES = 64
_SECONDS_BETWEEN_SWEEPS = 1.0
_CLOSED_TOGETHER = 64
"""When the limit is reached, 1/64 of it is closed at once: each look at all connections pays for many new ones."""

log = logging.getLogger(__name__)


class Connection(Protocol):
    """What is asked of a connection here. Times are the event loop's."""

    def is_overdue(self, now: float) -> bool:
        """Return whether the client has let its deadline pass."""

    def waits_since(self) -> tuple[bool, float] | None:
        """Return whether a head has begun, and since when the client has been silent; None if it may not be closed."""

    def hang_up(self) -> None:
        """Close the connection."""


class OpenConnections:
    """Connections of one event loop, `limit` at most; none stays open past its deadline.

    One timer serves all of them, so that a request costs none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._connections: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed_for_others = 0

    def add(self, connection: Connection) -> bool:
        """Take a new connection; return False if it has to be closed, because there are too many and none is idle."""
        if len(self._connections) >= self._limit and not self._close_idle():
            return False
        self._connections.add(connection)
        if self._timer is None:
            self._schedule()
        return True

    def discard(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._connections.discard(connection)

    def _close_idle(self) -> bool:
        """Close the connections that have been idle longest; return whether there was one.

        Those whose client has begun a head come last: it may be about to end it.
        """
        idle = [(waits, connection) for connection in self._connections if (waits := connection.waits_since())]
        idle.sort(key=lambda pair: pair[0])
        for _, connection in idle[: max(1, self._limit // _CLOSED_TOGETHER)]:
            # At once, and not when the loop says that it is lost: more may be added before that.
            self._connections.discard(connection)
            connection.hang_up()
            self._closed_for_others += 1
        return bool(idle)

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SECONDS_BETWEEN_SWEEPS, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in [connection for connection in self._connections if connection.is_overdue(now)]:
            connection.hang_up()
        if self._closed_for_others:
            log.warning("%d idle connections were closed: %d are open", self._closed_for_others, len(self._connections))
            self._closed_for_others = 0
        if self._connections:
            self._schedule()


def raise_file_limit() -> None:
    """Let this process open as many files as its hard limit allows, 65,536 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def most_connections(wanted: int) -> int:
    """Return how many of the `wanted` connections the limit of open files allows.

    A quarter of the files is kept for the database, stored files and uploads.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - max(_LEAST_RESERVED_FILES, soft // 4)))
