"""Watch of the catalogue's revision in PostgreSQL: one row, read asynchronously on a connection of its own.

A reading begins after the last request that it is for has arrived, and its statement sees every commit acknowledged
before. It uses libpq itself, with prepared statements and one reader of the socket that stays registered, so that it
takes some microseconds of the event loop.

A reading sends the short statement, which returns the revision. If the revision has changed, a second statement returns
it again with the changes since the last one, so that both are of one snapshot. The second statement takes the server
twice as long. A reading begins with it only after a reading that found a change, and on a new connection.

If the connection is lost, the readings that wait for it wait for one attempt to connect, for some seconds at most. If
it fails, or the new connection is lost before a reading succeeds, readings fail at once, and attempts go on in the
background.
"""

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import psycopg
from psycopg import pq

from adapters.errors import CatalogBusy, CatalogUnavailable
from adapters.storage.database import MAX_CHANGES

_REVISION, _CHANGES, _LIMITS = b"loraplex_revision", b"loraplex_changes", b"loraplex_limits"
_PREPARE = (
    f"PREPARE {_REVISION.decode()} AS SELECT revision, access_revision FROM catalog;"
    f"PREPARE {_CHANGES.decode()} (bigint) AS "
    "SELECT catalog.revision, catalog.access_revision, changes.revision, changes.tenant, changes.name FROM catalog"
    f" LEFT JOIN changes ON changes.revision > $1 ORDER BY changes.revision LIMIT {MAX_CHANGES + 1};"
    f"PREPARE {_LIMITS.decode()} AS "
    "SELECT json_object_agg(name, limits) FROM tenants WHERE limits::text <> '{}'"
)
# Seconds after which a reading gives its connection up.
_READ_SECONDS = 2.0
# Seconds for each host of the URL, the least that the driver takes: one that is gone must not keep others from a try.
_CONNECT_SECONDS = 2
# More than a catalogue has revisions.
_REVISIONS = 2**48
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 0.5

log = logging.getLogger(__name__)


class CallCounter:
    """Commit watch that cannot tell whether anything was committed, and reports a change at every call."""

    def __init__(self) -> None:
        self._calls = 0

    def change_number(self) -> int:
        """Return another number at every call."""
        self._calls += 1
        return self._calls

    def close(self) -> None:
        """Do nothing: there is no connection."""


