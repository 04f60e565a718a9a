"""API keys, with their format, scopes and rows in the catalogue.

A key is the text `lpx_<id>_<secret><checksum>`. The id is public. The secret has 256 random bits, so a plain SHA-256 of
the text is stored: there is nothing to guess that a slow hash would protect. The checksum, a CRC-32 as in GitHub's
tokens, refuses a key that was mistyped or cut off without a query.
"""

import hashlib
import hmac
import re
import secrets
import string
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.audit import Action, Change, record
from adapters.access.tenants import DEFAULT_TENANT, increment_access_revision, make_tenant, require_tenant
from adapters.clock import read_time, rfc3339
from adapters.errors import (
    Forbidden,
    InvalidCombination,
    KeyNotFound,
    MissingField,
    OutOfRange,
    Unauthenticated,
    shorten,
)
from adapters.storage.database import Database
from adapters.storage.schema import catalog, keys

PREFIX = "lpx_"
MAX_NAME_CHARACTERS = 128
_ID_BYTES, _SECRET_BITS = 8, 256
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_CHARACTERS, _CHECKSUM_CHARACTERS = 43, 6
_ID = re.compile(rf"[0-9a-f]{{{2 * _ID_BYTES}}}")
_TEXT = re.compile(
    rf"(?P<body>{PREFIX}(?P<id>{_ID.pattern})_[0-9A-Za-z]{{{_SECRET_CHARACTERS}}})"
    rf"(?P<checksum>[0-9A-Za-z]{{{_CHECKSUM_CHARACTERS}}})"
)
# In one statement, so that the key is as it was at that revision.
SELECT_WITH_REVISION = sa.select(keys, sa.select(catalog.c.access_revision).scalar_subquery().label("access_revision"))
_FORM = f"a key of the form {PREFIX}<id>_<secret>"


class Scope(StrEnum):
    """Permission of a key for a kind of call."""

    PREDICT = "predict"
    """Apply adapters to rows."""
    READ = "read"
    """Every GET, except of keys, the audit log, usage, tenants and metrics."""
    METRICS = "metrics"
    """Read the metrics."""
    WRITE = "write"
    """Upload adapters and data sets, move live, and delete."""
    TRAIN = "train"
    """Start, cancel and repeat jobs."""
    ADMIN = "admin"
    """Manage the keys of its own tenant, and read its audit log and usage."""
    OPERATOR = "operator"
    """All of these, for every tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Key of a tenant, without its secret."""

    id: str
    tenant: str
    name: str
    scopes: tuple[Scope, ...]
    """In the order of `Scope`."""
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None

    @property
    def is_operator(self) -> bool:
        """Return whether the key may do everything for every tenant."""
        return Scope.OPERATOR in self.scopes

    def check_usable(self, now: str) -> None:
        """Raise `Unauthenticated` if the key is revoked or has expired; `now` is in the form of `rfc3339`."""
        if self.revoked_at is not None:
            raise Unauthenticated(f"the key {self.id} was revoked at {self.revoked_at}", expected="another key")
        if self.expires_at is not None and self.expires_at <= now:
            raise Unauthenticated(f"the key {self.id} expired at {self.expires_at}", expected="another key")


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key with its text, which is stored nowhere."""

    key: Key
    text: str = field(repr=False)


class Verified(NamedTuple):
    """A key whose possession was proved, and for how long that holds."""

    key: Key
    ends_at: str | None
    """When the key expires, or the session that counts as it."""
    revision: int
    """Access revision of the catalogue at which this was read. At another one it has to be read again."""


class Keys:
    """Keys of all tenants in one catalogue. Safe to use from any thread and from several processes."""

    def __init__(self, database: Database, *, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def create(
        self,
        *,
        tenant: str,
        name: str,
        scopes: Iterable[str],
        expires_at: str | None = None,
        creates_tenant: bool = False,
    ) -> IssuedKey:
        """Create a key of a tenant, which `creates_tenant` creates if it is missing.

        Raises an `InvalidInput` for an invalid value, and `TenantNotFound`.
        """
        now = self._now()
        key_id = secrets.token_hex(_ID_BYTES)
        text = _make_text(key_id)
        key = Key(
            id=key_id,
            tenant=tenant,
            name=check_key_name(name),
            scopes=parse_scopes(scopes),
            created_at=rfc3339(now),
            expires_at=None if expires_at is None else _future(expires_at, now),
        )
        if key.is_operator and tenant != DEFAULT_TENANT:
            detail = f"an operator's key is of the tenant {DEFAULT_TENANT}, and selects others by X-Tenant"
            raise InvalidCombination(detail, field="tenant", given=tenant, expected=DEFAULT_TENANT)
        row = {column: getattr(key, column) for column in ("id", "tenant", "name", "created_at", "expires_at")}
        with self._database.write() as connection:
            if creates_tenant:
                make_tenant(connection, tenant, created_at=key.created_at)
            else:
                require_tenant(connection, tenant)
            connection.execute(sa.insert(keys).values(**row, scopes=list(key.scopes), digest=digest_of_secret(text)))
            record(connection, [Change(Action.KEY_CREATE, f"keys/{key_id}")], tenant=tenant)
        return IssuedKey(key, text)

    def list(self, *, tenant: str | None, after: str = "", limit: int = 100) -> Sequence[Key]:
        """Return the keys of a tenant, or of all for None, in the order of their ids, after the id `after`."""
        statement = sa.select(keys).where(keys.c.id > after).order_by(keys.c.id).limit(limit)
        if tenant is not None:
            statement = statement.where(keys.c.tenant == tenant)
        with self._database.read() as connection:
            return [key_from_row(row) for row in connection.execute(statement)]

    def revoke(self, key_id: str, *, tenant: str | None, by_operator: bool) -> Key:
        """Revoke a key of a tenant, or of any for None; revoking it again changes nothing.

        When this returns, no process accepts the key any more. Raises `KeyNotFound`, and `Forbidden` if only an
        operator may revoke it.
        """
        with self._database.write() as connection:
            key = _find(connection, key_id) if _ID.fullmatch(key_id) else None
            if key is None or tenant not in (None, key.tenant):
                raise KeyNotFound(f"there is no key {shorten(key_id)}", field="key_id", given=key_id)
            if key.is_operator and not by_operator:
                raise Forbidden(f"the key {key_id} is an operator's: this needs the scope {Scope.OPERATOR}")
            if key.revoked_at is None:
                revoked_at = rfc3339(self._now())
                connection.execute(sa.update(keys).where(keys.c.id == key_id).values(revoked_at=revoked_at))
                increment_access_revision(connection)
                record(connection, [Change(Action.KEY_REVOKE, f"keys/{key_id}")], tenant=key.tenant)
                key = _find(connection, key_id)
        assert key is not None
        return key

    def verify(self, text: str) -> Verified:
        """Return the key with this text; raise `Unauthenticated` if there is none, or if it may not be used."""
        key_id = parse_key_id(text)
        with self._database.read() as connection:
            row = connection.execute(SELECT_WITH_REVISION.where(keys.c.id == key_id)).one_or_none()
        if row is None or not hmac.compare_digest(row.digest, digest_of_secret(text)):
            raise Unauthenticated("the key is not one of this service", expected=_FORM)
        key = key_from_row(row)
        key.check_usable(rfc3339(self._now()))
        return Verified(key, key.expires_at, row.access_revision)


def parse_key_id(text: str) -> str:
    """Return the id in the text of a key; raise `Unauthenticated` if it is malformed or mistyped."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise Unauthenticated(f"the key is malformed: it is not {_FORM}", expected=_FORM)
    if match["checksum"] != _checksum(match["body"]):
        raise Unauthenticated("the key is mistyped or cut off: its checksum does not fit", expected=_FORM)
    return match["id"]


