"""Idempotency keys: a request that is repeated with the same key returns the job of the first one.

The row of a key goes through two states. A *claim* is committed before the request is checked, so that every process
sees that it runs. The transaction that stores the job also stores its id in the row, so that there is neither a job
without its key nor a key without its job. A request that fails releases its claim.

A claim ends with its process. Its row names the owner, the `BlobWriter` of the process, which holds the lock of a file
for as long as it lives. A claim whose owner has died is taken over by the next request. A claim also expires, in case a
living process could not release it. A request whose claim was taken over stores nothing.

Within a process, `running` decides, which costs neither a thread nor a lock. A claim of the own process that is found
in the catalogue is therefore one that could not be released.

Rows need no bound of their own: one with a job is bounded by the jobs, and a claim by the requests that run.
"""

import hashlib
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.clock import rfc3339
from adapters.errors import IdempotencyInProgress, IdempotencyKeyReused, LoraplexError, OutOfRange
from adapters.storage.database import Database
from adapters.storage.pending_blobs import BlobWriter
from adapters.storage.schema import idempotency_keys
from adapters.storage.slices import delete_in_slices

KEPT_SECONDS = 24 * 3600
"""Seconds for which a key is kept after its job was stored."""
_CLAIM_SECONDS = 600
MAX_KEY_CHARACTERS = 255
_KEY = re.compile(rf"[ -~]{{1,{MAX_KEY_CHARACTERS}}}")
_EXPECTED = f"1 to {MAX_KEY_CHARACTERS} printable ASCII characters"


@dataclass(frozen=True, slots=True)
class IdempotentRequest:
    """A request with an idempotency key."""

    tenant: str
    key: str
    fingerprint: str
    """SHA-256 of the request: requests with the same fingerprint are repetitions."""
    claim: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Random id that distinguishes this request from its repetitions."""


class IdempotencyKeys:
    """Idempotency keys of all tenants in one catalogue. Safe to use from any thread and from several processes."""

    def __init__(self, database: Database, writer: BlobWriter, *, now: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._now = now
        self._running: dict[tuple[str, str], IdempotentRequest] = {}

    def find(self, request: IdempotentRequest) -> str | None:
        """Return the id of the job that an earlier request with this key stored; None if there was none.

        Raises `IdempotencyKeyReused` if that was another request, and `IdempotencyInProgress` if it still runs.
        """
        with self._database.read() as connection:
            return self._find(connection, request)

    @contextmanager
    def running(self, request: IdempotentRequest) -> Iterator[None]:
        """Refuse repetitions in this process during the block.

        Raises `IdempotencyKeyReused` and `IdempotencyInProgress`, as `find` does.
        """
        name = (request.tenant, request.key)
        # One operation, so that it needs no lock.
        first = self._running.setdefault(name, request)
        if first is not request:
            _check_repetition(request, first.fingerprint)
            raise _in_progress(request)
        try:
            yield
        finally:
            del self._running[name]

    def claim(self, request: IdempotentRequest) -> str | None:
        """Claim the key for this request, which is `running`, and return None; or return a job's id, as `find` does.

        Raises `IdempotencyKeyReused` and `IdempotencyInProgress`.
        """
        owner, expires_at = self._writer.hold_owner(), rfc3339(self._now() + _CLAIM_SECONDS)
        values = {"fingerprint": request.fingerprint, "claim": request.claim, "owner": owner, "expires_at": expires_at}
        with self._database.write() as connection:
            job_id = self._find(connection, request)
            if job_id is None:
                # Expired, or of a process that has died.
                connection.execute(sa.delete(idempotency_keys).where(*_of_key(request)))
                row = {"tenant": request.tenant, "key": request.key, **values}
                connection.execute(sa.insert(idempotency_keys).values(row))
            return job_id

    def complete(self, request: IdempotentRequest, connection: Connection, job_id: str) -> None:
        """Store the job of a request that holds its claim, in the transaction that stores the job.

        Raises `IdempotencyInProgress` if another request has taken over the claim.
        """
        values = {"job": job_id, "expires_at": rfc3339(self._now() + KEPT_SECONDS)}
        if connection.execute(sa.update(idempotency_keys).where(*_of_claim(request)).values(values)).rowcount != 1:
            raise _in_progress(request)

    def release(self, request: IdempotentRequest) -> None:
        """Release the claim of a request that failed. If the catalogue cannot be written, the claim expires."""
        with suppress(LoraplexError), self._database.write() as connection:
            connection.execute(sa.delete(idempotency_keys).where(*_of_claim(request)))

    def _find(self, connection: Connection, request: IdempotentRequest) -> str | None:
        row = connection.execute(sa.select(idempotency_keys).where(*_of_key(request))).one_or_none()
        if row is None or row.expires_at <= rfc3339(self._now()):
            return None
        if row.job is None and not self._writer.is_other_live(row.owner, connection):
            return None
        _check_repetition(request, row.fingerprint)
        if row.job is None:
            raise _in_progress(request)
        return str(row.job)


def remove_expired(database: Database, *, now: float) -> int:
    """Remove the idempotency keys that have expired; return their number."""
    expires_at = idempotency_keys.c.expires_at
    return delete_in_slices(database, expires_at, expires_at <= rfc3339(now))


def check_key(key: str, *, field: str) -> str:
    """Return an idempotency key if it is valid; raise `OutOfRange` naming the field."""
    if not _KEY.fullmatch(key):
        raise OutOfRange(f"{field} must be {_EXPECTED}", field=field, given=key, expected=_EXPECTED)
    return key


def fingerprint_of(method: str, path: str, body: bytes | bytearray) -> str:
    """Return the SHA-256 of a request as hex digits: of its method, its path, the length of its body and the body."""
    digest = hashlib.sha256(f"{method} {path} {len(body)}\n".encode())
    digest.update(body)
    return digest.hexdigest()


def _of_key(request: IdempotentRequest) -> tuple[sa.ColumnElement[bool], ...]:
    return idempotency_keys.c.tenant == request.tenant, idempotency_keys.c.key == request.key


def _of_claim(request: IdempotentRequest) -> tuple[sa.ColumnElement[bool], ...]:
    claimed = idempotency_keys.c.claim == request.claim, idempotency_keys.c.job.is_(None)
    return *_of_key(request), *claimed


def _check_repetition(request: IdempotentRequest, fingerprint: str) -> None:
    """Raise `IdempotencyKeyReused` unless the first request with this key has the same fingerprint."""
    if request.fingerprint != fingerprint:
        detail = "the idempotency key was sent with another request: the method, the path or the body differ"
        expected = "a new key for each request, or the first request again"
        raise IdempotencyKeyReused(detail, field="Idempotency-Key", given=request.key, expected=expected)


def _in_progress(request: IdempotentRequest) -> IdempotencyInProgress:
    detail = "the first request with this idempotency key is still running: send it again in a moment"
    return IdempotencyInProgress(detail, field="Idempotency-Key", given=request.key)
