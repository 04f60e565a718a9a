"""A full disk: 507, nothing lost, nothing left lying around."""

import errno
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

import adapters.storage.blobs
import adapters.storage.sqlite_database
from adapters.catalog.catalog import Catalog
from adapters.errors import StorageFull
from adapters.jobs.queue import JobQueue
from adapters.lora.adapter import Adapter
from tests.conftest import Serve
from tests.support.catalog_factories import (
    INPUTS_NI,
    as_upload,
    dense_answer,
    make_adapter,
    publication,
    put,
    referenced_files,
    stored_files,
    submit,
    training_job,
)
from tests.support.external_programs import skip_or_fail

ROWS = INPUTS_NI.tolist()
TRAINING = {"name": "job", "rank": 1, "data": {"inputs": ROWS, "targets": [[0.0, 0.0]] * len(ROWS)}}


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=["fsync of the file", "rename", "fsync of the folder", "quota"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Fills the disk, as one of the steps of storing a blob meets it."""

    def fill() -> None:
        if request.param == "fsync of the file":
            monkeypatch.setattr(os, "fsync", _full)
        elif request.param == "rename":
            monkeypatch.setattr(Path, "rename", _full)
        elif request.param == "quota":
            quota = OSError(errno.EDQUOT, "Disk quota exceeded")
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(quota))
        else:
            monkeypatch.setattr(adapters.storage.blobs, "sync_folder", _full)

    return fill


def test_a_blob_that_does_not_fit_leaves_nothing(
    catalog: Catalog, folder: Path, full_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = put(catalog, "acme", 1)
    full_disk()
    with pytest.raises(StorageFull):
        put(catalog, "acme", 2)
    with pytest.raises(StorageFull):
        catalog.publish([publication("b", 3)], tenant="default")
    monkeypatch.undo()
    assert stored_files(folder) == {kept.file}
    assert [adapter.live for adapter in catalog.adapters(tenant="default")] == [kept]
    assert put(catalog, "acme", 2).version == 2


@pytest.fixture
def full_catalog(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever opens the catalogue's file cannot make it longer: SQLite says that the disk is full."""
    with catalog.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    configure = adapters.storage.sqlite_database._configure

    def configure_full(connection: sqlite3.Connection, record: object) -> None:
        configure(connection, record)
        connection.execute(f"PRAGMA max_page_count={pages}")

    monkeypatch.setattr(adapters.storage.sqlite_database, "_configure", configure_full)


def test_a_catalogue_that_cannot_grow_refuses_and_keeps_what_it_has(full_catalog: None, folder: Path) -> None:
    opened = Catalog(folder, now=lambda: 0.0)
    stored: list[Adapter] = []

    def put_more() -> None:
        while len(stored) < 500:
            put(opened, "acme", len(stored))
            stored.append(make_adapter(len(stored)))

    with pytest.raises(StorageFull):
        put_more()
    assert stored
    assert stored_files(folder) == referenced_files(folder)
    versions = opened.versions("acme", limit=1000, tenant="default")
    assert [version.digest for version in reversed(versions)] == [adapter.digest for adapter in stored]
    with pytest.raises(StorageFull, match="purge=true"):
        opened.delete("acme", tenant="default")
    opened.delete("acme", tenant="default", purge=True)
    assert put(opened, "acme", 1).version == len(stored) + 1
    opened.database.close()


def test_a_job_that_does_not_fit_leaves_no_data(full_catalog: None, folder: Path) -> None:
    opened = Catalog(folder, now=lambda: 0.0)
    queue = JobQueue(opened.database, opened.writer, now=lambda: 0.0, lease_seconds=15)

    def submit_more() -> None:
        for number in range(500):
            submit(queue, f"{number}", training=training_job(long="x" * 20_000), max_queued=1000)

    with pytest.raises(StorageFull):
        submit_more()
    assert stored_files(folder) == referenced_files(folder)
    opened.database.close()


def test_a_full_disk_is_answered_as_such(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = serve()
    client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", _full)
        for answer in (
            client.put("/adapters/acme", json=as_upload(make_adapter(2))),
            client.post("/adapters", json=TRAINING),
        ):
            assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert client.get("/jobs").json()["data"] == []
    assert stored_files(service.settings.data_dir) == referenced_files(service.settings.data_dir)
    answer = client.post("/predict", json={"adapter": "acme", "inputs": ROWS})
    assert answer.json()["adapter"]["digest"] == make_adapter(1).digest
    assert client.put("/adapters/acme", json=as_upload(make_adapter(2))).json()["version"] == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        skip_or_fail("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_real_disk_fills_up_and_what_was_acknowledged_stays(serve: Serve, small_disk: Path) -> None:
    client, service = serve(data_dir=small_disk / "data", cache_bytes=0)
    acknowledged: dict[str, Adapter] = {}
    refused: list[httpx.Response] = []
    while len(refused) < 5:
        number = len(acknowledged) + len(refused)
        adapter, name = make_adapter(number, rank=200), f"tenant-{number}"
        answer = client.put(f"/adapters/{name}", json=as_upload(adapter))
        if answer.status_code == 201:
            acknowledged[name] = adapter
        else:
            refused.append(answer)
    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(507, "storage_full")}
    assert len(acknowledged) > 20
    folder = service.settings.data_dir
    assert stored_files(folder) == referenced_files(folder)
    for name, adapter in acknowledged.items():
        answer = client.post("/predict", json={"adapter": name, "inputs": ROWS})
        outputs = torch.tensor(answer.json()["outputs"], dtype=torch.float64)
        torch.testing.assert_close(outputs, dense_answer(adapter), rtol=1e-4, atol=1e-3)
    # The operator gives it room, and all works as before.
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True, capture_output=True)
    assert client.put("/adapters/late", json=as_upload(make_adapter(1))).status_code == 201
    assert client.delete("/adapters/tenant-0?purge=true").status_code == 204
