"""The watch of the catalogue in PostgreSQL: limits and grants stay those of its revision, and readings always end."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from adapters.access.grants import Credential, Grants
from adapters.access.keys import Keys
from adapters.access.rates import Rate, RateLimiter, SharedBuckets
from adapters.access.tenants import Limits, Tenants
from adapters.errors import CatalogUnavailable
from adapters.storage.database import CatalogWatch
from adapters.storage.postgres_database import PostgresDatabase
from adapters.storage.postgres_watch import PostgresCatalogWatch
from tests.support.deadlines import scaled
from tests.support.hostile_proxy import HostileProxy, forward
from tests.support.postgres_server import PostgresServer
from tests.support.service import eventually
from tests.support.storage_kinds import POSTGRES

pytestmark = pytest.mark.xdist_group(POSTGRES)


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


@pytest.fixture
def database(url: str) -> Iterator[PostgresDatabase]:
    with closing(PostgresDatabase(url)) as opened:
        yield opened


async def _read(watch: CatalogWatch) -> None:
    reading = watch.begin_read()
    assert reading is not None
    await asyncio.wait_for(asyncio.shield(reading), scaled(30))


async def _read_in_the_end(watch: CatalogWatch) -> None:
    """Read until it succeeds."""
    while True:
        try:
            return await _read(watch)
        except CatalogUnavailable:
            await asyncio.sleep(0)


@pytest.mark.parametrize("is_lost", [False, True], ids=["answered", "lost"])
def test_limits_that_arrive_after_their_revision_apply(
    database: PostgresDatabase, url: str, tmp_path: Path, is_lost: bool
) -> None:
    tenants = Tenants(database, now=time.time)
    tenants.put("acme", Limits())
    with (
        psycopg.connect(url.replace("+psycopg", "")) as locker,
        psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection,
        closing(database.catalog_watch()) as watch,
        closing(RateLimiter(watch, SharedBuckets(tmp_path / "rates"))) as limiter,
    ):

        def waiting() -> int | None:
            row = connection.execute("SELECT pid FROM pg_locks WHERE NOT granted").fetchone()
            return row[0] if row else None

        async def read() -> None:
            await _read(watch)
            await asyncio.to_thread(tenants.put, "acme", Limits(requests_per_second=100))
            locker.execute("LOCK TABLE tenants")  # the watch can read the revision, and not the limits
            reading = watch.begin_read()
            assert reading is not None
            pid = await asyncio.to_thread(eventually, waiting, what="the statement that reads the limits")
            assert not limiter.take("acme", Rate.REQUESTS)
            if is_lost:
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])
            locker.rollback()
            await asyncio.wait_for(reading, scaled(30))
            assert limiter.take("acme", Rate.REQUESTS)

        asyncio.run(asyncio.wait_for(read(), scaled(60)))


def test_grants_and_limits_of_another_server_do_not_count(database: PostgresDatabase, url: str) -> None:
    tenants, keys = Tenants(database, now=time.time), Keys(database, now=time.time)
    tenants.put("acme", Limits())
    text = keys.create(tenant="acme", name="k", scopes=["read"]).text
    with (
        psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection,
        closing(database.catalog_watch()) as watch,
    ):
        grants = Grants(database, watch, has_keys=True)

        async def read() -> None:
            await _read(watch)
            grant = grants.verify(Credential(text))
            assert grants.is_current(grant)
            # A failover that loses changes: other limits, at the same access revision.
            connection.execute("""UPDATE tenants SET limits = '{"jobs": 3}' WHERE name = 'acme'""")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query LIKE '%loraplex_revision%' AND pid <> pg_backend_pid() AND datname = current_database()"
            )
            while watch.limits("acme") != {"jobs": 3}:
                await _read(watch)
            assert not grants.is_current(grant)
            assert grants.is_current(grants.verify(Credential(text)))

        asyncio.run(asyncio.wait_for(read(), scaled(30)))


def test_readings_fail_while_the_server_accepts_connections_and_refuses_statements(
    database: PostgresDatabase, url: str, postgres_server: PostgresServer
) -> None:
    proxy = HostileProxy(postgres_server.port)
    # It may prepare the statements, and not execute them.
    arguments = psycopg.conninfo.conninfo_to_dict(url.replace("+psycopg", ""), options="-c role=pg_monitor")
    watch = PostgresCatalogWatch({**arguments, "host": "127.0.0.1", "port": proxy.port})

    async def read() -> None:
        with proxy.failing(forward):
            for _ in range(100):
                with pytest.raises(CatalogUnavailable):
                    await _read(watch)
            # Most of them while the watch waited before its next attempt.
            assert proxy.faults < 50
        with database.write() as connection:
            connection.execute(sa.text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO pg_monitor"))
        await _read_in_the_end(watch)

    with closing(proxy), closing(watch):
        asyncio.run(asyncio.wait_for(read(), scaled(30)))


def test_a_reading_does_not_wait_for_a_name_server(
    database: PostgresDatabase, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, look_up = threading.Event(), socket.getaddrinfo

    def hang(host: str, *arguments: int, **named: int) -> object:
        if host == "database.test":
            answered.wait()
        return look_up("127.0.0.1" if host == "database.test" else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    arguments = psycopg.conninfo.conninfo_to_dict(url.replace("+psycopg", ""), host="database.test")

    async def read() -> None:
        with closing(PostgresCatalogWatch(arguments)) as watch:
            try:
                for _ in range(3):
                    with pytest.raises(CatalogUnavailable):
                        await _read(watch)
            finally:
                answered.set()
            await _read_in_the_end(watch)

    asyncio.run(asyncio.wait_for(read(), scaled(60)))
