"""A catalogue that somebody else holds locked: waited for, then refused, never lost."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import adapters.storage.sqlite_database
from tests.conftest import Serve
from tests.support.catalog_factories import INPUTS_NI, as_upload, make_adapter, referenced_files, stored_files
from tests.support.deadlines import scaled
from tests.support.service import eventually


class _Lock:
    """Another process's exclusive lock on the catalogue."""

    def __init__(self, folder: Path) -> None:
        self._connection = sqlite3.connect(
            folder / "catalog.sqlite3", isolation_level=None, timeout=15, check_same_thread=False
        )
        self._connection.execute("BEGIN EXCLUSIVE")

    def release(self) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for locks a fifth of a second, not fifteen."""
    monkeypatch.setattr(adapters.storage.sqlite_database, "_BUSY_MILLISECONDS", 200)


def test_a_write_waits_for_a_short_lock(serve: Serve) -> None:
    client, service = serve()
    # The first upload of a process commits pending rows before it writes its file; later ones do not.
    client.put("/adapters/first", json=as_upload(make_adapter(0))).raise_for_status()
    lock = _Lock(service.settings.data_dir)
    with ThreadPoolExecutor(2) as pool:
        upload = pool.submit(client.put, "/adapters/acme", json=as_upload(make_adapter(1)))
        # Its file is there: it waits for the lock with its row.
        eventually(lambda: len(stored_files(service.settings.data_dir)) == 2, what="the blob of the upload")
        assert not upload.done()
        lock.release()
        assert upload.result(scaled(30)).status_code == 201


def test_a_long_lock_is_answered_and_the_same_upload_works_later(impatient: None, serve: Serve) -> None:
    client, service = serve()
    lock = _Lock(service.settings.data_dir)
    for answer in (
        client.put("/adapters/acme", json=as_upload(make_adapter(1))),
        client.get("/adapters"),
        client.get("/readyz"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "catalog_busy")
        assert int(answer.headers["Retry-After"]) >= 1
    assert client.get("/healthz").status_code == 200
    lock.release()
    assert stored_files(service.settings.data_dir) == referenced_files(service.settings.data_dir) == set()
    answer = client.put("/adapters/acme", json=as_upload(make_adapter(1)))
    assert (answer.status_code, answer.json()["version"]) == (201, 1)


def test_a_job_that_could_not_be_queued_leaves_no_data(impatient: None, serve: Serve) -> None:
    client, service = serve()
    rows = INPUTS_NI.tolist()
    reader = sqlite3.connect(service.settings.data_dir / "catalog.sqlite3", isolation_level=None)
    reader.execute("BEGIN IMMEDIATE")  # readers pass, writers do not
    body = {"name": "acme", "rank": 1, "data": {"inputs": rows, "targets": [[0.0, 0.0]] * len(rows)}}
    answer = client.post("/adapters", json=body)
    assert (answer.status_code, answer.json()["code"]) == (503, "catalog_busy")
    reader.close()
    assert stored_files(service.settings.data_dir) == set()
    assert client.post("/adapters", json=body).status_code == 202


def test_a_prediction_waits_out_a_commit(serve: Serve) -> None:
    client, service = serve()
    client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
    looked = threading.Event()
    look = service.resolver.current

    def look_and_tell() -> object:
        looked.set()
        return look()

    service.resolver.current = look_and_tell  # type: ignore[method-assign,assignment]
    lock = _Lock(service.settings.data_dir)
    with ThreadPoolExecutor(1) as pool:
        prediction = pool.submit(client.post, "/predict", json={"adapter": "acme", "inputs": INPUTS_NI.tolist()})
        assert looked.wait(scaled(30))
        assert not prediction.done()
        lock.release()
        assert prediction.result(scaled(30)).json()["adapter"]["version"] == 1
