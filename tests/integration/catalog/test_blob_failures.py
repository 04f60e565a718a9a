"""Files of blobs: synced before they are named, and an error of our own if they cannot be written, read or removed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adapters.storage.blobs
from adapters.catalog.catalog import Catalog
from adapters.datasets.ingest import Format, Ingestion, upload_file
from adapters.datasets.store import Datasets
from adapters.errors import BlobCorrupt, StorageFailed
from adapters.jobs.queue import JobQueue
from tests.conftest import Serve
from tests.integration.catalog.disk_calls import DiskCalls
from tests.support.catalog_factories import (
    as_upload,
    make_adapter,
    publication,
    put,
    quarantined_files,
    referenced_files,
    stored_files,
    submit,
)

ROWS = {"adapter": "acme", "inputs": [[0.0] * 10]}
CODES = [errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINTR]


def _failing(code: int, real: Callable[..., Any] | None = None, *, on: str = "") -> Callable[..., Any]:
    """A call that fails, or, with the real one, that fails on paths with `on`."""

    def call(*arguments: Any, **options: Any) -> Any:
        if real is not None and on not in str(arguments[0]):
            return real(*arguments, **options)
        raise OSError(code, os.strerror(code))

    return call


def test_the_files_of_a_publish_are_synced_before_their_names(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = DiskCalls(monkeypatch)
    version = catalog.put(publication("acme", statistics=b"sums"), tenant="default")[0]
    assert version.statistics is not None
    for file in (version.file, version.statistics):
        calls.assert_durable(catalog.blobs.local(file))


def test_the_file_of_a_data_set_is_synced_before_its_name(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = Datasets(catalog.database, catalog.writer, now=lambda: 1.0)
    calls = DiskCalls(monkeypatch)
    with upload_file(folder / "tmp") as raw:
        raw.write(b"x,y\n1,a\n")
        reading = Ingestion(raw, Format.CSV, memory_bytes=2**28, max_bytes=2**20)
        version, _ = datasets.add("rows", reading, content_type="text/csv", tenant="default")
    calls.assert_durable(catalog.blobs.local(version.file))


def test_the_data_of_a_job_are_synced_before_their_name(
    catalog: Catalog, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = DiskCalls(monkeypatch)
    job = submit(queue)
    assert job.data_file is not None
    calls.assert_durable(catalog.blobs.local(job.data_file))


@pytest.mark.parametrize("step", ["open", "fsync", "rename", "folder", "unlink"])
@pytest.mark.parametrize("code", CODES, ids=[errno.errorcode[code] for code in CODES])
def test_a_blob_that_cannot_be_written_is_storage_failed(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    kept = put(catalog, "acme", 1)
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", _failing(code))
    elif step == "folder":
        monkeypatch.setattr(adapters.storage.blobs, "sync_folder", _failing(code))
    elif step == "rename":
        monkeypatch.setattr(Path, "rename", _failing(code))
    else:
        monkeypatch.setattr(Path, "open", _failing(code, Path.open, on=".tmp"))
    if step == "unlink":
        monkeypatch.setattr(Path, "unlink", _failing(code))
    with pytest.raises(StorageFailed, match="cannot be written: nothing was stored") as raised:
        put(catalog, "acme", 2)
    assert errno.errorcode[code] in raised.value.detail
    assert not raised.value.outcome_unknown
    monkeypatch.undo()
    assert stored_files(folder) == {kept.file}
    assert put(catalog, "acme", 2).version == 2


@pytest.mark.parametrize("code", CODES, ids=[errno.errorcode[code] for code in CODES])
def test_a_lock_that_cannot_be_written_is_storage_failed(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", _failing(code, os.open, on="/writers/"))
        with pytest.raises(StorageFailed, match=r"writers/.* cannot be written: nothing was stored"):
            put(catalog, "acme", 1)
    assert stored_files(folder) == set()
    assert put(catalog, "acme", 1).version == 1


def test_a_service_whose_blobs_cannot_be_written_or_read_answers_503(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = serve(cache_bytes=2**20)
    client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", _failing(errno.EROFS))
        answer = client.put("/adapters/acme", json=as_upload(make_adapter(2)))
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed"), answer.text
        assert answer.headers["Retry-After"] == "1"
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", _failing(errno.EACCES, os.open, on="/blobs/"))
        for path in "/predict", "/predict?":
            answer = client.post(path, json=ROWS)
            assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed"), answer.text
            assert "EACCES" in answer.json()["detail"]
    assert client.post("/predict", json=ROWS).status_code == 200
    assert service.catalog.adapter("acme", tenant="default").versions == 1


def test_a_deletion_is_stored_although_its_blob_cannot_be_removed(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version = put(catalog, "acme", 1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", _failing(errno.EIO))
        catalog.delete("acme", tenant="default", purge=True)
    assert f"{version.file} cannot be removed" in caplog.text
    assert stored_files(folder) == {version.file}
    catalog.sweep()
    assert stored_files(folder) == referenced_files(folder) == set()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.timeout(30)
def test_what_is_no_file_in_place_of_a_blob_is_corrupt_and_repaired(
    catalog: Catalog, folder: Path, make: Callable[[Path], object]
) -> None:
    version = put(catalog, "acme", 1)
    path = folder / "blobs" / version.file
    path.unlink()
    make(path)
    with pytest.raises(BlobCorrupt):
        catalog.blobs.read(version.file, offset=version.offset, length=version.bytes)
    again = put(catalog, "acme", 1)
    assert (again.version, again.digest) == (version.version, version.digest)
    assert len(catalog.blobs.read(again.file, offset=again.offset, length=again.bytes)) == version.bytes


@pytest.mark.parametrize(
    ("code", "answered"),
    [(errno.EACCES, "storage_failed"), (errno.EIO, "storage_failed"), (errno.EMFILE, "too_many_open_files")],
)
def test_a_stored_file_that_cannot_be_read_now_is_not_replaced(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, code: int, answered: str
) -> None:
    client, service = serve()
    uploads: dict[str, dict[str, Any]] = {
        "/adapters/acme": {"json": as_upload(make_adapter(1))},
        "/datasets/rows": {"content": b"x\n1\n", "headers": {"Content-Type": "text/csv"}},
    }
    for path, body in uploads.items():
        client.put(path, **body).raise_for_status()
    folder = service.settings.data_dir
    stored = stored_files(folder)
    for path, body in uploads.items():
        with monkeypatch.context() as patched:
            for file in stored:
                patched.setattr(Path, "open", _failing(code, Path.open, on=file))
            answer = client.put(path, **body)
        assert (answer.status_code, answer.json()["code"]) == (503, answered), answer.text
        assert client.put(path, **body).status_code == 200
    assert quarantined_files(folder) == set()
    service.catalog.sweep()
    assert stored_files(folder) == stored
