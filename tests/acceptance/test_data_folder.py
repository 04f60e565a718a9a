"""Open a data folder that an earlier commit filled.

`data_folder.tar.xz` holds the folder, its base layer and what that commit's code answered. It was made by
`scripts/make_data_folder.py`. The archive is committed, because a shallow clone does not have the code of an earlier
commit to make it with.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.service import ServiceProcess, wait_for_job

ARCHIVE = Path(__file__).with_name("data_folder.tar.xz")
RTOL, ATOL = 1e-5, 1e-6
"""Sums in float32 differ in their last bits between processors."""
TRAINED_RTOL, TRAINED_ATOL = 2e-3, 1e-3
"""The same after thousands of steps of gradient descent."""
pytestmark = pytest.mark.slow
JOBS = ("half", "half-fleet", "exact", "gradient", "fleet", "update")


@dataclass(frozen=True, slots=True)
class OldFolder:
    """A folder of the earlier commit, and what its code recorded."""

    path: Path
    base: Path
    recorded: Mapping[str, Any]

    def serve(self, *, trainers: int) -> ServiceProcess:
        """Start the current code on the folder."""
        feature_space = self.recorded["settings"]["feature_space"]
        return ServiceProcess(self.path, base=self.base, feature_space=feature_space, trainers=trainers)


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory: pytest.TempPathFactory) -> OldFolder:
    """Unpack the archive."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    recorded = json.loads((folder / "recorded.json").read_text())
    return OldFolder(folder / "data", folder / "base.safetensors", recorded)


@pytest.fixture(scope="module")
def before(old_folder: OldFolder) -> Iterator[httpx.Client]:
    """Serve the folder without trainers: the jobs stay as they are."""
    with old_folder.serve(trainers=0) as service:
        yield service.client


@pytest.fixture(scope="module")
def finished(old_folder: OldFolder) -> Iterator[httpx.Client]:
    """Serve a second copy of the folder with trainers, until all its jobs have ended."""
    copy = OldFolder(old_folder.path.with_name("copy"), old_folder.base, old_folder.recorded)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(copy.path, filter="data")
    copy = OldFolder(copy.path / "data", copy.base, copy.recorded)
    with copy.serve(trainers=2) as service:
        for job in copy.recorded["jobs"].values():
            wait_for_job(service.client, job["id"])
        yield service.client


def assert_holds(answer: Any, recorded: Any, path: str) -> None:
    """Check that an answer has all that was recorded. It may have more members."""
    if isinstance(recorded, dict):
        assert isinstance(answer, dict), path
        for key, value in recorded.items():
            assert key in answer, f"{path}.{key}"
            assert_holds(answer[key], value, f"{path}.{key}")
    elif isinstance(recorded, list):
        assert isinstance(answer, list), path
        assert len(answer) == len(recorded), path
        for position, (one, other) in enumerate(zip(answer, recorded, strict=True)):
            assert_holds(one, other, f"{path}[{position}]")
    else:
        assert answer == recorded, path


def test_it_answers_what_the_earlier_code_answered(old_folder: OldFolder, before: httpx.Client) -> None:
    for path, recorded in old_folder.recorded["answers"].items():
        assert_holds(before.get(path).raise_for_status().json(), recorded, path)


def test_it_lists_the_same_adapters(old_folder: OldFolder, before: httpx.Client) -> None:
    names = [adapter["name"] for adapter in before.get("/adapters?limit=1000").json()["data"]]
    assert [name for name in names if not name.startswith("half-")] == old_folder.recorded["names"]


def test_each_version_predicts_the_same_numbers(old_folder: OldFolder, before: httpx.Client) -> None:
    assert_predicts(before, old_folder.recorded["predictions"], rtol=RTOL, atol=ATOL)


def test_a_deleted_name_goes_on_counting_its_versions(before: httpx.Client) -> None:
    assert before.get("/adapters/gone").status_code == 404
    factors = {"A": [[1], [0], [0]], "B": [[1, 0, 0, 0, 0, 0]]}
    assert before.put("/adapters/gone", json=factors).json()["version"] == 2


@pytest.mark.parametrize("kind", JOBS)
def test_a_queued_or_half_run_job_ends_as_it_would_have(
    old_folder: OldFolder, finished: httpx.Client, kind: str
) -> None:
    recorded = old_folder.recorded["jobs"][kind]
    job = finished.get(f"/jobs/{recorded['id']}").raise_for_status().json()
    assert (job["status"], job["attempt"]) == ("succeeded", recorded["attempt"]), job
    if recorded["result"] is None:
        assert_holds(job["metrics"], {key: recorded["metrics"][key] for key in ("published", "total")}, kind)
    else:
        assert (job["result"]["name"], job["result"]["version"]) == (
            recorded["result"]["name"],
            recorded["result"]["version"],
        )


def test_a_half_run_job_goes_on_from_its_checkpoint(old_folder: OldFolder, finished: httpx.Client) -> None:
    (line,) = finished.get(f"/jobs/{old_folder.recorded['jobs']['half']['id']}").json()["log"]
    assert "checkpoint" in line["text"]


def test_what_the_jobs_published_predicts_the_same_numbers(old_folder: OldFolder, finished: httpx.Client) -> None:
    recorded = old_folder.recorded["predictions_after_jobs"]
    assert_predicts(finished, recorded, rtol=TRAINED_RTOL, atol=TRAINED_ATOL)


def test_a_version_of_the_earlier_code_can_be_updated(old_folder: OldFolder, finished: httpx.Client) -> None:
    # Version 3 is that of the queued update; version 2 was published by the earlier code.
    finished.put("/adapters/exact/aliases/live", json={"version": 2}).raise_for_status()
    rows = {"inputs": np.eye(6).tolist(), "targets": np.ones((6, 3)).tolist()}
    answer = finished.post("/adapters/exact/update", json={"add": rows})
    assert answer.status_code == 202, answer.text
    job = wait_for_job(finished, answer.json()["id"])
    assert job["status"] == "succeeded", job
    earlier = old_folder.recorded["answers"]["/adapters/exact/versions/2"]
    updated = finished.get("/adapters/exact").json()["live"]
    assert (updated["version"], updated["lineage"]["parent"]) == (4, "exact@2")
    assert job["metrics"]["rows"] == earlier["metrics"]["rows"] + 6
    for setting in ("rank", "ridge", "method"):
        assert updated["lineage"]["spec"][setting] == earlier["lineage"]["spec"][setting]


def test_a_finished_fleet_can_be_reverted(old_folder: OldFolder, finished: httpx.Client) -> None:
    job_id = old_folder.recorded["jobs"]["fleet"]["id"]
    reverted = finished.post(f"/jobs/{job_id}/revert").raise_for_status().json()["reverted"]
    assert [adapter["name"] for adapter in reverted] == [f"queued-t{number}" for number in range(10)]


def assert_predicts(client: httpx.Client, recorded: list[dict[str, Any]], *, rtol: float, atol: float) -> None:
    """Check each recorded prediction: the version exactly, the numbers within the tolerance."""
    assert len(recorded) > 5
    for each in recorded:
        answer = client.post("/predict", json=each["request"]).raise_for_status().json()
        for key, value in each["answer"].items():
            if key in ("outputs", "probabilities"):
                np.testing.assert_allclose(answer[key], value, rtol=rtol, atol=atol, err_msg=str(each["request"]))
            elif key == "adapter" and value is not None:
                assert (answer[key]["name"], answer[key]["version"]) == (value["name"], value["version"])
            else:
                assert answer[key] == value
