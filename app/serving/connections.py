"""The open connections of one worker: how many there may be, and which are closed if their clients are silent."""

import asyncio
import logging
import resource
from enum import IntEnum
from typing import TYPE_CHECKING

from app.serving.buffered_transport import FlushQueue

if TYPE_CHECKING:
    from app.serving.connection_guard import GuardedHttpProtocol

_MOST_FILES = 2**16
_LEAST_RESERVED_FILES = 64
_SECONDS_BETWEEN_SWEEPS = 1.0
# When the limit is reached, one connection for this many of the limit is closed at once: each look at all connections
# pays for many new ones.
_LIMIT_PER_CLOSING = 64
# Shortest silence after which a connection with a request under way is closed to make room for a new one.
_LEAST_SILENT_SECONDS = 5.0

log = logging.getLogger(__name__)


class Phase(IntEnum):
    """Phase that a connection is in. To make room, silent connections of the lower phases are closed first."""

    IDLE = 0
    """No request is under way."""
    HEAD = 1
    """The client has not completed a head."""
    MESSAGE = 2
    """The client has not completed a body, or not read a response."""


class OpenConnections:
    """Connections of one event loop, `limit` at most; none stays open past its deadline.

    One timer serves all of them, so that a request costs none.
    """

    def __init__(self, limit: int) -> None:
        # Shared by the transports of all connections.
        self.flushes = FlushQueue()
        self._limit = limit
        self._connections: set[GuardedHttpProtocol] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed_for_others = 0

    def add(self, connection: "GuardedHttpProtocol") -> bool:
        """Take a new connection; return False if there are too many and none of them may be closed for it."""
        if len(self._connections) >= self._limit and not self._make_room():
            return False
        self._connections.add(connection)
        if self._timer is None:
            self._schedule()
        return True

    def discard(self, connection: "GuardedHttpProtocol") -> None:
        """Forget a connection that is closed."""
        self._connections.discard(connection)

    def _make_room(self) -> bool:
        """Close the connections that have been silent longest; return whether there was one.

        Those with a head under way come after the idle ones, because it may be about to end. Those with a body or a
        response under way are closed only if there is no other, and not before `_LEAST_SILENT_SECONDS`.
        """
        now = asyncio.get_running_loop().time()
        silences = {
            connection: silence for connection in self._connections if (silence := connection.silence(now)) is not None
        }
        closable = [connection for connection, (phase, _) in silences.items() if phase < Phase.MESSAGE]
        if not closable:
            closable = [
                connection for connection, (_, since) in silences.items() if now - since >= _LEAST_SILENT_SECONDS
            ]
        closable.sort(key=silences.__getitem__)
        for connection in closable[: max(1, self._limit // _LIMIT_PER_CLOSING)]:
            # Forget it now, and not when the loop reports that it is lost: more may be added before that.
            self._connections.discard(connection)
            connection.close_now()
            self._closed_for_others += 1
        return bool(closable)

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SECONDS_BETWEEN_SWEEPS, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for connection in [connection for connection in self._connections if connection.is_overdue(now)]:
            connection.close_now()
        if self._closed_for_others:
            log.warning(
                "%d silent connections were closed: %d are open", self._closed_for_others, len(self._connections)
            )
            self._closed_for_others = 0
        if self._connections:
            self._schedule()


def raise_file_limit() -> None:
    """Let this process open as many files as its hard limit allows, 65,536 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def limit_connections(max_connections: int) -> int:
    """Return how many connections the limit of open files allows, `max_connections` at most.

    A quarter of the files is kept for the database, stored files and uploads.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max_connections
    return max(1, min(max_connections, soft - max(_LEAST_RESERVED_FILES, soft // 4)))
