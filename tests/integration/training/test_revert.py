"""A job's adapters, and taking back what it published."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.catalog.versions import Published
from adapters.jobs.job import Job
from adapters.jobs.revert import SkipReason
from app.service import Service
from tests.conftest import Serve
from tests.support.catalog_factories import (
    as_upload,
    claimed,
    finish,
    make_adapter,
    publish_for,
    put,
    submit,
    submit_fleet,
    training_job,
)

TRAINING = training_job(rank=1)
FLEET = ["kept", "moved", "gone", "again", "unlive", "failed", "new"]
ROWS = [[1.0] * 10]


@pytest.fixture
def both(serve: Serve) -> tuple[httpx.Client, Service]:
    """A client and the service behind it, without a trainer: the tests are it."""
    return serve()


def _fleet(service: Service, names: list[str] = FLEET) -> Job:
    submit_fleet(service.queue, names, training=TRAINING)
    return claimed(service.queue)


def _publish(service: Service, claim: Job, names: list[str], **fields: Any) -> list[Published]:
    trained = [one for one in service.queue.waiting(claim) if one.name in names]
    return publish_for(service.catalog, service.queue, claim, trained, **fields)


def _revert(client: httpx.Client) -> dict[str, Any]:
    body: dict[str, Any] = client.post("/jobs/j/revert").raise_for_status().json()
    return body


def _live(client: httpx.Client, name: str) -> int | None:
    aliases: dict[str, int] = client.get(f"/adapters/{name}").raise_for_status().json()["aliases"]
    return aliases.get("live")


def test_a_revert_moves_back_what_it_can_and_says_why_of_the_rest(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    for name in FLEET[:-1]:
        put(service.catalog, name, 100)
    claim = _fleet(service)
    _publish(service, claim, ["kept", "moved", "gone", "again", "new"])
    _publish(service, claim, ["unlive"], moves_live=False)
    service.queue.fail_adapters(claim, [(5, {"code": "diverged"})])
    service.queue.succeed(claim, result=None, progress={}, metrics={}, history=[])
    put(service.catalog, "moved", 200)
    service.catalog.delete("gone", tenant="default")
    service.catalog.delete("again", tenant="default")
    put(service.catalog, "again", 300)
    revision = service.catalog.revision()

    said = _revert(client)
    assert said["reverted"] == [{"name": "kept", "from": 2, "to": 1}, {"name": "new", "from": 1, "to": None}]
    assert [(one["name"], one["version"], one["reason"]) for one in said["skipped"]] == [
        ("moved", 2, "live_moved"),
        ("gone", 2, "adapter_deleted"),
        ("again", 2, "adapter_deleted"),
        ("unlive", 2, "never_live"),
        ("failed", None, "not_published"),
    ]
    assert all(one["name"] in one["detail"] for one in said["skipped"])
    assert "it is 3" in said["skipped"][0]["detail"]
    assert service.catalog.revision() == revision + 1
    assert {name: _live(client, name) for name in ("kept", "moved", "again", "unlive", "failed", "new")} == {
        "kept": 1,
        "moved": 3,
        "again": 3,
        "unlive": 1,
        "failed": 1,
        "new": None,
    }


def test_what_was_reverted_is_what_the_next_request_gets(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    put(service.catalog, "old", 100)
    claim = _fleet(service, ["old", "new"])
    _publish(service, claim, ["old", "new"])
    service.queue.cancel("j", tenant="default")
    ask = [{"adapter": name, "inputs": ROWS} for name in ("old", "new", "old@2")]
    assert client.post("/predict", json=ask[0]).json()["adapter"]["version"] == 2
    _revert(client)
    old, new, still = (client.post("/predict", json=question) for question in ask)
    assert old.json()["adapter"] == {"name": "old", "version": 1, "digest": make_adapter(100).digest}
    assert (new.status_code, new.json()["code"]) == (404, "adapter_not_live")
    assert still.json()["adapter"]["version"] == 2  # a version is never taken away


def test_a_second_revert_moves_nothing(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    put(service.catalog, "a", 100)
    _publish(service, _fleet(service, ["a", "b"]), ["a", "b"])
    service.queue.cancel("j", tenant="default")
    assert len(_revert(client)["reverted"]) == 2
    revision = service.catalog.revision()
    again = _revert(client)
    assert again["reverted"] == []
    assert [(one["name"], one["reason"]) for one in again["skipped"]] == [("a", "live_moved"), ("b", "live_moved")]
    assert "nothing is live" in again["skipped"][1]["detail"]
    assert service.catalog.revision() == revision
    assert (_live(client, "a"), _live(client, "b")) == (1, None)


def test_jobs_are_reverted_one_after_the_other(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    for job_id in ("first", "second"):
        submit(service.queue, job_id, training=TRAINING)
        finish(service.catalog, service.queue, claimed(service.queue))
    done = [client.post(f"/jobs/{job_id}/revert").json()["reverted"] for job_id in ("second", "first")]
    assert done == [[{"name": "acme", "from": 2, "to": 1}], [{"name": "acme", "from": 1, "to": None}]]


def test_a_job_that_has_not_ended_is_not_reverted(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    submit(service.queue, training=TRAINING)
    queued = client.post("/jobs/j/revert")
    claim = claimed(service.queue)
    running = client.post("/jobs/j/revert")
    for answer in (queued, running):
        assert (answer.status_code, answer.json()["code"]) == (409, "job_not_ended")
    finish(service.catalog, service.queue, claim)
    assert client.post("/jobs/j/revert").status_code == 200


def test_a_job_lists_its_adapters_with_what_became_of_them(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    client.put("/adapters/b", json=as_upload(make_adapter(5))).raise_for_status()
    claim = _fleet(service, ["a", "b", "c"])
    _, b = _publish(service, claim, ["a", "b"], metrics={"train_loss": 0.5})
    service.queue.fail_adapters(claim, [(2, {"code": "diverged", "detail": "no"})])
    listed = client.get("/jobs/j/adapters").raise_for_status().json()
    assert listed["next_cursor"] is None
    assert listed["data"][1] == {
        "name": "b",
        "group": "b",
        "rows": 1,
        "version": 2,
        "digest": b.version.digest,
        "metrics": {"train_loss": 0.5},
        "error": None,
        "moved_live": True,
        "replaced": 1,
        **dict.fromkeys(("outcome", "gain", "evaluation", "decision", "auto")),
        "warnings": [],
    }
    failed = listed["data"][2]
    assert (failed["name"], failed["version"], failed["error"]) == ("c", None, {"code": "diverged", "detail": "no"})


def _pages(client: httpx.Client, **query: Any) -> list[str]:
    """Names on all pages of a job's adapters, two to a page."""
    names: list[str] = []
    while True:
        page = client.get("/jobs/j/adapters", params={"limit": 2, **query}).raise_for_status().json()
        names += [one["name"] for one in page["data"]]
        assert len(page["data"]) <= 2
        if page["next_cursor"] is None:
            return names
        query["cursor"] = page["next_cursor"]


