"""Grants: callers whose keys were verified, with the check of their scopes, remembered while no key is revoked.

A grant has the access revision at which its key was read, and a revocation increments that revision. Whoever uses a
remembered grant compares it with a revision that was read after the request arrived, so that no request succeeds that
is sent after a revocation was acknowledged. The batcher does so with the revision that it reads for each batch anyway.

Sessions are not remembered. Signing out would have to increment the revision too, and then whoever signs in and out in
a loop would make every worker read the keys of all tenants again.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from adapters.access.keys import Key, Keys, Scope
from adapters.access.sessions import Sessions
from adapters.access.tenants import DEFAULT_TENANT
from adapters.clock import parse_rfc3339
from adapters.errors import Forbidden
from adapters.storage.database import CatalogWatch, Database

# Clients choose how they write a header, so the number and the length of those that are remembered are bounded.
_MAX_REMEMBERED = 2**15
_LONGEST_REMEMBERED = 200


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request, and the tenant that it is for."""

    key_id: str | None
    """None if the caller has no key."""
    tenant: str
    scopes: frozenset[str]

    @property
    def is_operator(self) -> bool:
        """Return whether the caller may do everything for every tenant."""
        return Scope.OPERATOR in self.scopes

    def may(self, scope: Scope) -> bool:
        """Return whether the caller has a scope."""
        return scope in self.scopes or Scope.OPERATOR in self.scopes

    def require(self, scope: Scope) -> None:
        """Raise `Forbidden` if the caller does not have a scope."""
        if not self.may(scope):
            detail = f"the key {self.key_id} does not have the scope {scope}"
            raise Forbidden(detail, expected=f"a key with the scope {scope}")


# Every caller of a service without keys.
OPERATOR = Caller(key_id=None, tenant=DEFAULT_TENANT, scopes=frozenset({Scope.OPERATOR}))


class Credential(NamedTuple):
    """Credential of a request: the text of a key, or the token of a session."""

    text: str
    is_session: bool = False


class Grant(NamedTuple):
    """A caller, and for how long it is known to be one."""

    caller: Caller
    ends: float = math.inf
    """When the key or the session expires, in seconds since the epoch."""
    revision: int | None = None
    """Access revision at which that was read, with the epoch of the watch; None if it holds at every one."""
    credential: Credential = Credential("")


OPEN_GRANT = Grant(OPERATOR)


class Grants:
    """Grants of one worker. Safe on one thread, except `verify`, which waits for the database."""

    def __init__(
        self, database: Database, watch: CatalogWatch, *, has_keys: bool, now: Callable[[], float] = time.time
    ) -> None:
        """Create an empty memory. Its owner calls `watch.revision` before it uses a remembered grant.

        Without keys, every request has `OPEN_GRANT`.
        """
        self.has_keys = has_keys
        self._keys, self._sessions = Keys(database, now=now), Sessions(database, now=now)
        self._watch = watch
        self._now = now
        # By what the request carried, as it came: hashing a key takes longer than the rest of the check.
        self._of_headers: dict[bytes | None, Grant] = {}

    def of_header(self, authorization: bytes | None) -> Grant | None:
        """Return the grant that a header `Authorization` was verified for before, unless it has expired.

        It holds only if `is_current` says so after the next reading of the revision.
        """
        if not self.has_keys:
            return OPEN_GRANT
        grant = self._of_headers.get(authorization)
        return grant if grant is not None and grant.ends > self._now() else None

    def remember(self, authorization: bytes, grant: Grant) -> None:
        """Keep the grant of a header `Authorization`."""
        if len(authorization) > _LONGEST_REMEMBERED:
            return
        if len(self._of_headers) >= _MAX_REMEMBERED:
            self._of_headers.clear()
        self._of_headers[authorization] = grant

    def is_current(self, grant: Grant) -> bool:
        """Return whether no key was revoked from when a grant was read to when the watch last read the revision."""
        return grant.revision is None or grant.revision == self._watch.access_revision

    def verify(self, credential: Credential) -> Grant:
        """Return the grant of a credential as the catalogue is now; raise `Unauthenticated`."""
        verify = self._sessions.verify if credential.is_session else self._keys.verify
        # Before the key: if the watch connects to another server meanwhile, the key has to be read again.
        epoch = self._watch.epoch
        key, ends_at, revision = verify(credential.text)
        ends = math.inf if ends_at is None else parse_rfc3339(ends_at)
        return Grant(_caller(key), ends, epoch + revision, credential)


def _caller(key: Key) -> Caller:
    # An operator's key is of no tenant in particular.
    return Caller(key.id, DEFAULT_TENANT if key.is_operator else key.tenant, frozenset(key.scopes))
