"""Processes on PostgreSQL and a bucket keep nothing in their data folder that another machine would miss."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.support.catalog_factories import as_upload, make_adapter, quarantined_files, stored_files
from tests.support.databases import open_catalog, place_bucket, place_database, rows_of
from tests.support.object_server import ObjectServer, new_url
from tests.support.postgres_server import PostgresServer
from tests.support.service import ServiceProcess, eventually, train, wait_for_job

pytestmark = pytest.mark.slow

BASE = "random:10,2,42"
ROWS = [[round(0.1 * (row + column), 3) for column in range(10)] for row in range(40)]
TARGETS = [[sum(row), row[0] - row[9]] for row in ROWS]
TABLE = "\n".join([",".join(f"x{n}" for n in range(10)), *(",".join(map(str, row)) for row in ROWS)])
FITS = {"method": "closed_form"}
# Caches and files of processes. What is lost with one of them is nothing that was acknowledged.
LOCAL = {"blob-cache", "checkpoints", "metrics", "migrate.lock", "rates", "running", "store-id", "sweep.lock", "tmp"}


@pytest.fixture
def storage(postgres_server: PostgresServer, s3: ObjectServer) -> dict[str, str]:
    """The settings that name an empty store."""
    return {"database_url": postgres_server.new_database(), "blob_url": new_url()}


def _machine(folder: Path, storage: dict[str, str], **settings: Any) -> ServiceProcess:
    return ServiceProcess(folder, base=BASE, **{"workers": 2, "trainers": 1, "lease_seconds": 2} | storage | settings)


def _fill(client: httpx.Client) -> str:
    """Upload, train, roll back and delete; return the id of a fleet's job."""
    for seed in (1, 2):
        client.put("/adapters/rolled-back", json=as_upload(make_adapter(seed))).raise_for_status()
    client.put("/adapters/rolled-back/aliases/live", json={"version": 1}).raise_for_status()
    client.put("/adapters/deleted", json=as_upload(make_adapter(3))).raise_for_status()
    client.delete("/adapters/deleted").raise_for_status()
    client.put("/datasets/rows", content=TABLE, headers={"Content-Type": "text/csv"}).raise_for_status()
    data: dict[str, Any] = {"inputs": ROWS, "targets": TARGETS}
    job = train(client, name="trained", data=data, rank=2, training={**FITS, "keep_statistics": True})
    assert job["status"] == "succeeded", job
    data["groups"] = [f"g{number % 8}" for number in range(len(ROWS))]
    fleet = train(client, name="{group}", data=data, rank=1, training=FITS)
    assert (fleet["status"], fleet["attempt"]) == ("succeeded", 1), fleet
    return str(fleet["id"])


def _state(client: httpx.Client, fleet: str) -> dict[str, Any]:
    """Everything that was acknowledged, and what the adapters answer."""
    paths = ("/adapters", "/adapters/rolled-back/versions", "/jobs", f"/jobs/{fleet}/adapters", "/datasets")
    state = {path: client.get(path).raise_for_status().json()["data"] for path in (*paths, "/audit")}
    names = ["rolled-back", "rolled-back@2", "trained", *(f"g{number}" for number in range(8)), None]
    request = {"adapters": names, "inputs": ROWS[: len(names)]}
    state["predict"] = client.post("/predict", json=request).raise_for_status().json()
    state["preview"] = client.get("/datasets/rows/preview?limit=3").raise_for_status().json()
    state["download"] = client.get("/adapters/trained/download").raise_for_status().content
    return state


def test_a_machine_with_an_empty_folder_goes_on_where_another_was_killed(
    tmp_path: Path, storage: dict[str, str]
) -> None:
    with _machine(tmp_path / "first", storage) as first:
        fleet = _fill(first.client)
        before = _state(first.client, fleet)
        names = {path.name for path in (tmp_path / "first").iterdir()}
        assert names <= LOCAL, names
        first.kill_group()
    with _machine(tmp_path / "second", storage) as second:
        client = second.client
        assert _state(client, fleet) == before
        assert client.get("/adapters/deleted").status_code == 404
        client.post("/adapters/deleted/restore").raise_for_status()
        assert client.get("/adapters/deleted").json()["live"]["digest"] == make_adapter(3).digest
        updated = client.post("/adapters/trained/update", json={"add": {"inputs": ROWS[:9], "targets": TARGETS[:9]}})
        assert updated.status_code == 202, updated.text
        assert wait_for_job(client, updated.json()["id"])["status"] == "succeeded"
        assert client.put("/adapters/rolled-back", json=as_upload(make_adapter(4))).json()["version"] == 3


@contextmanager
def _writer(folder: Path, storage: dict[str, str]) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """A process of another machine that is about to publish, and the name of the blob that it has written."""
    arguments = [str(folder), storage["database_url"], storage["blob_url"]]
    command = [sys.executable, "-m", "tests.acceptance.cluster.slow_writer", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def _end(process: "subprocess.Popen[str]") -> str:
    """Let a writer go on; return what it prints."""
    output, _ = process.communicate("\n")
    return output.strip()


@pytest.fixture
def here(tmp_path: Path, storage: dict[str, str]) -> Path:
    """The data folder of this machine."""
    place_database(tmp_path / "here", storage["database_url"])
    place_bucket(tmp_path / "here", storage["blob_url"])
    return tmp_path / "here"


def test_a_sweep_takes_the_blob_of_a_dead_machine_and_never_that_of_a_live_one(
    tmp_path: Path, storage: dict[str, str], here: Path
) -> None:
    catalog = open_catalog(here, now=time.time)
    with _writer(tmp_path / "there", storage) as (process, name):
        assert stored_files(here) == {name}
        assert catalog.sweep() == 0
        process.send_signal(signal.SIGSTOP)
        assert catalog.sweep() == 0
        process.send_signal(signal.SIGCONT)
        assert _end(process) == "1"
    assert catalog.sweep() == 0
    kept = stored_files(here)
    with _writer(tmp_path / "there", storage) as (process, name):
        assert stored_files(here) == kept | {name}
        process.kill()
        process.wait()
        eventually(catalog.sweep, what="the removal of the blob")
    assert stored_files(here) == kept
    assert quarantined_files(here) == {name}
    assert list(rows_of(here, "SELECT adapter, version FROM versions")) == [("slow", 1)]
    catalog.close()


def test_a_writer_that_has_lost_its_connection_publishes_no_blob_that_a_sweep_took(
    tmp_path: Path, storage: dict[str, str], here: Path
) -> None:
    catalog = open_catalog(here, now=time.time)
    with _writer(tmp_path / "there", storage) as (process, name):
        with psycopg.connect(storage["database_url"].replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
        eventually(catalog.sweep, what="the removal of the blob")
        assert quarantined_files(here) == {name}
        assert _end(process) == "CatalogBusy"
    assert rows_of(here, "SELECT adapter FROM versions") == []
    assert stored_files(here) == set()
    catalog.close()
