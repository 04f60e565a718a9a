"""PostgreSQL: its schema, its locks, its watch, and what happens while the server is away."""

import asyncio
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import psycopg
import pytest
import sqlalchemy as sa
import uvloop
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from adapters.access.idempotency import IdempotencyKeys, IdempotentRequest
from adapters.catalog.catalog import Catalog
from adapters.catalog.resolver import Resolver
from adapters.errors import (
    CatalogBusy,
    CatalogNotLoadable,
    CatalogUnavailable,
    ClaimLost,
    IdempotencyInProgress,
    OutOfRange,
    PreconditionFailed,
)
from adapters.jobs.queue import JobQueue
from adapters.names import Reference
from adapters.storage import postgres_database
from adapters.storage.postgres_database import PostgresDatabase
from adapters.storage.schema import keys, metadata, pending_blobs
from app.settings import Settings
from tests.conftest import Serve
from tests.support.catalog_factories import as_upload, claimed, make_adapter, publication, put, submit
from tests.support.databases import place_database
from tests.support.deadlines import scaled
from tests.support.postgres_server import PostgresServer
from tests.support.service import eventually, serving, train
from tests.support.storage_kinds import POSTGRES

ACME = Reference("acme")
BODY = {"adapter": "acme", "inputs": [[1.0] * 10]}
pytestmark = pytest.mark.xdist_group(POSTGRES)


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


@pytest.fixture
def data_folder(tmp_path: Path, url: str) -> Path:
    place_database(tmp_path / "data", url)
    return tmp_path / "data"


@pytest.fixture
def elsewhere(tmp_path: Path, url: str) -> Iterator[Catalog]:
    """The same catalogue, opened by a process on another machine."""
    with closing(Catalog(tmp_path / "data", now=time.time, database=PostgresDatabase(url))) as opened:
        yield opened


