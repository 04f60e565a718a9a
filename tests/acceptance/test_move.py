"""A data folder of an earlier commit moves to PostgreSQL and a bucket, where a service goes on with it."""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.test_data_folder import (
    ARCHIVE,
    TRAINED_ATOL,
    TRAINED_RTOL,
    OldFolder,
    assert_holds,
    assert_predicts,
)
from tests.support.object_server import ObjectServer, new_url, object_server
from tests.support.postgres_server import PostgresServer
from tests.support.service import LORAPLEX, ServiceProcess, environment, wait_for_job


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """The server; the variables of this process name it."""
    with object_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory: pytest.TempPathFactory) -> OldFolder:
    """Unpack the archive."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    recorded = json.loads((folder / "recorded.json").read_text())
    return OldFolder(folder / "data", folder / "base.safetensors", recorded)


@pytest.fixture(scope="module")
def moved(
    old_folder: OldFolder, s3: ObjectServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """Move the folder, and serve the copy with trainers."""
    assert s3.process.poll() is None
    database, blobs = postgres_server.new_database(), new_url()
    before = _digests(old_folder.path)
    command = [
        str(LORAPLEX),
        "migrate",
        "--to-database",
        database,
        "--to-blobs",
        blobs,
        "--data-dir",
        str(old_folder.path),
    ]
    for _ in range(2):
        subprocess.run(command, check=True, env=environment())
    assert _digests(old_folder.path) == before
    settings: dict[str, Any] = {"database_url": database, "blob_url": blobs}
    settings |= {"feature_space": old_folder.recorded["settings"]["feature_space"], "trainers": 1}
    with ServiceProcess(tmp_path_factory.mktemp("replica"), base=old_folder.base, **settings) as service:
        yield service.client


def _digests(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_the_copy_answers_what_the_earlier_code_answered(old_folder: OldFolder, moved: httpx.Client) -> None:
    # Jobs run meanwhile, and are compared when they have ended.
    for path, recorded in old_folder.recorded["answers"].items():
        if "/jobs" not in path and "/adapters?" not in path:
            assert_holds(moved.get(path).raise_for_status().json(), recorded, path)


def test_each_version_has_its_digest_and_its_numbers(old_folder: OldFolder, moved: httpx.Client) -> None:
    assert_predicts(moved, old_folder.recorded["predictions"], rtol=1e-5, atol=1e-6)


def test_queued_and_half_run_jobs_end_as_they_would_have(old_folder: OldFolder, moved: httpx.Client) -> None:
    for job in old_folder.recorded["jobs"].values():
        assert wait_for_job(moved, job["id"])["status"] == "succeeded"
    (line,) = moved.get(f"/jobs/{old_folder.recorded['jobs']['half']['id']}").json()["log"]
    assert "checkpoint" in line["text"]
    recorded = old_folder.recorded["predictions_after_jobs"]
    assert_predicts(moved, recorded, rtol=TRAINED_RTOL, atol=TRAINED_ATOL)


def test_a_deleted_name_goes_on_counting_its_versions(moved: httpx.Client) -> None:
    factors = {"A": [[1], [0], [0]], "B": [[1, 0, 0, 0, 0, 0]]}
    assert moved.put("/adapters/gone", json=factors).json()["version"] == 2
