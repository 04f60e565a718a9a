"""What must hold on a data folder after each crash, and once every job has ended."""

import hashlib
import io
import json
import zipfile
from collections.abc import Collection
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load

from tests.acceptance.crash.ledger import Ledger, State, Uploaded
from tests.acceptance.crash.load import check_answers, look_at
from tests.support.catalog_factories import referenced_files, stored_bytes, stored_files
from tests.support.databases import database_url, rows_of
from tests.support.service import ServiceProcess, eventually


def check_after_restart(service: ServiceProcess, ledger: Ledger) -> None:
    """Nothing that was acknowledged is lost, nothing is torn, nothing lies around."""
    _check_files(service)
    for group in ledger.uploaded:
        for mine in group:
            _settle(service.client, ledger, mine)
            if mine.state.versions:
                _check_served(service.client, ledger, mine)
    for job_id in ledger.jobs:
        look_at(service.client, ledger, job_id)
    for names in ledger.trained:
        for name in names:
            for version in _versions(service.client, name):
                ledger.see(version)
                assert check_answers(service.client, ledger, [f"{name}@{version['version']}"])


def check_at_the_end(service: ServiceProcess, ledger: Ledger, *, failures: Collection[str] = ()) -> None:
    """Every job ends, acknowledged or not, and published what it says it did, once.

    `failures` are codes with which jobs may fail, besides those of trainers that died and adapters that are gone.
    """

    def all_jobs() -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = []
        query: dict[str, str] = {"limit": "1000"}
        while True:
            page = service.client.get("/jobs", params=query).raise_for_status().json()
            jobs += page["data"]
            if page["next_cursor"] is None:
                return jobs
            query["cursor"] = page["next_cursor"]

    def all_ended() -> list[dict[str, Any]] | None:
        jobs = all_jobs()
        return jobs if all(job["status"] not in ("queued", "running") for job in jobs) else None

    jobs = eventually(all_ended, seconds=180, what="the end of every job")
    assert len(ledger.jobs) <= len(jobs) <= ledger.counts["jobs sent"]
    check_after_restart(service, ledger)
    published = {
        version["job"]: version
        for names in ledger.trained
        for name in names
        for version in _versions(service.client, name)
    }
    for job in jobs:
        _check_ended(job, ledger, published.get(job["id"]), failures)
        ledger.count(f"jobs {job['status']}" + (f": {job['error']['code']}" if job["error"] else ""))


def _check_files(service: ServiceProcess) -> None:
    # Jobs run already, and a blob is there a moment before its row: what a crash left would stay.
    eventually(
        lambda: stored_files(service.data_dir) <= referenced_files(service.data_dir),
        what="the removal of what nobody refers to",
    )
    if database_url(service.data_dir) is None:
        assert rows_of(service.data_dir, "PRAGMA integrity_check") == [("ok",)]
    rows = rows_of(service.data_dir, 'SELECT adapter, version, digest, file, "offset", bytes FROM versions')
    for name, version, digest, file, offset, length in rows:
        content = stored_bytes(service.data_dir, file)[offset : offset + length]
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest, f"{name}@{version} is torn"


def _settle(client: httpx.Client, ledger: Ledger, mine: Uploaded) -> None:
    """The old state or the new one, and from here on it is certain which."""
    seen = state_of(client, ledger, mine.name)
    candidates = [mine.state] if mine.in_flight is None else [mine.state, mine.in_flight]
    matching = [state for state in candidates if (dict(state.versions), state.live) == seen]
    assert matching, f"{mine.name} is {seen}, which is none of {candidates}"
    ledger.count("calls in flight done" if matching[-1] is mine.in_flight else "states kept")
    mine.state, mine.in_flight = matching[-1], None


def state_of(client: httpx.Client, ledger: Ledger, name: str) -> tuple[dict[int, str], int | None]:
    """The digests of the versions by number, and the live version."""
    answered = client.get(f"/adapters/{name}")
    if answered.status_code == 404:
        assert answered.json()["code"] == "adapter_not_found"
        return {}, None
    versions = _versions(client, name)
    for version in versions:
        ledger.see(version)
    adapter = answered.json()
    assert adapter["versions"] == len(versions)
    live: int = adapter["aliases"]["live"]
    assert adapter["live"] == next(version for version in versions if version["version"] == live)
    return {version["version"]: version["digest"] for version in versions}, live


def _versions(client: httpx.Client, name: str) -> list[dict[str, Any]]:
    answered = client.get(f"/adapters/{name}/versions", params={"limit": 1000})
    versions: list[dict[str, Any]] = [] if answered.status_code == 404 else answered.raise_for_status().json()["data"]
    return versions


def _check_served(client: httpx.Client, ledger: Ledger, mine: Uploaded) -> None:
    """Every version answers as the dense layer does; the live one is downloaded, and is what was uploaded."""
    state: State = mine.state
    assert state.live is not None
    references = [mine.name, *(f"{mine.name}@{number}" for number in state.versions)]
    served = check_answers(client, ledger, references)
    assert {version["version"]: version["digest"] for version in served} == dict(state.versions)
    upload = ledger.upload(state.versions[state.live])
    with zipfile.ZipFile(io.BytesIO(client.get(f"/adapters/{mine.name}/download").content)) as archive:
        config = json.loads(archive.read("adapter_config.json"))
        tensors = load(archive.read("adapter_model.safetensors"))
    assert (config["r"], config["lora_alpha"]) == (upload.b_RI.shape[0], upload.alpha)
    by_side = {"A" if ".lora_A." in key else "B": tensor for key, tensor in tensors.items()}
    # PEFT's names are the other way round.
    np.testing.assert_array_equal(by_side["B"], upload.a_OR)
    np.testing.assert_array_equal(by_side["A"], upload.b_RI)


def _check_ended(
    job: dict[str, Any], ledger: Ledger, version: dict[str, Any] | None, failures: Collection[str]
) -> None:
    known = ledger.jobs.get(job["id"])
    status, who = job["status"], f"job {job['id']}: {job['status']}, {job['error']}"
    if known is not None:
        assert known.cancelled is None or (status == "cancelled") == known.cancelled, who
    if status == "succeeded":
        place = (job["result"]["name"], job["result"]["version"], job["result"]["digest"])
        if version is not None:
            assert (version["adapter"], version["version"], version["digest"]) == place, who
        # An acknowledged deletion took it along; otherwise it is there.
        if known is not None and known.deleted is not None:
            assert (version is None) == known.deleted, who
    else:
        assert version is None, who
    if status == "failed":
        assert job["error"]["code"] in ("worker_died", "adapter_deleted", *failures), who
        assert job["error"]["code"] != "worker_died" or job["attempt"] == 3, who
        assert job["error"]["code"] != "adapter_deleted" or known is None or known.deleted in (True, None), who
