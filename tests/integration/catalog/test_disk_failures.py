"""I/O errors under the catalogue: an error of our own that says whether anything was stored, and it is true."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.errors import LoraplexError, StorageFailed, TooManyOpenFiles
from adapters.storage.sqlite_database import SqliteDatabase
from tests.conftest import Serve
from tests.support.catalog_factories import as_upload, make_adapter, put, referenced_files, stored_files
from tests.support.failing_disk import SYNC, TRUNCATE, WRITE, FailingDisk
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

JOURNAL, CATALOG, ALL = "catalog.sqlite3-journal", "catalog.sqlite3", "*"
FULL, FAILED = "storage_full", "storage_failed"


class Fault(NamedTuple):
    """A system call that fails, and what is to be said of it."""

    call: str
    file: str
    error: int
    first: int
    times: int
    code: str
    is_unknown: bool


ALWAYS = 10**6
# A commit syncs the journal, syncs it again with its length, syncs the database, truncates the journal and syncs that.
FAULTS = {
    "the journal's first sync, on a full disk": Fault(SYNC, JOURNAL, errno.ENOSPC, 1, 1, FAILED, False),
    "the journal's first sync": Fault(SYNC, JOURNAL, errno.EIO, 1, 1, FAILED, False),
    "the journal's second sync": Fault(SYNC, JOURNAL, errno.EIO, 2, 1, FAILED, False),
    "every sync of the journal": Fault(SYNC, JOURNAL, errno.EIO, 1, ALWAYS, FAILED, False),
    "the database's sync": Fault(SYNC, CATALOG, errno.EIO, 1, 1, FAILED, False),
    "every sync of the database": Fault(SYNC, CATALOG, errno.EIO, 1, ALWAYS, FAILED, True),
    "the truncation of the journal": Fault(TRUNCATE, JOURNAL, errno.EIO, 1, 1, FAILED, False),
    "every truncation of the journal": Fault(TRUNCATE, JOURNAL, errno.EIO, 1, ALWAYS, FAILED, False),
    "every truncation, on a full disk": Fault(TRUNCATE, ALL, errno.ENOSPC, 1, ALWAYS, FULL, False),
    "the sync of the truncated journal": Fault(SYNC, JOURNAL, errno.EIO, 3, 1, FAILED, True),
    "the sync of the truncated journal, on a full disk": Fault(SYNC, JOURNAL, errno.ENOSPC, 3, ALWAYS, FAILED, True),
    "a write to the journal, on a full disk": Fault(WRITE, JOURNAL, errno.ENOSPC, 1, 1, FULL, False),
    "a write to the journal": Fault(WRITE, JOURNAL, errno.EIO, 1, 1, FAILED, False),
    "a write to the database, on a full disk": Fault(WRITE, CATALOG, errno.ENOSPC, 1, 1, FULL, False),
    "a write to the database": Fault(WRITE, CATALOG, errno.EIO, 2, 1, FAILED, False),
    "every write to the database": Fault(WRITE, CATALOG, errno.EIO, 1, ALWAYS, FAILED, False),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> FailingDisk:
    """The library, compiled once."""
    return FailingDisk(tmp_path_factory.mktemp("failing"))


class _Changes:
    """A process that makes changes on the failing disk, step by step, each in a fork of it."""

    def __init__(self, disk: FailingDisk) -> None:
        self.disk = disk
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.catalog.change_on_failing_disk"],
            env=os.environ | disk.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def begin(self, folder: Path, change: str) -> None:
        self._send(json.dumps([str(folder), change]))
        self._step()

    def go_on(self) -> dict[str, Any]:
        self._send("")
        return self._step()

    def end(self) -> None:
        self._send("")
        self._step()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _step(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture(scope="module")
def changes(disk: FailingDisk) -> Iterator[_Changes]:
    """The process, which has imported what it needs."""
    started = _Changes(disk)
    yield started
    started.close()


def _check(folder: Path, change: str, changes: _Changes, fault: Fault) -> None:
    changes.begin(folder, change)
    changes.disk.fail(fault.call, file=fault.file, error=fault.error, first=fault.first, count=fault.times)
    error = changes.go_on()["error"]
    changes.disk.heal()
    stored = changes.go_on()["stored"]
    changes.end()
    assert (error["code"], error.get("outcome")) == (fault.code, "unknown" if fault.is_unknown else None)
    assert ("it is unknown whether the change was stored" in error["detail"]) is fault.is_unknown
    assert ("nothing was stored" in error["detail"]) is not fault.is_unknown
    if not fault.is_unknown:
        assert not stored
        assert stored_files(folder) == referenced_files(folder)
    # Whatever became of it, no row refers to a file that is gone.
    assert referenced_files(folder) <= stored_files(folder)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_publish_that_the_disk_failed_says_truly_what_was_stored(
    tmp_path: Path, changes: _Changes, fault: Fault
) -> None:
    _check(tmp_path / "data", "publish", changes, fault)
    opened = Catalog(tmp_path / "data", now=lambda: 0.0)
    assert opened.adapter("acme", tenant="default").live is not None
    opened.sweep()
    assert stored_files(tmp_path / "data") == referenced_files(tmp_path / "data")
    opened.database.close()


def test_a_full_disk_that_shows_in_a_sync_is_storage_full(tmp_path: Path, changes: _Changes) -> None:
    _check(tmp_path / "data", "delete", changes, Fault(SYNC, ALL, errno.ENOSPC, 1, ALWAYS, FULL, False))


@pytest.mark.parametrize("name", ["the database's sync", "the sync of the truncated journal"])
@pytest.mark.parametrize("change", ["train", "add"])
def test_the_file_of_a_change_stays_unless_it_was_certainly_not_stored(
    tmp_path: Path, changes: _Changes, change: str, name: str
) -> None:
    _check(tmp_path / "data", change, changes, FAULTS[name])


def test_the_answer_says_that_the_disk_is_full_or_that_the_outcome_is_unknown(
    tmp_path: Path, disk: FailingDisk
) -> None:
    with ServiceProcess(tmp_path / "data", preload=disk.environment(), base="random:10,2,42", trainers=0) as service:
        client = service.client
        for seed in (1, 2):
            client.put("/adapters/acme", json=as_upload(make_adapter(seed))).raise_for_status()

        disk.fail(SYNC, file=ALL, error=errno.ENOSPC)
        full = client.put("/adapters/acme/aliases/live", json={"version": 1})
        assert (full.status_code, full.json()["code"]) == (507, "storage_full")
        assert "outcome" not in full.json()
        assert client.get("/adapters/acme").json()["aliases"] == {"live": 2}

        disk.fail(SYNC, file=JOURNAL, error=errno.EIO, first=3, count=1)
        unknown = client.put("/adapters/acme/aliases/live", json={"version": 1})
        assert (unknown.status_code, unknown.json()["code"]) == (503, "storage_failed")
        assert unknown.json()["outcome"] == "unknown"
        assert "Retry-After" not in unknown.headers

        disk.fail(SYNC, file=CATALOG, error=errno.EIO)
        assert client.put("/adapters/acme/aliases/live", json={"version": 2}).json()["outcome"] == "unknown"
        # The journal cannot be played back, and nobody can read past it.
        predict = {"adapter": "acme", "inputs": [[0.0] * 10]}
        for answer in (client.get("/adapters"), client.get("/readyz"), client.post("/predict", json=predict)):
            assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed")
            assert int(answer.headers["Retry-After"]) >= 1

        disk.heal()
        assert client.get("/readyz").status_code == 200
        assert client.post("/predict", json=predict).status_code == 200
        client.put("/adapters/acme/aliases/live", json={"version": 1}).raise_for_status()


@pytest.mark.parametrize("content", [b"", bytes(2**16), os.urandom(2**16)], ids=["empty", "zeros", "noise"])
def test_a_catalogue_that_is_overwritten_while_the_service_runs_is_storage_failed(serve: Serve, content: bytes) -> None:
    client, service = serve()
    client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
    rows = {"adapter": "acme", "inputs": [[0.0] * 10]}
    client.post("/predict", json=rows).raise_for_status()
    file = service.settings.data_dir / CATALOG
    good = file.read_bytes()
    file.write_bytes(content)
    for answer in (
        client.get("/adapters"),
        client.get("/jobs"),
        client.get("/readyz"),
        client.put("/adapters/acme", json=as_upload(make_adapter(2))),
        client.delete("/adapters/acme"),
        client.post("/predict", json=rows),
        client.post("/predict?", json=rows),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed"), answer.text
        assert "outcome" not in answer.json()
    file.write_bytes(good)
    assert client.post("/predict", json=rows).json()["adapter"]["version"] == 1
    assert client.put("/adapters/acme", json=as_upload(make_adapter(2))).json()["version"] == 2


@pytest.mark.parametrize("column", ["created_at", "metrics"])
def test_a_flipped_bit_in_the_name_of_a_column_is_storage_failed(catalog: Catalog, folder: Path, column: str) -> None:
    put(catalog, "acme")
    file = folder / CATALOG
    good = file.read_bytes()
    flipped = column[:-1] + chr(ord(column[-1]) ^ 1)
    file.write_bytes(good.replace(f"\t{column} ".encode(), f"\t{flipped} ".encode()))
    assert file.read_bytes() != good
    damaged = Catalog(folder, now=lambda: 1.0)
    with pytest.raises(StorageFailed, match="damaged"):
        damaged.versions("acme", tenant="default")
    with pytest.raises(StorageFailed, match="damaged"):
        put(damaged, "acme", seed=2)
    damaged.close()


def test_rows_and_indexes_that_contradict_each_other_are_storage_failed(catalog: Catalog, folder: Path) -> None:
    put(catalog, "acme")
    file = folder / CATALOG
    good, outcomes, kinds = file.read_bytes(), set(), set()
    # The name in each row and in each index, one at a time.
    for found in re.finditer(b"defaultacme", good):
        file.write_bytes(good[: found.end() - 1] + b"d" + good[found.end() :])
        damaged = Catalog(folder, now=lambda: 1.0)
        for read in (damaged.adapters, partial(damaged.adapter, "acme"), partial(damaged.versions, "acme")):
            try:
                read(tenant="default")
                outcomes.add("")
            except LoraplexError as error:
                outcomes.add(error.code)
        # What is raised because rows are missing is an error of the disk, if SQLite finds damage.
        with pytest.raises((StorageFailed, KeyError)) as raised, damaged.database.read():
            raise KeyError("acme")
        kinds.add(raised.type)
        damaged.close()
    assert outcomes <= {"", "adapter_not_found", "storage_failed"}
    assert StorageFailed in kinds
    file.write_bytes(good)
    with pytest.raises(KeyError), catalog.database.read():
        raise KeyError("acme")


def test_a_catalogue_that_became_read_only_is_storage_failed(catalog: Catalog, folder: Path) -> None:
    assert isinstance(catalog.database, SqliteDatabase)
    engine = catalog.database._engine
    sa.event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA query_only=1"))
    engine.dispose()
    with pytest.raises(StorageFailed, match="cannot be written: nothing was stored"):
        put(catalog, "acme")
    assert stored_files(folder) == set()


@pytest.fixture
def no_descriptors() -> Iterator[Callable[[], None]]:
    """Uses up the descriptors that this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used: list[int] = []

    def use_up() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with suppress(OSError):
            while True:
                used.append(os.open(os.devnull, os.O_RDONLY))

    yield use_up
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for descriptor in used:
        os.close(descriptor)


def test_a_process_without_descriptors_is_too_many_open_files(
    catalog: Catalog, no_descriptors: Callable[[], None]
) -> None:
    database = catalog.database
    move = "UPDATE catalog SET revision = revision + 1"
    with database.write() as connection:
        connection.exec_driver_sql(move)
    no_descriptors()
    with pytest.raises(TooManyOpenFiles, match="nothing was stored"), database.write() as connection:
        connection.exec_driver_sql(move)
    with database.read(), pytest.raises(TooManyOpenFiles):
        catalog.adapters(tenant="default")
