"""Keys and sessions: what is issued, what is refused, and what is stored."""

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.access.keys import Keys, Scope
from adapters.access.sessions import MAX_SESSION_SECONDS, MAX_SESSIONS_PER_KEY, Sessions
from adapters.errors import (
    Forbidden,
    InvalidCombination,
    InvalidInput,
    InvalidName,
    KeyNotFound,
    TenantNotFound,
    Unauthenticated,
)
from adapters.storage.sqlite_database import SqliteDatabase
from tests.support.keys import checksum, make_key

NOON = 1_893_499_200.0  # 2030-01-01T12:00:00Z


class Clock:
    """A clock that the tests set."""

    now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SqliteDatabase]:
    database = SqliteDatabase(tmp_path)
    yield database
    database.close()


@pytest.fixture
def keys(database: SqliteDatabase, clock: Clock) -> Keys:
    return Keys(database, now=clock)


def test_a_key_has_an_id_a_secret_of_256_bits_and_a_checksum(keys: Keys) -> None:
    texts = [make_key(keys, "acme", Scope.READ).text for _ in range(20)]
    for text in texts:
        match = re.fullmatch(r"lpx_([0-9a-f]{16})_([0-9A-Za-z]{43})([0-9A-Za-z]{6})", text)
        assert match is not None
        assert match[3] == checksum(text[:-6])
    assert len(set(texts)) == len(texts)
    assert 43 * math.log2(62) >= 256


def test_a_key_is_verified_and_is_stored_as_its_digest_alone(keys: Keys, database: SqliteDatabase) -> None:
    issued = keys.create(tenant="acme", name="ci", scopes=["train", "read", "read"], creates_tenant=True)
    verified = keys.verify(issued.text)
    assert verified.key == issued.key
    assert (verified.key.tenant, verified.key.name, verified.ends_at) == ("acme", "ci", None)
    assert verified.key.scopes == (Scope.READ, Scope.TRAIN)
    content = database.path.read_bytes()
    assert hashlib.sha256(issued.text.encode()).hexdigest().encode() in content
    assert issued.text.split("_")[2].encode() not in content
    assert issued.text not in repr(issued)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text + "0",
        lambda text: text.upper(),
        lambda text: text[:30] + ("0" if text[30] != "0" else "1") + text[31:],
        lambda text: (body := text[:-7] + ("0" if text[-7] != "0" else "1")) + checksum(body),
        lambda text: (body := "lpx_0123456789abcdef_" + text[21:-6]) + checksum(body),
        lambda _: "",
        lambda text: text + "\n",
        lambda text: "é" * len(text),
    ],
)
def test_no_other_text_is_a_key(keys: Keys, change: "object") -> None:
    text = make_key(keys, "acme", Scope.READ).text
    assert callable(change)
    with pytest.raises(Unauthenticated) as caught:
        keys.verify(change(text))
    assert text[22:] not in str(caught.value.members())


def test_a_mistyped_key_is_refused_without_a_query(keys: Keys, database: SqliteDatabase) -> None:
    text = make_key(keys, "acme", Scope.READ).text
    database.close()
    database.path.unlink()
    with pytest.raises(Unauthenticated, match="mistyped"):
        keys.verify(text[:40] + text[41] + text[40] + text[42:] if text[40] != text[41] else text[:-1] + "?")


def test_a_key_ends_when_it_expires(keys: Keys, clock: Clock) -> None:
    issued = make_key(keys, "acme", Scope.READ, expires_at="2030-01-01T14:00:01+02:00")
    assert issued.key.expires_at == "2030-01-01T12:00:01.000000Z"
    clock.now = NOON + 0.999
    keys.verify(issued.text)
    clock.now = NOON + 1
    with pytest.raises(Unauthenticated, match="expired at 2030-01-01T12:00:01"):
        keys.verify(issued.text)


def test_a_revoked_key_is_refused_and_the_access_revision_says_so(keys: Keys, database: SqliteDatabase) -> None:
    watch = database.catalog_watch()
    issued = make_key(keys, "acme", Scope.READ)
    watch.revision()
    before = watch.access_revision
    assert before == keys.verify(issued.text).revision
    first = keys.revoke(issued.key.id, tenant="acme", by_operator=False)
    watch.revision()
    assert watch.access_revision == before + 1
    assert keys.revoke(issued.key.id, tenant="acme", by_operator=False) == first
    with pytest.raises(Unauthenticated, match="revoked"):
        keys.verify(issued.text)
    assert keys.list(tenant="acme") == [first]
    watch.close()