class PostgresCatalogWatch:
    """Implementation of `CatalogWatch` on PostgreSQL. For one event loop, that of the first reading."""

    def __init__(self, arguments: Mapping[str, Any], *, max_stale_seconds: float = 0.0) -> None:
        """Create a watch that connects with these arguments of psycopg when it is first used."""
        self.access_revision = -1
        self._arguments = {**arguments, "connect_timeout": _CONNECT_SECONDS}
        hosts = 1 + str(arguments.get("host", "")).count(",")
        # Looking up the name of a host takes time too, which the driver does not limit.
        self._connect_limit_seconds = _CONNECT_SECONDS * hosts + 1
        self._max_stale_seconds = max_stale_seconds
        self._loop: asyncio.AbstractEventLoop
        # Only referred to: psycopg warns of a connection that is collected while it is open.
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._pgconn: pq.abc.PGconn | None = None
        # Descriptor that the event loop reads. A copy, because libpq closes its own when the connection is lost.
        self._socket = -1
        self._connecting: asyncio.Task[None] | None = None
        # Whether readings without a connection fail at once.
        self._is_down = False
        # Connections that were lost since the last reading that succeeded.
        self._losses = 0
        self._is_closed = False
        # Future of the reading under way, and of the next one, for which readers wait meanwhile.
        self._reading: asyncio.Future[float] | None = None
        self._next: asyncio.Future[float] | None = None
        self._timeout: asyncio.TimerHandle | None = None
        self._results: list[pq.abc.PGresult] = []
        # Name of the statement whose result is awaited.
        self._statement = _REVISION
        # Whether the last reading found a change, so that the next one may find another.
        self._is_changing = True
        self._began = 0.0
        # Monotonic time at which the last reading that succeeded began.
        self._read_at = -float("inf")
        # Number of connections, in the upper bits of both revisions: a number may be another change on another server.
        self.epoch = 0
        self._revision = -1
        # Access revision whose limits are being read.
        self._next_access_revision = -1
        # Changes after the revision `_listed_from`; None if anything may have changed.
        self._listed_from = -1
        self._changes: Sequence[tuple[int, str, str]] | None = None
        self._limits: Mapping[str, Mapping[str, Any]] | None = None

    def begin_read(self) -> "asyncio.Future[float] | None":
        """Begin to read the revision; see `CatalogWatch.begin_read`."""
        if self._reading is None:
            self._loop = asyncio.get_running_loop()
            self._reading = reading = self._loop.create_future()
            self._begin()
            return reading
        # A reading that has begun may have missed the last commit.
        if self._next is None:
            self._next = self._loop.create_future()
        return self._next

    def revision(self) -> int:
        """Return the revision that was read last."""
        return self.epoch + self._revision

    def changes_since(self, revision: int) -> Sequence[tuple[str, str]] | None:
        """Return the tenant and name of each change after a revision, up to the one that was read last."""
        listed_from, changes = self.epoch + self._listed_from, self._changes
        self._listed_from, self._changes = self._revision, ()
        if revision < listed_from or changes is None:
            return None
        return [(tenant, name) for number, tenant, name in changes if self.epoch + number > revision]

    def limits(self, tenant: str) -> Mapping[str, Any]:
        """Return the limits of a tenant at the access revision that was read last."""
        if self._limits is None:
            raise CatalogBusy("the limits of tenants were not read yet")
        return self._limits.get(tenant, {})

    def close(self) -> None:
        """Close the connection. The event loop may have ended."""
        self._is_closed = True
        if self._connecting is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._connecting.cancel)
        if self._pgconn is not None:
            self._detach()

    def _begin(self) -> None:
        """Send the statement of the reading under way, or have it wait for a connection."""
        self._began = time.monotonic()
        if self._pgconn is None:
            if self._connecting is None:
                self._connecting = self._loop.create_task(self._connect())
            elif self._is_down:
                self._fail()
            return
        self._timeout = self._loop.call_later(_READ_SECONDS, self._reconnect, "it does not answer")
        self._send(_CHANGES if self._is_changing else _REVISION)

    def _send(self, statement: bytes) -> None:
        assert self._pgconn is not None
        parameters = [b"%d" % self._listed_from] if statement is _CHANGES else []
        self._statement = statement
        try:
            self._pgconn.send_query_prepared(statement, parameters)
            self._pgconn.flush()
        except psycopg.Error as error:
            self._reconnect(str(error))

    def _receive(self) -> None:
        """Read what has arrived on the socket; end the reading if its result is complete."""
        pgconn = self._pgconn
        assert pgconn is not None
        try:
            pgconn.consume_input()
            if pgconn.is_busy():
                # uvloop reports a socket with an error once, and there may be data before the error: read up to it.
                pgconn.consume_input()
            while not pgconn.is_busy():
                result = pgconn.get_result()
                if result is not None:
                    if result.status != pq.ExecStatus.TUPLES_OK:
                        raise psycopg.OperationalError(result.get_error_message())
                    self._results.append(result)
                    continue
                if pgconn.status != pq.ConnStatus.OK:
                    raise psycopg.OperationalError("the connection was closed")
                if self._results:
                    results, self._results = self._results, []
                    self._take(results)
                return
        except psycopg.Error as error:
            self._reconnect(str(error))

    def _take(self, results: Sequence[pq.abc.PGresult]) -> None:
        (result,) = results
        if self._statement is _LIMITS:
            self._limits = orjson.loads(result.get_value(0, 0) or b"{}")
            self.access_revision = self._next_access_revision
        else:
            revision, access_revision = int(result.get_value(0, 0) or 0), int(result.get_value(0, 1) or 0)
            is_changed = revision != self._revision
            if self._statement is _CHANGES:
                self._is_changing = is_changed
                if is_changed:
                    self._changes = _changes_in(result, after=self._listed_from, revision=revision)
                    self._revision = revision
            elif is_changed:
                self._send(_CHANGES)
                return
            # Another access revision: the limits of tenants may have changed with it. They have to arrive before anyone
            # sees it: until then, the old limits are those of the old one.
            self._next_access_revision = self.epoch + access_revision
            if self._next_access_revision != self.access_revision:
                self._send(_LIMITS)
                return
        self._read_at = self._began
        self._losses = 0
        if self._is_down:
            self._mark_reachable()
        self._end(0.0)

    def _end(self, age_seconds: float) -> None:
        """End the reading under way, and begin the next one if anyone waits for it."""
        reading, self._reading, self._next = self._reading, self._next, None
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
        if reading is not None and not reading.done():
            reading.set_result(age_seconds)
        if self._reading is not None:
            self._begin()

    def _fail(self) -> None:
        """End the reading under way without a connection: with an older revision, or with an error."""
        age = time.monotonic() - self._read_at
        if age <= self._max_stale_seconds:
            self._end(age)
            return
        reading, self._reading, self._next = self._reading, self._next, None
        if reading is not None and not reading.done():
            reading.set_exception(CatalogUnavailable("the catalogue's database cannot be reached: it does not answer"))
            reading.exception()  # otherwise asyncio logs an exception that no caller has retrieved
        if self._reading is not None:
            self._begin()

    def _reconnect(self, reason: str) -> None:
        """Give up the connection, and connect again."""
        if not self._is_down:
            log.warning("the connection that watches the catalogue is lost: %s", " ".join(reason.split()))
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
        if self._pgconn is not None:
            self._detach()
        if self._is_closed:
            return
        self._losses += 1
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())
        if self._losses > 1:
            self._mark_unreachable(reason)

    def _mark_unreachable(self, reason: str) -> None:
        """Fail the reading that waits, and those that follow until there is a connection."""
        if not self._is_down:
            log.warning("the catalogue's database cannot be reached: %s", " ".join(reason.split()))
        self._is_down = True
        self._fail()

    def _mark_reachable(self) -> None:
        log.warning("the catalogue's database can be reached again")
        self._is_down = False

    async def _connect(self) -> None:
        """Connect, however long it takes, and send the statement of the reading that waits."""
        pause = _FIRST_PAUSE_SECONDS
        if self._losses > 1:
            # The server accepts connections whose statements fail.
            await asyncio.sleep(min(pause * 2 ** min(self._losses - 2, 8), _LONGEST_PAUSE_SECONDS))
        while True:
            timer = self._loop.call_later(self._connect_limit_seconds, self._mark_unreachable, "it does not answer")
            try:
                connection = await self._open()
                break
            except (psycopg.Error, OSError, TimeoutError) as error:
                self._mark_unreachable(str(error) or "it does not answer")
            finally:
                timer.cancel()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._connecting = None
        if self._is_down and self._losses < 2:
            self._mark_reachable()
        self._connection, self._pgconn = connection, connection.pgconn
        self._socket = os.dup(self._pgconn.socket)
        self.epoch += _REVISIONS
        self._listed_from, self._revision, self._changes, self._results = -1, -1, None, []
        self._is_changing = True
        self._loop.add_reader(self._socket, self._receive)
        if self._reading is not None:
            self._begin()

    async def _open(self) -> "psycopg.AsyncConnection[Any]":
        """Return a new connection with the statements prepared."""
        connection = await psycopg.AsyncConnection.connect(**self._arguments, autocommit=True)
        try:
            async with asyncio.timeout(_READ_SECONDS):
                await connection.execute(_PREPARE)
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def _detach(self) -> None:
        """Close the connection."""
        assert self._pgconn is not None
        if not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
        os.close(self._socket)
        self._pgconn.finish()
        self._pgconn = self._connection = None


def _changes_in(result: pq.abc.PGresult, *, after: int, revision: int) -> Sequence[tuple[int, str, str]] | None:
    """Return the changes in a result; None unless it lists every revision after one."""
    changes = []
    for row in range(result.ntuples):
        number, tenant, name = (result.get_value(row, column) for column in (2, 3, 4))
        if number is None or tenant is None or name is None:
            break
        if int(number) > after:
            changes.append((int(number), tenant.decode(), name.decode()))
    is_complete = result.ntuples <= MAX_CHANGES and len({number for number, _, _ in changes}) == revision - after
    return changes if is_complete else None
