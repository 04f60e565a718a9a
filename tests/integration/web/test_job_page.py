"""The page of a job: its evaluation and its decision, and the adapters of a fleet by outcome and by gain."""

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import Connection

from adapters.catalog.versions import Published, Source
from adapters.jobs.job_adapters import JobAdapter
from app.service import Service
from app.settings import Settings
from tests.support.catalog_factories import claimed, publication, submit, submit_fleet, training_job
from tests.support.html_markup import Markup
from tests.support.job_reports import AUTO, DECISION, EVALUATION
from tests.support.service import serving

OUTCOMES = {"north": ("better", 0.3), "south": ("same", 0.02), "east": ("worse", -0.4), "west": ("worse", -0.1)}
DIVERGED = {"code": "diverged", "detail": "the loss is infinite"}
LOSES = "the adapter <b>loses</b> to a trivial guess"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A job that did not move live, and a fleet in which one group failed."""
    settings = Settings(base="random:10,2,42", data_dir=tmp_path_factory.mktemp("jobs") / "data")
    with serving(settings) as (client, service):
        base = service.base.fingerprint
        submit(service.queue, "single", base=base)
        not_moved = {"moved": False, "reason": "its gain is below 0", "outcome": "worse", "gain": -0.05}
        report = {"evaluation": EVALUATION, "auto": AUTO, "decision": not_moved, "warnings": [LOSES]}
        _end(service, "single", {0: report}, report=report)
        renamed = [{"group": "Kunde 0", "name": "kunde-0-1a2b3c4d"}]
        described = training_job(renamed=renamed, renamed_count=120, warnings=["few rows"])
        training = replace(described, is_fleet=True)
        submit_fleet(service.queue, [*OUTCOMES, "lost"], "fleet", base=base, training=training)
        reports = {
            position: {
                "evaluation": EVALUATION,
                "decision": DECISION
                | {"moved": gain > 0, "reason": f"its gain is {gain}", "outcome": outcome, "gain": gain},
                "auto": AUTO,
                "warnings": [],
            }
            for position, (outcome, gain) in enumerate(OUTCOMES.values())
        }
        _end(service, "fleet", reports, failed=[4])
        yield client


def _end(
    service: Service,
    job_id: str,
    reports: Mapping[int, Mapping[str, Any]],
    *,
    failed: Sequence[int] = (),
    report: Mapping[str, Any] | None = None,
) -> None:
    """Publish the adapters of a job as its trainer does, and end it."""
    queue, claim = service.queue, claimed(service.queue, base=service.base.fingerprint)
    assert claim.id == job_id
    queue.fail_adapters(
        claim, [(position, {"code": "diverged", "detail": "the loss is infinite"}) for position in failed]
    )

    def record(connection: Connection, published: Sequence[Published]) -> None:
        queue.record(connection, claim, published, reports)

    def made(adapter: JobAdapter) -> Any:
        fields: dict[str, Any] = {
            "base": service.base,
            "source": Source.JOB,
            "job": job_id,
            "position": adapter.position,
        }
        moves_live = reports[adapter.position]["decision"]["moved"]
        return publication(adapter.name, adapter.position, moves_live=moves_live, **fields)

    published = service.catalog.publish(
        [made(adapter) for adapter in queue.waiting(claim)],
        admit=lambda connection, publications: queue.admit(connection, claim, publications),
        record=record,
        tenant="default",
    )
    version = published[0].version
    result = {"name": version.adapter, "version": version.version, "digest": version.digest} if report else None
    queue.succeed(claim, result=result, progress={"step": 9}, metrics={}, history=[], report=report)


def _words(answer: httpx.Response) -> str:
    """The text of a page, with the cells of tables apart."""
    assert answer.status_code == 200, answer.text
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", answer.text)).split())


def _names(answer: httpx.Response) -> list[str]:
    """The adapters in the table."""
    return re.findall(r'<th scope="row"><(?:a|span) class="wrap"[^>]*>(\w+)</', answer.text)


def test_a_version_that_is_not_live_is_said_not_to_be_and_can_be_made_live(pages: httpx.Client) -> None:
    answer = pages.get("/ui/jobs/single")
    text = _words(answer)
    assert "Live did not move. Its gain is below 0." in text
    assert f"Warning. {LOSES[:1].upper()}{LOSES[1:]}." in text
    assert "On 40 cross-validated rows" in text
    assert "Adapter 0.85 0.709 to 0.929" in text
    assert "Trivial guess 0.1 –" in text
    assert "Gain over the base layer: +0.425 per row, standard error 0.0812." in text
    assert "ridge taken 0.522 ridge 3, rank 4, bias yes" in text
    assert "own head – not tried: rank 64 is above 8" in text
    (button,) = [given for _, given in Markup(answer.text).elements if given.get("data-method") == "PUT"]
    body = json.loads(str(button["data-body"]))
    live = pages.put(str(button["data-url"]), json=body).raise_for_status().json()["aliases"]
    assert live == {"live": 1}


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({}, ["north", "south", "east", "west", "lost"]),
        ({"sort": "name"}, ["east", "lost", "north", "south", "west"]),
        ({"sort": "gain"}, ["east", "west", "south", "north", "lost"]),
        ({"outcome": "worse", "sort": "gain"}, ["east", "west"]),
        ({"outcome": "failed"}, ["lost"]),
        ({"outcome": "nonsense", "sort": "nonsense"}, ["north", "south", "east", "west", "lost"]),
    ],
    ids=str,
)
def test_the_adapters_of_a_fleet_are_shown_by_outcome_and_by_gain(
    pages: httpx.Client, query: dict[str, str], names: list[str]
) -> None:
    answer = pages.get("/ui/jobs/fleet", params=query)
    assert _names(answer) == names
    assert "all better 1 same 1 worse 2 failed 1 Live moved for 2 adapters." in _words(answer)


def test_groups_without_a_valid_name_and_warnings_about_the_settings_are_listed(pages: httpx.Client) -> None:
    text = _words(pages.get("/ui/jobs/fleet"))
    assert "120 groups without a valid name Kunde 0 : kunde-0-1a2b3c4d and 119 more" in text
    assert "Note. few rows." in text
    assert "renamed" not in text


def test_a_refresh_keeps_the_outcome_that_is_shown(pages: httpx.Client) -> None:
    part = pages.get("/ui/jobs/fleet", params={"outcome": "worse", "sort": "gain"}, headers={"HX-Request": "true"})
    assert "<!doctype" not in part.text
    assert _names(part) == ["east", "west"]


def test_failed_and_worse_adapters_are_offered_to_be_trained_again(pages: httpx.Client) -> None:
    page = Markup(pages.get("/ui/jobs/fleet").text)
    (button,) = [given for _, given in page.elements if str(given.get("data-url")).endswith("/retry")]
    assert button["data-url"] == "/jobs/fleet/retry"
    assert json.loads(str(button["data-body"])) == {"outcomes": ["failed", "worse"]}
