"""Trainings of every kind, long enough to be killed on their way, and what each ends in when nothing happens to it."""

# N rows · I in_features · O out_features
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.acceptance.crash.oracle import IN, OUT
from tests.support.databases import rows_of
from tests.support.service import wait_for_job

Digests = Mapping[str | None, str]
"""Of each group of a fleet; under None where the job trains one adapter."""
GOES_ON = "continues from the checkpoint at step"
_ROWS, _GROUPS, _ROWS_A_GROUP = 240, 600, 5
_SPLIT = {"by": "rows", "fraction": 0.25}
_STOPPING = {"patience": 1000, "evaluate_every": 20}
_TRAININGS: dict[str, dict[str, Any]] = {
    "stopping": {"method": "adamw", "batch_size": 16, "epochs": 1000, "early_stopping": _STOPPING},
    "momentum": {"method": "sgd", "momentum": 0.9, "batch_size": 32, "epochs": 1000, "learning_rate": 1e-3},
    "whole": {"method": "adamw", "batch_size": None, "epochs": 8000, "schedule": "cosine", "bias": True},
    "tried": {"method": "adamw", "batch_size": 16, "epochs": 500, "learning_rate": "auto"},
    "exact": {"method": "closed_form", "ridge": 0.5},
    "fleet": {"method": "adamw", "batch_size": 2, "epochs": 100},
    "fleet-exact": {"method": "closed_form", "ridge": 0.5},
}
KINDS = tuple(_TRAININGS)


@cache
def _rows(rows: int) -> dict[str, Any]:
    generator = np.random.default_rng(rows)
    x_NI, y_NO = generator.normal(size=(rows, IN)), generator.normal(size=(rows, OUT))
    return {"inputs": x_NI.round(4).tolist(), "targets": y_NO.round(4).tolist()}


def submit(client: httpx.Client, kind: str, name: str) -> str:
    """Queue a job of this kind under this name, of a fleet one that begins with it; returns its id."""
    body: dict[str, Any] = {"name": name, "rank": 2, "data": _rows(_ROWS), "training": _TRAININGS[kind]}
    if kind.startswith("fleet"):
        groups = [number % _GROUPS for number in range(_GROUPS * _ROWS_A_GROUP)]
        body |= {"name": f"{name}-{{group}}", "data": {**_rows(len(groups)), "groups": groups}}
    if kind in ("stopping", "tried"):
        body["split"] = _SPLIT
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def undisturbed(client: httpx.Client) -> dict[str, Digests]:
    """What each kind ends in."""
    digests = {}
    for kind in KINDS:
        job = _run_in_one_attempt(client, kind)
        digests[kind] = published(client, job)
        assert len(digests[kind]) == (_GROUPS if kind.startswith("fleet") else 1)
    return digests


def _run_in_one_attempt(client: httpx.Client, kind: str) -> Mapping[str, Any]:
    """Train until nothing has disturbed a training: on a busy machine its short lease can run out."""
    for turn in range(5):
        job = wait_for_job(client, submit(client, kind, f"calm-{turn}-{kind}"))
        assert job["status"] == "succeeded", job["error"]
        if job["attempt"] == 1:
            return job
    raise AssertionError(f"no training of the kind {kind} ended in its first attempt")


def published(client: httpx.Client, job: Mapping[str, Any]) -> Digests:
    """What a job says that it has published."""
    if job["result"] is not None:
        return {None: job["result"]["digest"]}
    pages = client.get(f"/jobs/{job['id']}/adapters", params={"status": "published", "limit": 1000})
    return {each["group"]: each["digest"] for each in pages.raise_for_status().json()["data"]}


def check_versions(folder: Path, jobs: Mapping[str, Digests]) -> None:
    """The catalogue has exactly these versions of these jobs: none publishes twice, and none in another's name."""
    rows = rows_of(folder, "SELECT job, version, digest FROM versions")
    found: dict[str, Counter[str]] = {job_id: Counter() for job_id in jobs}
    for job_id, version, digest in rows:
        if job_id in found:
            # Each job has names of its own: a second version would be a second publish.
            assert version == 1, job_id
            found[job_id][digest] += 1
    assert found == {job_id: Counter(digests.values()) for job_id, digests in jobs.items()}


def times_gone_on(job: Mapping[str, Any]) -> int:
    """How many attempts of a job began at a checkpoint."""
    return sum(GOES_ON in line["text"] for line in job["log"])