def test_the_migrations_make_the_tables_that_the_code_describes(catalog: Catalog) -> None:
    with catalog.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding_is_refused(postgres_server: PostgresServer, encoding: str) -> None:
    with psycopg.connect(postgres_server.dsn("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS foreign_text")
        connection.execute(f"CREATE DATABASE foreign_text ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    url = postgres_server.dsn("foreign_text").replace("postgresql:", "postgresql+psycopg:")
    with pytest.raises(CatalogNotLoadable, match=f"has the encoding {encoding}"):
        PostgresDatabase(url)


def test_processes_that_open_an_empty_database_at_once_migrate_it_once(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.dsn("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS empty")
        connection.execute("CREATE DATABASE empty")
    url = postgres_server.dsn("empty").replace("postgresql:", "postgresql+psycopg:")
    with ThreadPoolExecutor(3) as threads:
        opened = list(threads.map(PostgresDatabase, [url] * 3))
    identities = {database.identity(with_references=True) for database in opened}
    for database in opened:
        database.close()
    assert len(identities) == 1


def test_a_service_trains_and_answers(serve: Serve) -> None:
    client, _ = serve(trainer=True)
    assert client.put("/adapters/acme", json=as_upload(make_adapter(1))).status_code == 201
    assert client.post("/predict", json=BODY).json()["adapter"]["version"] == 1
    rows = [[float(row == column) for column in range(10)] for row in range(10)]
    job = train(client, name="trained", rank=1, data={"inputs": rows, "targets": [[1.0, 2.0]] * 10})
    assert job["status"] == "succeeded"
    assert client.post("/predict", json=BODY | {"adapter": "trained"}).status_code == 200


def test_a_change_acknowledged_elsewhere_is_in_the_next_reading(catalog: Catalog, elsewhere: Catalog) -> None:
    async def read() -> None:
        with closing(Resolver(catalog)) as resolver:
            for seed in range(30):
                version = await asyncio.to_thread(put, elsewhere, "acme", seed)
                # Of two readers at once, the second waits for a reading of its own.
                readings = [resolver.watch.begin_read(), resolver.watch.begin_read()]
                assert readings[0] is not None
                assert readings[1] is not None
                assert [await reading for reading in readings if reading is not None] == [0.0, 0.0]
                ((_, found),) = resolver.current().versions([ACME], tenant="default")
                assert found == version

    put(elsewhere, "other", 1)
    asyncio.run(read())


def test_the_names_that_did_not_change_stay_cached(catalog: Catalog, elsewhere: Catalog) -> None:
    async def read() -> None:
        with closing(Resolver(catalog)) as resolver:

            async def cached() -> set[str]:
                reading = resolver.watch.begin_read()
                assert reading is not None
                await reading
                cached = resolver.current().cached("default")
                return {name for name in ("acme", "other") if Reference(name) in cached}

            await cached()
            list(resolver.current().versions([ACME, Reference("other")], tenant="default"))
            await asyncio.to_thread(put, elsewhere, "acme", 7)
            assert await cached() == {"other"}
            for _ in range(3):  # readings of which the resolver does not hear
                await asyncio.to_thread(put, elsewhere, "third", _)
                reading = resolver.watch.begin_read()
                assert reading is not None
                await reading
            assert await cached() == {"other"}

    put(elsewhere, "acme", 1)
    put(elsewhere, "other", 1)
    asyncio.run(read())


def test_a_transaction_that_holds_the_lock_makes_others_busy_until_it_is_ended(url: str, catalog: Catalog) -> None:
    impatient = PostgresDatabase(f"{url}?options=-c%20lock_timeout%3D100ms")
    idle = PostgresDatabase(f"{url}?options=-c%20idle_in_transaction_session_timeout%3D300ms")
    transaction = idle.write()
    transaction.__enter__()
    with pytest.raises(CatalogBusy, match="locked"), impatient.write():
        pass
    # Readers and heartbeats do not wait.
    assert catalog.database.revision() == 0
    with impatient.write_job():
        pass
    eventually(lambda: _may_write(impatient), what="the end of the idle transaction")
    with pytest.raises(CatalogBusy):
        transaction.__exit__(None, None, None)
    impatient.close()
    idle.close()


def _may_write(database: PostgresDatabase) -> bool:
    try:
        with database.write():
            return True
    except CatalogBusy:
        return False


def test_heartbeats_and_claims_do_not_wait_for_a_writer(catalog: Catalog, queue: JobQueue) -> None:
    submit(queue, "first")
    submit(queue, "second")
    claim = claimed(queue)
    with catalog.database.write():
        queue.heartbeat(claim, progress={"step": 1})
        queue.append_log(claim, "a line")
        assert claimed(queue).id == "second"


def test_a_lease_follows_the_clock_of_the_server(catalog: Catalog, url: str) -> None:
    database = PostgresDatabase(url)
    # The clock of this machine is an hour late.
    queue = JobQueue(database, catalog.writer, now=lambda: time.time() - 3600, lease_seconds=30)
    submit(queue)
    claim = claimed(queue)
    assert queue.claim(base="") is None
    assert claim.started_at is not None
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        row = connection.execute("SELECT lease_until - extract(epoch FROM now()) FROM jobs").fetchone()
    assert row is not None
    assert 20 < row[0] < 31
    database.close()


def test_of_racing_claims_each_job_has_one_winner(queue: JobQueue) -> None:
    for number in range(12):
        submit(queue, f"job-{number:02}")
    with ThreadPoolExecutor(6) as threads:
        claims = [claim for claim in threads.map(lambda _: queue.claim(base=""), range(18)) if claim is not None]
    assert sorted(claim.id for claim in claims) == [f"job-{number:02}" for number in range(12)]


def test_of_racing_moves_of_live_on_one_digest_one_wins(catalog: Catalog, elsewhere: Catalog) -> None:
    first = put(catalog, "acme", 0)

    def only_first(_exists: bool, digest: str | None) -> None:
        if digest != first.digest:
            raise PreconditionFailed("live has moved")

    def move(seed: int) -> bool:
        store = (catalog, elsewhere)[seed % 2]
        while True:
            try:
                return store.put(publication("acme", seed), tenant="default", precondition=only_first)[1]
            except PreconditionFailed:
                return False
            except CatalogBusy:  # the machine is so slow that the writers before took longer than the time for a lock
                pass

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(move, range(1, 101))) == 1
    assert catalog.version_numbers("acme", tenant="default") == [1, 2]


def test_a_cancelled_job_is_lost_to_its_trainer(catalog: Catalog, queue: JobQueue) -> None:
    submit(queue)
    claim = claimed(queue)
    queue.cancel("j", tenant="default")
    with pytest.raises(ClaimLost):
        queue.heartbeat(claim, progress=None)


def test_while_the_server_is_away_answers_are_503_and_nothing_acknowledged_is_lost(
    serve: Serve, postgres_server: PostgresServer
) -> None:
    client, _ = serve()
    for seed in range(3):
        assert client.put("/adapters/acme", json=as_upload(make_adapter(seed))).status_code == 201
    for seed in range(3, 5):
        assert client.post("/predict", json=BODY).json()["adapter"]["version"] == seed
        postgres_server.kill()
        try:
            answers = [client.post("/predict", json=BODY) for _ in range(3)]
            answers += [client.get("/adapters"), client.get("/readyz"), client.get("/jobs")]
            answers.append(client.put("/adapters/acme", json=as_upload(make_adapter(9))))
        finally:
            postgres_server.start()
        for answer in answers:
            assert (answer.status_code, answer.json()["code"]) == (503, "catalog_unavailable")
            assert answer.headers["Retry-After"] == "1"
        eventually(lambda: client.post("/predict", json=BODY).status_code == 200, seconds=5, what="the first answer")
        assert client.put("/adapters/acme", json=as_upload(make_adapter(seed))).json()["version"] == seed + 1


def test_a_restart_between_requests_is_not_noticed(serve: Serve, postgres_server: PostgresServer) -> None:
    client, _ = serve()
    client.put("/adapters/acme", json=as_upload(make_adapter(1)))
    assert client.post("/predict", json=BODY).status_code == 200
    postgres_server.kill()
    postgres_server.start()
    assert client.put("/adapters/acme", json=as_upload(make_adapter(2))).status_code == 201
    eventually(lambda: client.post("/predict", json=BODY).status_code == 200, seconds=5, what="the first answer")


def test_adapters_in_memory_answer_for_some_seconds_with_their_age(
    data_folder: Path, url: str, postgres_server: PostgresServer
) -> None:
    settings = Settings(
        data_dir=data_folder, base="random:10,2,42", database_url=url, allow_mixed_storage=True, max_stale_seconds=2
    )
    with serving(settings) as (client, _):
        client.put("/adapters/acme", json=as_upload(make_adapter(1)))
        client.put("/adapters/cold", json=as_upload(make_adapter(2)))
        assert "Age" not in client.post("/predict", json=BODY).headers
        postgres_server.kill()
        try:
            warm, cold = client.post("/predict", json=BODY), client.post("/predict", json=BODY | {"adapter": "cold"})
            assert client.get("/readyz").status_code == 200
            gone = eventually(lambda: _failed(client), seconds=10, what="the end of the old answers")
        finally:
            postgres_server.start()
        assert (warm.status_code, int(warm.headers["Age"]) in (1, 2)) == (200, True)
        assert (cold.status_code, gone.status_code, gone.json()["code"]) == (503, 503, "catalog_unavailable")
        eventually(lambda: client.post("/predict", json=BODY).status_code == 200, seconds=5, what="the first answer")


def _failed(client: httpx.Client) -> httpx.Response | None:
    answer = client.post("/predict", json=BODY)
    return None if answer.status_code == 200 else answer


def test_a_reading_that_is_sent_to_a_server_that_has_just_ended_fails_at_once(
    catalog: Catalog, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def read() -> None:
        with closing(Resolver(catalog)) as resolver:
            for is_up in (True, False):
                if not is_up:
                    postgres_server.kill()  # the event loop has not read its last message yet
                reading = resolver.watch.begin_read()
                assert reading is not None
                if is_up:
                    await reading
                else:
                    with pytest.raises(CatalogUnavailable):
                        await reading

    try:
        uvloop.run(read())
    finally:
        postgres_server.start()
    assert "is lost" in caplog.text
    assert "it does not answer" not in caplog.text


def test_a_host_that_does_not_answer_is_passed_over(
    tmp_path: Path, catalog: Catalog, url: str, postgres_server: PostgresServer
) -> None:
    put(catalog, "acme", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = f"host=127.0.0.1:{silent.getsockname()[1]}&host=127.0.0.1:{postgres_server.port}"
        both = f"postgresql+psycopg://loraplex@/{url.rpartition('/')[2]}?{hosts}"
        settings = Settings(
            data_dir=tmp_path / "data", base="random:10,2,42", database_url=both, allow_mixed_storage=True
        )
        with serving(settings) as (client, _):
            eventually(lambda: client.post("/predict", json=BODY).status_code == 200, what="an answer")


def test_a_service_says_why_changes_may_be_lost(serve: Serve, postgres_server: PostgresServer) -> None:
    client, service = serve()
    (warning,) = client.get("/readyz").json()["warnings"]
    database = service.catalog.database
    assert warning.startswith("fsync=off")  # as the tests' server has it
    with psycopg.connect(postgres_server.dsn("postgres"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_commit = off")
        connection.execute("SELECT pg_reload_conf()")
    try:
        eventually(lambda: "synchronous_commit=off" in str(database.durability_warnings()), what="the warning")
    finally:
        with psycopg.connect(postgres_server.dsn("postgres"), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET synchronous_commit")
            connection.execute("SELECT pg_reload_conf()")


def test_a_transaction_needs_no_second_connection(
    catalog: Catalog, elsewhere: Catalog, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it did, transactions that hold all connections of the pool would wait for each other."""
    monkeypatch.setattr(postgres_database, "_POOL_SIZE", 1)
    monkeypatch.setattr(postgres_database, "_MAX_OVERFLOW", 0)
    request = IdempotentRequest("default", "k", "0" * 64)
    assert IdempotencyKeys(elsewhere.database, elsewhere.writer, now=time.time).claim(request) is None
    with closing(PostgresDatabase(url)) as database:
        keys = IdempotencyKeys(database, catalog.writer, now=time.time)
        for look in (keys.find, keys.claim):
            with pytest.raises(IdempotencyInProgress):
                look(request)


def test_a_sweep_spares_what_a_process_of_another_machine_is_writing(
    catalog: Catalog, elsewhere: Catalog, postgres_server: PostgresServer
) -> None:
    put(catalog, "acme", 1)
    with catalog.database.read() as connection:
        (mine,) = set(connection.scalars(sa.select(pending_blobs.c.owner)))
    elsewhere.writer.delete_stale_rows()
    with catalog.database.read() as connection:
        assert elsewhere.writer.is_other_live(mine, connection)
    catalog.writer.close()
    elsewhere.writer.delete_stale_rows()
    with catalog.database.read() as connection:
        assert not elsewhere.writer.is_other_live(mine, connection)
        assert mine not in connection.scalars(sa.select(pending_blobs.c.owner)).all()
    put(elsewhere, "acme", 2)


def test_a_writer_that_lost_its_lock_stores_no_job_whose_adapters_a_sweep_deletes(
    catalog: Catalog, elsewhere: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[str] = []
    with catalog.writer.pending("half") as publish, monkeypatch.context() as patch:

        def publish_meanwhile(*_: object) -> None:
            try:
                with catalog.database.write() as connection:
                    publish(connection)
            except CatalogBusy as error:
                refusals.append(error.detail)

        with catalog.database.write() as connection:
            connection.exec_driver_sql(
                "INSERT INTO job_adapters (job, position, name, rows, deletions, moved_live)"
                " VALUES ('half', 0, 'x', 1, 0, false)"
            )
        catalog.writer.close()
        patch.setattr("adapters.storage.pending_blobs.delete_in_slices", publish_meanwhile)
        elsewhere.writer.delete_stale_rows()
    assert refusals == ["the pending row of the job half was deleted while it was stored; try again"]


def test_a_text_with_nul_is_refused_and_no_defect(catalog: Catalog) -> None:
    with pytest.raises(OutOfRange, match="NUL"), catalog.database.read() as connection:
        connection.execute(sa.select(keys.c.id).where(keys.c.name == "a\0b"))


def test_a_database_that_is_away_is_unavailable(catalog: Catalog, postgres_server: PostgresServer) -> None:
    postgres_server.kill()
    try:
        with pytest.raises(CatalogUnavailable), catalog.database.read():
            pass
    finally:
        postgres_server.start()


@pytest.mark.slow
def test_while_the_synchronous_standby_is_gone_changes_wait_and_readers_do_not() -> None:
    with closing(PostgresServer()) as server, ThreadPoolExecutor(1) as threads:
        url = server.new_database()
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:

            def set_standby(name: str) -> None:
                connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'".encode())
                connection.execute("SELECT pg_reload_conf()")

            def is_waiting() -> bool:
                row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
                return row.fetchone() == (1,)

            with closing(PostgresDatabase(url)) as database:
                set_standby("gone")
                eventually(lambda: connection.execute("SHOW synchronous_standby_names").fetchone() == ("gone",))
                changes: list[Future[None]] = []

                def waits() -> bool:
                    # The server's checkpointer, which decides that commits wait, reads the setting later.
                    if not changes or changes[-1].done():
                        changes.append(threads.submit(database.raise_revision, len(changes) + 1))
                    return is_waiting()

                eventually(waits, what="a commit that waits for the standby")
                with pytest.raises(CatalogBusy):
                    database.raise_revision(len(changes) + 1)
                # It is not visible before its standby has it, and not acknowledged.
                assert (database.revision(), changes[-1].done()) == (len(changes) - 1, False)
                set_standby("")
                changes[-1].result(scaled(30))
                assert database.revision() == len(changes)


def test_the_tables_of_a_newer_release_are_refused(url: str) -> None:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(CatalogNotLoadable, match="Can't locate revision identified by '9999'"):
        PostgresDatabase(url)