def test_a_tenant_s_keys_are_its_own(keys: Keys) -> None:
    ours, theirs = make_key(keys, "acme", Scope.ADMIN).key, make_key(keys, "globex", Scope.ADMIN).key
    operator = make_key(keys, "default", Scope.OPERATOR).key
    assert keys.list(tenant="acme") == [ours]
    assert {key.id for key in keys.list(tenant=None)} == {ours.id, theirs.id, operator.id}
    assert keys.list(tenant=None, limit=1) == keys.list(tenant=None)[:1]
    assert keys.list(tenant=None, after=keys.list(tenant=None)[0].id) == keys.list(tenant=None)[1:]
    for key_id in (theirs.id, "nothing"):
        with pytest.raises(KeyNotFound):
            keys.revoke(key_id, tenant="acme", by_operator=False)
    with pytest.raises(Forbidden, match="operator"):
        keys.revoke(operator.id, tenant="default", by_operator=False)
    keys.revoke(operator.id, tenant=None, by_operator=True)


@pytest.mark.parametrize(
    ("wrong", "error", "field"),
    [
        ({"tenant": "nobody"}, TenantNotFound, "tenant"),
        ({"tenant": "No Body", "creates_tenant": True}, InvalidName, "tenant"),
        ({"tenant": "acme", "scopes": ["operator"], "creates_tenant": True}, InvalidCombination, "tenant"),
        ({"scopes": []}, InvalidInput, "scopes"),
        ({"scopes": ["read", "everything"]}, InvalidInput, "scopes"),
        ({"name": ""}, InvalidInput, "name"),
        ({"name": "two\nlines"}, InvalidInput, "name"),
        ({"expires_at": "tomorrow"}, InvalidInput, "expires_at"),
        ({"expires_at": "2031-01-01"}, InvalidInput, "expires_at"),
        ({"expires_at": "2031-01-01T00:00:00"}, InvalidInput, "expires_at"),
        ({"expires_at": "2030-01-01T12:00:00Z"}, InvalidInput, "expires_at"),
    ],
)
def test_a_wrong_value_makes_no_key(keys: Keys, wrong: dict[str, object], error: type[Exception], field: str) -> None:
    given = {"tenant": "default", "name": "x", "scopes": ["read"]} | wrong
    with pytest.raises(error) as caught:
        keys.create(**given)  # type: ignore[arg-type]
    assert getattr(caught.value, "field", None) == field
    assert keys.list(tenant=None) == []


def test_a_session_counts_as_its_key_and_ends_with_it(keys: Keys, database: SqliteDatabase, clock: Clock) -> None:
    sessions, issued = Sessions(database, now=clock), make_key(keys, "acme", Scope.READ)
    token = sessions.open(issued.key.id)
    assert sessions.verify(token).key == issued.key
    assert token.encode() not in database.path.read_bytes()
    keys.revoke(issued.key.id, tenant=None, by_operator=True)
    with pytest.raises(Unauthenticated, match="revoked"):
        sessions.verify(token)


def test_a_session_ends_by_itself_by_expiry_of_its_key_and_by_signing_out(
    keys: Keys, database: SqliteDatabase, clock: Clock
) -> None:
    sessions = Sessions(database, now=clock)
    lasting = sessions.open(make_key(keys, "acme", Scope.READ).key.id)
    brief = sessions.open(make_key(keys, "acme", Scope.READ, expires_at="2030-01-01T12:00:05Z").key.id)
    closed = sessions.open(make_key(keys, "acme", Scope.READ).key.id)
    assert sessions.verify(brief).ends_at == "2030-01-01T12:00:05.000000Z"
    revision = sessions.verify(closed).revision
    sessions.close(closed)
    sessions.close("nothing")
    # Otherwise whoever signs in and out would make every worker read all keys again.
    assert sessions.verify(lasting).revision == revision
    clock.now = NOON + 5
    for token in (brief, closed, "nothing", ""):
        with pytest.raises(Unauthenticated):
            sessions.verify(token)
    clock.now = NOON + MAX_SESSION_SECONDS
    with pytest.raises(Unauthenticated, match="sign in again"):
        sessions.verify(lasting)
    sessions.open(make_key(keys, "acme", Scope.READ).key.id)
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 1


def test_a_key_has_a_bounded_number_of_sessions_and_the_oldest_end(
    keys: Keys, database: SqliteDatabase, clock: Clock
) -> None:
    sessions = Sessions(database, now=clock)
    other = sessions.open(make_key(keys, "acme", Scope.READ).key.id)
    key_id = make_key(keys, "acme", Scope.READ).key.id
    tokens = []
    for _ in range(MAX_SESSIONS_PER_KEY + 2):
        clock.now += 1
        tokens.append(sessions.open(key_id))
    for token in tokens[:2]:
        with pytest.raises(Unauthenticated):
            sessions.verify(token)
    for token in (other, tokens[2], tokens[-1]):
        sessions.verify(token)
