"""A service that is full: of adapters, and of clients that watch jobs."""

import json
from collections.abc import Iterator

import pytest

from app.settings import Settings
from tests.integration.cli.conftest import DIGITS, Run
from tests.support.service import serving, train

HOW = ("--method", "adamw", "--loss", "cross_entropy", "--epochs", 2)
MANY = 1_005


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a service answers that has a thousand adapters, and no room for anybody who watches a job."""
    with serving(Settings(data_dir=tmp_path_factory.mktemp("full") / "data"), trainer=True) as (client, service):
        service.job_events.max_subscribers = 0
        data = {"inputs": [[1] * 64] * MANY, "targets": [[1] * 10] * MANY, "groups": [f"{n}" for n in range(MANY)]}
        train(client, name="a-{group}", rank=1, data=data, training={"method": "closed_form", "ridge": 1})
        yield str(client.base_url).rstrip("/")


def test_a_training_that_cannot_be_watched_is_waited_for(run: Run, full: str) -> None:
    ended = run("train", DIGITS, "--url", full, "--name", "acme", "--target", "digit", *HOW)
    assert "acme: succeeded\n" in ended.stderr
    assert "acme@1 is live" in ended.stdout


def test_a_machine_that_cannot_watch_a_job_is_told_how_it_ended(run: Run, full: str) -> None:
    data = ("--dataset", "turned-digits", "--name", "burst", "--target", "digit")
    run("dataset", "put", DIGITS, "--url", full)
    queued = run("train", *data, *HOW, "--no-wait", "--url", full, "--json").stdout
    (line,) = run("jobs", "--follow", json.loads(queued)["id"], "--url", full, "--json").stdout.splitlines()
    told = json.loads(line)
    assert (told["event"], told["data"]["status"]) == ("status", "succeeded")
    assert told["data"]["result"]["name"] == "burst"


def test_all_adapters_are_counted(run: Run, full: str) -> None:
    assert json.loads(run("status", "--url", full, "--json").stdout)["adapters"] > MANY
