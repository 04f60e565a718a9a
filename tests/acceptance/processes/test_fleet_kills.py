"""A fleet whose fit, and then whose trainer, is killed in the middle: it goes on, and nothing is published twice."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.catalog_factories import referenced_files, stored_files
from tests.support.long_jobs import versions
from tests.support.process_tree import FIT, LEASE_SECONDS, TRAINER, another, the
from tests.support.service import ServiceProcess, eventually, wait_for_job

pytestmark = pytest.mark.slow

_GROUPS = 20
"""Of sizes so different that most are a batch of their own."""


_STOPPING = {"patience": 1000, "evaluate_every": 10}


def _submit(client: httpx.Client, name: str) -> str:
    generator = np.random.default_rng(7)
    groups = generator.permutation(np.repeat(np.arange(_GROUPS), 16 * np.arange(1, _GROUPS + 1)))
    data = {
        side: generator.normal(size=(len(groups), width)).round(3) for side, width in (("inputs", 5), ("targets", 3))
    }
    body = {
        "name": f"{name}-{{group}}",
        "rank": 2,
        "data": {side: rows.tolist() for side, rows in data.items()} | {"groups": groups.tolist()},
        "split": {"by": "rows", "fraction": 0.25},
        "training": {"method": "adamw", "epochs": 1200, "batch_size": None, "early_stopping": _STOPPING},
    }
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def _published(client: httpx.Client, job_id: str) -> dict[str, Any]:
    query: dict[str, Any] = {"status": "published", "limit": 1000}
    page = client.get(f"/jobs/{job_id}/adapters", params=query).raise_for_status().json()
    return {each["group"]: (each["version"], each["digest"]) for each in page["data"]}


def _wait_for_more(client: httpx.Client, job_id: str, than: int) -> dict[str, Any]:
    return dict(
        eventually(lambda: len(found := _published(client, job_id)) > than and found, what=f"more than {than} adapters")
    )


def test_a_killed_fleet_goes_on_where_it_was_and_publishes_nothing_twice(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"base": "random:5,3,1", "lease_seconds": LEASE_SECONDS}
    with ServiceProcess(tmp_path / "data", **settings) as service:
        client, leader = service.client, service.process.pid
        calm = _submit(client, "calm")
        assert wait_for_job(client, calm)["attempt"] == 1
        job_id = _submit(client, "killed")

        first = _wait_for_more(client, job_id, 0)
        fit, trainer = the(leader, FIT), the(leader, TRAINER)
        fit.kill()
        # What the fit has sent is still published: a second kill before the next attempt would be of the same one.
        eventually(lambda: client.get(f"/jobs/{job_id}").json()["attempt"] == 2, what="another attempt")
        second = _wait_for_more(client, job_id, len(_published(client, job_id)))
        trainer.kill()
        another(leader, TRAINER, than=trainer)
        before = _published(client, job_id)
        job = wait_for_job(client, job_id)
        published = _published(client, job_id)

        assert (job["status"], job["attempt"]) == ("succeeded", 3)
        assert job["metrics"] == {"published": _GROUPS, "failed": 0, "total": _GROUPS}
        assert first.items() <= second.items() <= before.items() <= published.items()
        assert len(before) < _GROUPS
        # The same bytes as undisturbed, and one version each.
        assert published == _published(client, calm)
        assert [versions(client, f"killed-{group}") for group in range(_GROUPS)] == [[1]] * _GROUPS
        eventually(lambda: stored_files(service.data_dir) == referenced_files(service.data_dir), what="the removal")


_TENANTS = 300


def _submit_auto(client: httpx.Client, name: str) -> str:
    body = {
        "name": f"{name}-{{tenant}}",
        "data": {"dataset": "rows", "inputs": {"prefix": "x"}, "targets": {"column": "y"}, "group_by": "tenant"},
        "fleet_prior": f"{name}-prior",
    }
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def _outcomes(client: httpx.Client, job_id: str) -> dict[str, Any]:
    page = client.get(f"/jobs/{job_id}/adapters", params={"limit": 1000}).raise_for_status().json()
    members = ("version", "digest", "evaluation", "decision", "auto")
    return {adapter["group"]: [adapter[member] for member in members] for adapter in page["data"]}


def test_a_killed_fleet_of_auto_decides_as_one_that_was_not(tmp_path: Path) -> None:
    """The trainer and then every process at once are killed in the middle: two deaths, so the third attempt ends it."""
    generator = np.random.default_rng(11)
    weight_OI = generator.normal(size=(4, 8))
    tenants = np.repeat(np.arange(_TENANTS), 12)
    x = generator.normal(size=(len(tenants), 8))
    targets = ((x @ weight_OI.T).argmax(1) + tenants % 2) % 4
    lines = [
        json.dumps({f"x{at}": value for at, value in enumerate(row)} | {"y": int(y), "tenant": f"t{tenant}"})
        for row, y, tenant in zip(x.round(4), targets, tenants, strict=True)
    ]
    settings: dict[str, Any] = {"base": "random:8,4,1", "lease_seconds": LEASE_SECONDS}
    with ServiceProcess(tmp_path / "data", **settings) as service:
        client, leader = service.client, service.process.pid
        json_lines = {"Content-Type": "application/x-ndjson"}
        client.put("/datasets/rows", content="\n".join(lines), headers=json_lines).raise_for_status()
        calm = _submit_auto(client, "calm")
        assert wait_for_job(client, calm)["attempt"] == 1
        expected = _outcomes(client, calm)
        summary = client.get(f"/jobs/{calm}").json()["summary"]
        job_id = _submit_auto(client, "killed")
        first = _wait_for_more(client, job_id, 0)
        the(leader, TRAINER).kill()
        eventually(lambda: client.get(f"/jobs/{job_id}").json()["attempt"] == 2, what="another attempt")
        service.kill_group()
    with ServiceProcess(tmp_path / "data", **settings) as service:
        client = service.client
        before = _published(client, job_id)
        assert len(before) < _TENANTS
        job = wait_for_job(client, job_id)
        assert (job["status"], job["attempt"], job["summary"]) == ("succeeded", 3, summary)
        assert first.items() <= before.items() <= _published(client, job_id).items()
        assert _outcomes(client, job_id) == expected
        assert {tuple(versions(client, f"killed-t{tenant}")) for tenant in range(_TENANTS)} == {(1,)}
        live = [client.get(f"/adapters/{name}-prior").json()["live"]["digest"] for name in ("calm", "killed")]
        assert live[0] == live[1]
        eventually(lambda: stored_files(service.data_dir) == referenced_files(service.data_dir), what="the removal")