def parse_scopes(names: Iterable[str]) -> tuple[Scope, ...]:
    """Return scopes by their names, without repetitions; raise `MissingField` or `OutOfRange`."""
    expected = "some of " + ", ".join(Scope)
    given = list(names)
    unknown = next((name for name in given if name not in frozenset(Scope)), None)
    if unknown is not None:
        raise OutOfRange(f"{shorten(unknown)} is not a scope", field="scopes", given=unknown, expected=expected)
    if not given:
        raise MissingField("a key needs at least one scope", field="scopes", expected=expected)
    return tuple(scope for scope in Scope if scope in given)


def check_key_name(name: str) -> str:
    """Return the name of a key if it can be shown on one line; raise `OutOfRange`."""
    if 0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable():
        return name
    expected = f"1 to {MAX_NAME_CHARACTERS} printable characters"
    raise OutOfRange(f"the name of a key must have {expected}", field="name", given=name, expected=expected)


def _future(text: str, now: float) -> str:
    """Return a time in the form of `rfc3339`; raise `WrongType` if it is not one, and `OutOfRange` if it has passed."""
    seconds = read_time(text, field="expires_at")
    if seconds <= now:
        raise OutOfRange("expires_at has passed", field="expires_at", given=text, expected="a time in the future")
    return rfc3339(seconds)


def _make_text(key_id: str) -> str:
    body = f"{PREFIX}{key_id}_{_encode(secrets.randbits(_SECRET_BITS), _SECRET_CHARACTERS)}"
    return body + _checksum(body)


def _checksum(body: str) -> str:
    return _encode(zlib.crc32(body.encode()), _CHECKSUM_CHARACTERS)


def _encode(number: int, length: int) -> str:
    """Return a number in base 62: without punctuation, a double click selects a whole key."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def digest_of_secret(text: str) -> str:
    """Return the SHA-256 of the text of a key, or of the token of a session, as it is stored."""
    return hashlib.sha256(text.encode()).hexdigest()


def _find(connection: Connection, key_id: str) -> Key | None:
    row = connection.execute(sa.select(keys).where(keys.c.id == key_id)).one_or_none()
    return None if row is None else key_from_row(row)


def key_from_row(row: sa.Row[*tuple[Any, ...]]) -> Key:
    """Return the key of a row that has all columns of keys."""
    columns = ("id", "tenant", "name", "created_at", "expires_at", "revoked_at")
    return Key(**{name: getattr(row, name) for name in columns}, scopes=tuple(map(Scope, row.scopes)))