def test_a_fleet_is_listed_by_outcome_and_gain_and_has_a_summary(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    gains = {"f": 0.1, "e": -0.2, "d": None, "c": 0.1, "b": 0.0}
    submit_fleet(service.queue, [*gains, "a"], training=replace(TRAINING, is_fleet=True))
    claim = claimed(service.queue)
    outcomes = {"f": "better", "e": "worse", "d": None, "c": "better", "b": "same"}
    decisions = [{"outcome": outcomes[name], "gain": gain, "moved": True} for name, gain in gains.items()]
    reports = {position: {"decision": decision} for position, decision in enumerate(decisions)}
    _publish(service, claim, list(gains), reports=reports, moves_live=True)
    service.queue.fail_adapters(claim, [(5, {"code": "diverged"})])
    assert _pages(client, sort="gain") == ["e", "b", "f", "c", "d", "a"]
    assert _pages(client, sort="name") == ["a", "b", "c", "d", "e", "f"]
    assert _pages(client, sort="gain", outcome="better") == ["f", "c"]
    assert (_pages(client, outcome="worse"), _pages(client, outcome="failed")) == (["e"], ["a"])
    assert _pages(client, outcome="same", status="published") == ["b"]
    summary = {"better": 2, "same": 1, "worse": 1, "failed": 1, "moved": 5}
    assert client.get("/jobs/j").json()["summary"] == summary
    service.queue.cancel("j", tenant="default")
    assert client.get("/jobs/j").json()["summary"] == client.get("/jobs").json()["data"][0]["summary"] == summary


def test_a_jobs_adapters_are_paged_and_chosen_by_what_became_of_them(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    names = [f"t-{number}" for number in range(7)]
    claim = _fleet(service, names)
    _publish(service, claim, names[:4])
    service.queue.fail_adapters(claim, [(4, {"code": "diverged"})])
    for status, wanted in ((None, names), ("published", names[:4]), ("failed", names[4:5]), ("waiting", names[5:])):
        query: dict[str, Any] = {"limit": 3} | ({} if status is None else {"status": status})
        found = []
        while True:
            page = client.get("/jobs/j/adapters", params=query).raise_for_status().json()
            found += [one["name"] for one in page["data"]]
            assert len(page["data"]) <= 3
            if page["next_cursor"] is None:
                break
            query["cursor"] = page["next_cursor"]
        assert found == wanted
    bad = client.get("/jobs/j/adapters", params={"status": "done"})
    assert (bad.status_code, bad.json()["field"]) == (422, "status")
    foreign = client.get("/jobs", params={"limit": 1, "cursor": query.get("cursor", "x")})
    assert foreign.json()["code"] == "invalid_cursor"


def test_every_reason_is_documented() -> None:
    told = (Path(__file__).parents[3] / "docs" / "jobs.md").read_text()
    assert [reason for reason in SkipReason if f"\n| `{reason}` | " not in told] == []
