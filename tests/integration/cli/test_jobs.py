"""`jobs`, `job`, `cancel`, `revert`: what goes on, and what comes of it."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from loraplex import Client
from loraplex.cli.errors import WrongUsage
from loraplex.cli.jobs import find_id
from loraplex.cli.session import Session

from tests.integration.cli.conftest import Ended, Run, hear_ctrl_c
from tests.integration.client.test_retries import JOB
from tests.support.service import LORAPLEX, ServiceProcess, environment, eventually

Ask = Callable[..., Any]
ENDLESS = ("--rank", 4, "--method", "adamw", "--loss", "cross_entropy", "--epochs", 300_000, "--learning-rate", 0.0001)


@pytest.fixture
def endless(ask: Ask, run: Run, trained: Ended) -> Iterator[str]:
    """A job that runs for as long as the test does."""
    job = ask("train", "--dataset", "turned-digits", "--name", "endless", "--target", "digit", *ENDLESS, "--no-wait")
    eventually(lambda: ask("job", job["id"])["status"] == "running", what="its start")
    yield job["id"]
    if ask("job", job["id"])["status"] == "running":
        run("cancel", job["id"])


def test_a_job_that_is_followed_is_json_lines_for_machines(run: Run, ask: Ask, trained: Ended) -> None:
    (job,) = ask("jobs", "--adapter", "acme", "--status", "succeeded", "--limit", 1)
    ended = run("jobs", "--follow", job["id"], "--json")
    events = [json.loads(line) for line in ended.stdout.splitlines()]
    assert events[-1]["event"] == "status"
    assert events[-1]["data"]["status"] == "succeeded"
    assert {"metrics", "progress"} <= {event["event"] for event in events}
    assert ended.stderr == ""


def test_a_job_shows_how_it_stands_and_what_it_came_to(run: Run, ask: Ask, trained: Ended) -> None:
    (job,) = ask("jobs", "--adapter", "acme", "--limit", 1)
    text = run("job", job["id"]).stdout
    assert "succeeded" in text
    assert "What auto compared" in text
    assert "held-out rows" in text
    assert "succeeded" in run("cancel", job["id"], status=1).stderr
    row = run("jobs", "--adapter", "acme").stdout.splitlines()[2]
    assert row.split()[:3] == [job["id"], "acme", "succeeded"]


def test_a_job_that_is_cancelled_ends_who_follows_it_with_a_status_of_its_own(run: Run, endless: str, url: str) -> None:
    follower = subprocess.Popen(
        [LORAPLEX, "jobs", "--follow", endless], env=environment(url=url), stderr=subprocess.PIPE, text=True
    )
    assert follower.stderr is not None
    assert follower.stderr.readline() == "endless: running\n"
    assert run("cancel", endless).stdout == f"{endless} is cancelled\n"
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 4
    assert f"job {endless} (endless) was cancelled" in said


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_follow_it(ask: Ask, endless: str, url: str) -> None:
    follower = subprocess.Popen(
        [LORAPLEX, "jobs", "--follow", endless],
        env=environment(url=url),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    assert follower.stderr is not None
    assert follower.stderr.readline() == "endless: running\n"
    os.kill(follower.pid, signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert f"loraplex jobs --follow {endless}" in said
    assert f"loraplex cancel {endless}" in said
    assert "Traceback" not in said
    assert ask("job", endless)["status"] == "running"


def test_a_job_that_fails_says_why(run: Run, trained: Ended) -> None:
    how = ("--rank", 4, "--method", "sgd", "--loss", "cross_entropy", "--epochs", 50, "--learning-rate", 1_000_000)
    data = ("--dataset", "turned-digits", "--name", "burst", "--target", "digit")
    ended = run("train", *data, *how, status=4)
    assert "diverged" in ended.stderr
    assert "next:" not in ended.stderr
    machine = run("train", *data, *how, "--json", status=4)
    assert json.loads(machine.stdout)["error"]["code"] == "diverged"
    assert json.loads(machine.stderr)["code"] == "job_failed"


def test_what_a_job_published_is_taken_back(run: Run, ask: Ask, trained: Ended) -> None:
    how = ("--rank", 2, "--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    data = ("--dataset", "turned-digits", "--name", "taken-back", "--target", "digit")
    first, second = (ask("train", *data, *how, "--seed", seed) for seed in (1, 2))
    assert run("revert", second["id"]).stdout == "taken-back: live is 1 again (it was 2)\n"
    assert run("revert", first["id"]).stdout == "taken-back: live is none again (it was 1)\n"
    assert ask("revert", first["id"])["skipped"][0]["reason"] == "live_moved"


def test_machines_get_jobs_as_the_api_has_them(run: Run, ask: Ask, trained: Ended, service: ServiceProcess) -> None:
    how = ("--rank", 2, "--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    ask("train", "--dataset", "turned-digits", "--name", "with-history", "--target", "digit", *how)
    (job,) = ask("jobs", "--adapter", "with-history", "--status", "succeeded", "--limit", 1)
    query = {"adapter": "with-history", "status": "succeeded", "limit": "1"}
    (listed,) = service.client.get("/jobs", params=query).json()["data"]
    shown = service.client.get(f"/jobs/{job['id']}").json()
    assert _told(job).items() <= _told(listed).items()
    assert _told(ask("job", job["id"])).items() <= _told(shown).items()
    assert len(shown["history"]) > 1


def test_machines_get_a_revert_as_the_api_has_it(ask: Ask, trained: Ended) -> None:
    how = ("--rank", 2, "--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    job = ask("train", "--dataset", "turned-digits", "--name", "reverted", "--target", "digit", *how)
    assert ask("revert", job["id"]) == {"reverted": [{"name": "reverted", "from": 1, "to": None}], "skipped": []}


def _told(job: Any) -> Any:
    """A job without what is null in its progress, some of which the API leaves out."""
    return job | {"progress": {name: value for name, value in job["progress"].items() if value is not None}}


def test_a_job_is_named_by_the_beginning_of_its_id(run: Run, ask: Ask, endless: str) -> None:
    for size in (10, 31):
        assert ask("job", endless[:size])["id"] == endless
    assert ask("jobs", "--limit", 1)[0]["id"] == endless
    assert run("cancel", endless[:10]).stdout == f"{endless} is cancelled\n"
    assert "was cancelled" in run("jobs", "--follow", endless[:10], status=4).stderr
    assert "published no version of endless" in run("revert", endless[:10]).stdout


def test_a_beginning_that_several_ids_have_names_them() -> None:
    ids = [f"ab12{number:028x}" for number in range(7)]

    def answer(request: httpx.Request) -> httpx.Response:
        query = dict(request.url.params)
        assert (request.url.path, query["prefix"], int(query["limit"])) == ("/jobs", "ab12", 6)
        jobs = [JOB | {"id": job_id, "adapter": f"of-{job_id[-1]}", "status": "failed"} for job_id in ids[:6]]
        return httpx.Response(200, json={"data": jobs, "next_cursor": None})

    session = Session(url=None, as_json=False)
    session.__dict__["client"] = Client("http://127.0.0.1:1", transport=httpx.MockTransport(answer))
    with session.client, pytest.raises(WrongUsage) as caught:
        find_id(session, "ab12")
    assert f"{ids[0]} (of-0, failed)" in caught.value.detail
    assert f"{ids[4]} (of-4, failed), and more." in caught.value.detail


@pytest.mark.parametrize("text", ["abc", "0" * 8, "x/../y", "0" * 32])
def test_what_begins_no_id_is_no_job(run: Run, text: str) -> None:
    assert run("job", text, status=1).stderr.startswith("loraplex: ")


def test_a_job_that_is_not_there_is_said_not_to_be(run: Run) -> None:
    assert "`loraplex jobs` lists" in run("job", "0" * 32, status=1).stderr
    assert run("jobs", "--status", "lost", status=2).stderr != ""
