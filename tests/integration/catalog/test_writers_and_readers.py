"""Calls that write wait for the catalogue's lock; calls that read do not wait for them."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

import adapters.storage.sqlite_database
from adapters.errors import CatalogBusy
from app.service import WriteThreads
from tests.conftest import Serve
from tests.support.catalog_factories import as_upload, make_adapter, referenced_files, stored_files
from tests.support.deadlines import scaled
from tests.support.service import ServiceProcess, eventually

WRITERS = 60
ROWS = [[0.0] * 10] * 4
TRAINING = {"name": "job", "rank": 1, "data": {"inputs": ROWS, "targets": [[0.0, 0.0]] * 4}}
READS = ("/adapters", "/adapters/acme", "/jobs", "/datasets", "/readyz", "/metrics", "/base", "/ui/adapters")
CSV = {"Content-Type": "text/csv"}


def _connections(service: ServiceProcess) -> int:
    """Return the number of open connections of the service."""
    processes = psutil.Process(service.process.pid).children(recursive=True)
    return sum(len(process.net_connections("tcp")) for process in processes)


def _lock(folder: Path) -> sqlite3.Connection:
    """As another process that writes holds it: readers pass, writers do not."""
    connection = sqlite3.connect(folder / "catalog.sqlite3", isolation_level=None, timeout=15, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def _writers(client: httpx.Client) -> list[Callable[[], httpx.Response]]:
    """Sixty, of all kinds that there are."""
    job = client.post("/adapters", json=TRAINING).raise_for_status().json()["id"]
    kinds: list[Callable[[int], httpx.Response]] = [
        lambda n: client.put(f"/adapters/new-{n}", json=as_upload(make_adapter(n))),
        lambda _: client.put("/adapters/acme/aliases/live", json={"version": 1}),
        lambda n: client.put(f"/datasets/rows-{n}", content=b"a,b\n1,2\n", headers=CSV),
        lambda _: client.post("/adapters", json=TRAINING),
        lambda _: client.post(f"/jobs/{job}/cancel"),
        lambda _: client.delete("/datasets/rows"),
    ]
    return [lambda n=n: kinds[n % len(kinds)](n) for n in range(WRITERS)]  # type: ignore[misc]


@pytest.mark.slow
def test_sixty_blocked_writers_do_not_keep_a_reader_waiting(tmp_path: Path) -> None:
    limits = httpx.Limits(max_connections=None)
    with (
        ServiceProcess(tmp_path / "data", base="random:10,2,42", trainers=0) as service,
        httpx.Client(base_url=service.client.base_url, timeout=120, limits=limits) as many,
        ThreadPoolExecutor(WRITERS) as pool,
    ):
        client = service.client
        client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
        client.put("/datasets/rows", content=b"a,b\n1,2\n", headers=CSV).raise_for_status()
        writers = _writers(many)
        with closing(_lock(service.data_dir)):
            answers = [pool.submit(writer) for writer in writers]
            eventually(lambda: _connections(service) > WRITERS, what="the connections of all writers")
            slowest = 0.0
            for path in READS * 3:
                begin = time.monotonic()
                assert client.get(path, headers={"Accept": "text/html, application/json"}).status_code == 200, path
                slowest = max(slowest, time.monotonic() - begin)
            begin = time.monotonic()
            client.post("/predict", json={"adapter": "acme", "inputs": ROWS}).raise_for_status()
            slowest = max(slowest, time.monotonic() - begin)
            blocked = sum(not answer.done() for answer in answers)
        print(f"the slowest read beside {blocked} blocked writers: {slowest:.3f} s")
        assert blocked == WRITERS
        assert slowest < scaled(2)
        results = [answer.result(120) for answer in answers]
        for result in results:
            assert result.is_success or (result.status_code == 404 and "rows" in result.text), result.text


def test_calls_that_wait_too_long_for_the_lock_are_refused_and_leave_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.storage.sqlite_database, "_BUSY_MILLISECONDS", 300)
    client, service = serve()
    service.writes = WriteThreads(threads=2, timeout_seconds=0.3)
    folder = service.settings.data_dir
    with closing(_lock(folder)), ThreadPoolExecutor(24) as pool:
        uploads = [pool.submit(client.put, f"/adapters/{n}", json=as_upload(make_adapter(n))) for n in range(12)]
        trainings = [pool.submit(client.post, "/adapters", json=TRAINING) for _ in range(12)]
        begin = time.monotonic()
        for future in uploads + trainings:
            answer = future.result(scaled(30))
            assert (answer.status_code, answer.json()["code"]) == (503, "catalog_busy")
            assert int(answer.headers["Retry-After"]) >= 1
        # Not one pair after another, each with the whole time to wait.
        assert time.monotonic() - begin < scaled(3)
    assert stored_files(folder) == referenced_files(folder) == set()
    assert client.put("/adapters/acme", json=as_upload(make_adapter(1))).status_code == 201
    assert client.post("/adapters", json=TRAINING).status_code == 202


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What calls in threads wait for."""
    event = threading.Event()
    yield event
    event.set()


def test_more_calls_than_may_wait_are_refused_at_once(released: threading.Event) -> None:
    async def crowd() -> None:
        writes = WriteThreads(threads=1, max_waiting=2)
        calls = [asyncio.create_task(writes.run(released.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(CatalogBusy, match="2 calls wait"):
            await writes.run(released.wait)
        released.set()
        assert await asyncio.gather(*calls) == [True] * 3
        assert await writes.run(released.wait)

    asyncio.run(crowd())


def test_a_call_waits_as_long_as_those_before_it_compute(released: threading.Event) -> None:
    async def crowd() -> None:
        writes, turns = WriteThreads(timeout_seconds=0.01), asyncio.Semaphore(1)

        async def hold() -> None:
            async with writes.turn(turns):
                await writes.run(released.wait)

        calls = [asyncio.create_task(hold()) for _ in range(2)]
        await asyncio.sleep(0.1)
        released.set()
        await asyncio.gather(*calls)

    asyncio.run(crowd())
