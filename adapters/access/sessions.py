"""Sessions of the page: a browser that has signed in with a key.

A session is a random token in a cookie. It counts as the key that it was opened with, and ends with it.
"""

import secrets
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.audit import Action, Change, record
from adapters.access.keys import SELECT_WITH_REVISION, Verified, digest_of_secret, key_from_row
from adapters.clock import rfc3339
from adapters.errors import Unauthenticated
from adapters.storage.database import Database
from adapters.storage.schema import keys, sessions

# A session ends this long after it was opened, if its key does not end before.
MAX_SESSION_SECONDS = 7 * 24 * 3600
# More than people need; without a bound, the holder of a key could fill the catalogue.
MAX_SESSIONS_PER_KEY = 100
_TOKEN_BYTES = 32


class Sessions:
    """Sessions of all keys in one catalogue. Safe to use from any thread and from several processes."""

    def __init__(self, database: Database, *, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def open(self, key_id: str) -> str:
        """Open a session of a key and return its token.

        Removes the sessions that have expired, and those of the key that end first if it has too many.
        """
        token, now = secrets.token_urlsafe(_TOKEN_BYTES), self._now()
        row = {"digest": digest_of_secret(token), "key": key_id, "expires_at": rfc3339(now + MAX_SESSION_SECONDS)}
        with self._database.write() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.expires_at <= rfc3339(now)))
            of_key = sa.select(sessions.c.digest).where(sessions.c.key == key_id)
            oldest = of_key.order_by(sessions.c.expires_at.desc()).offset(MAX_SESSIONS_PER_KEY - 1)
            connection.execute(sa.delete(sessions).where(sessions.c.digest.in_(oldest)))
            connection.execute(sa.insert(sessions).values(row))
            _record_session(connection, Action.SESSION_OPEN, key_id)
        return token

    def close(self, token: str) -> None:
        """End a session, if there is one with this token: no process accepts the token afterwards."""
        of_token = sessions.c.digest == digest_of_secret(token)
        # Read first: a token that anyone may send must not hold up writers.
        with self._database.read() as connection:
            key_id = connection.scalars(sa.select(sessions.c.key).where(of_token)).one_or_none()
        if key_id is not None:
            with self._database.write() as connection:
                if connection.execute(sa.delete(sessions).where(of_token)).rowcount:
                    _record_session(connection, Action.SESSION_CLOSE, key_id)

    def verify(self, token: str) -> Verified:
        """Return the key of a session; raise `Unauthenticated` if either has ended."""
        now = rfc3339(self._now())
        statement = SELECT_WITH_REVISION.add_columns(sessions.c.expires_at.label("ends_at"))
        statement = statement.join(sessions, sessions.c.key == keys.c.id).where(
            sessions.c.digest == digest_of_secret(token)
        )
        with self._database.read() as connection:
            row = connection.execute(statement).one_or_none()
        if row is None or row.ends_at <= now:
            raise Unauthenticated("the session has ended: sign in again")
        key = key_from_row(row)
        key.check_usable(now)
        ends_at = row.ends_at if key.expires_at is None else min(row.ends_at, key.expires_at)
        return Verified(key, ends_at, row.access_revision)


def _record_session(connection: Connection, action: Action, key_id: str) -> None:
    """Add the start or the end of a session to the audit log, as a change that its key makes."""
    tenant = connection.scalars(sa.select(keys.c.tenant).where(keys.c.id == key_id)).one()
    record(connection, [Change(action, f"keys/{key_id}")], tenant=tenant, key_id=key_id)
