"""A job watched by server-sent events: what is told, in which order, from where on, and when it ends."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from adapters.catalog.catalog import Catalog
from adapters.jobs.job import Job, JobState, JobStatus, LogLine
from adapters.jobs.queue import JobQueue
from app.http.job_events import StreamPosition, event_id, events_since, read_event_id
from app.service import Service
from tests.conftest import Serve
from tests.support.catalog_factories import claimed, finish, publish_for, submit, submit_fleet, training_job
from tests.support.deadlines import scaled
from tests.support.service import ServiceProcess, eventually

TRAINING = training_job(rank=1)
ENDED = {"succeeded", "failed", "cancelled"}


class _Told(NamedTuple):
    id: str
    name: str
    data: Any


class _Stream:
    """An open stream, read as the standard says (WHATWG HTML, 9.2.6)."""

    def __init__(self, answer: httpx.Response) -> None:
        self.lines = answer.iter_lines()
        self._told = self._read()

    def _read(self) -> Iterator[_Told]:
        fields: dict[str, str] = {}
        for line in self.lines:
            name, _, value = line.partition(":")
            if line == "" and "data" in fields:
                yield _Told(fields["id"], fields["event"], json.loads(fields["data"]))
            if line == "":
                fields = {}
            elif name != "":
                assert name not in fields
                fields[name] = value.removeprefix(" ")

    def next(self) -> _Told:
        """The next event; fails where the stream ends instead."""
        return next(self._told)

    def rest(self) -> list[_Told]:
        """All that come until the stream ends."""
        return list(self._told)


@contextmanager
def _watch(client: httpx.Client, job_id: str = "j", after: str | None = None) -> Iterator[_Stream]:
    headers = {} if after is None else {"Last-Event-ID": after}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield _Stream(answer)


def _all(client: httpx.Client, job_id: str = "j", after: str | None = None) -> list[_Told]:
    with _watch(client, job_id, after) as stream:
        return stream.rest()


def _short(told: _Told) -> tuple[str, Any]:
    return told.name, told.data.get({"status": "status", "log": "text", "progress": "step"}.get(told.name, ""))


@pytest.fixture
def both(serve: Serve) -> tuple[httpx.Client, Service]:
    """A client and the service behind it, without a trainer: the tests are it."""
    return serve()


def _run(service: Service, job_id: str = "j") -> Job:
    submit(service.queue, job_id, training=TRAINING)
    return claimed(service.queue)


def test_a_job_is_told_from_its_place_in_the_queue_to_its_end(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    submit(service.queue, training=TRAINING)
    with _watch(client) as stream:
        assert _short(stream.next()) == ("status", "queued")
        assert stream.next().data == {"step": 0, "steps": 9, "loss": None}
        claim = claimed(service.queue)
        running = stream.next()
        assert (running.name, running.data) == ("status", {"status": "running", "attempt": 1})
        service.queue.heartbeat(claim, progress={"step": 3, "steps": 9, "loss": 0.5, "seconds_left": 2.5}, history=[])
        assert stream.next().data == {"step": 3, "steps": 9, "loss": 0.5, "seconds_left": 2.5}
        service.queue.append_log(claim, "half of it")
        line = stream.next()
        assert (line.name, line.data["text"]) == ("log", "half of it")
        version = finish(service.catalog, service.queue, claim)
        progress, metrics, end = stream.rest()
    assert (progress.name, progress.data) == ("progress", {})
    assert (metrics.name, metrics.data) == ("metrics", {"train_loss": 1.0})
    assert end.data == {
        "status": "succeeded",
        "attempt": 1,
        "result": {"name": "acme", "version": 1, "digest": version.digest},
        "error": None,
        **dict.fromkeys(("evaluation", "decision", "auto", "summary")),
    }


def test_one_job_alone_is_shown_with_its_log_and_the_list_without(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    claim = _run(service)
    service.queue.append_log(claim, "begun")
    job = client.get("/jobs/j").raise_for_status().json()
    assert [line["text"] for line in job["log"]] == ["begun"]
    assert job["log"][0]["time"] >= job["created_at"]
    (listed,) = client.get("/jobs").json()["data"]
    assert "log" not in listed
    assert "history" not in listed


def test_from_every_event_the_rest_can_be_had_from_any_worker(serve: Serve) -> None:
    (client, service), (other, _) = serve(), serve()
    claim = _run(service)
    for number in range(3):
        service.queue.append_log(claim, f"line {number}")
    service.queue.heartbeat(claim, progress={"step": 5})
    service.queue.fail(claim, {"code": "diverged"})
    told = _all(client)
    assert [_short(one) for one in told] == [
        *(("log", f"line {number}") for number in range(3)),
        ("progress", 5),
        ("status", "failed"),
    ]
    assert len({one.id for one in told}) == len(told)
    for place, one in enumerate(told[:-1]):
        assert _all(other, after=one.id) == told[place + 1 :]
    done = client.get("/jobs/j/events", headers={"Last-Event-ID": told[-1].id})
    assert (done.status_code, done.content) == (204, b"")  # else a browser would connect again for ever


def test_a_client_that_was_away_is_told_only_what_is_new(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    claim = _run(service)
    service.queue.append_log(claim, "one")
    with _watch(client) as stream:
        last = [stream.next() for _ in range(3)][-1]
    service.queue.append_log(claim, "two")
    service.queue.release(claim)
    with _watch(client, after=last.id) as stream:
        assert [_short(stream.next()) for _ in range(2)] == [("status", "queued"), ("log", "two")]
        service.queue.cancel("j", tenant="default")
        assert [_short(one) for one in stream.rest()] == [("status", "cancelled")]


@pytest.mark.parametrize("foreign", ["", "7", "deadbeef.1.running.00000000.3.1", "é", "x" * 5000])
def test_an_id_that_is_not_of_this_job_begins_at_the_beginning(
    both: tuple[httpx.Client, Service], foreign: str
) -> None:
    client, service = both
    _run(service)
    service.queue.cancel("j", tenant="default")
    whole = [told.name for told in _all(client)]
    assert whole == ["progress", "status"]
    headers = {b"Last-Event-ID": foreign.encode()}
    with client.stream("GET", "/jobs/j/events", headers=headers) as answer:
        assert [told.name for told in _Stream(answer).rest()] == whole


def test_a_job_that_does_not_exist_is_404_before_anything_is_streamed(both: tuple[httpx.Client, Service]) -> None:
    client, _ = both
    for method, path in (("GET", "events"), ("GET", "adapters"), ("POST", "revert")):
        answer = client.request(method, f"/jobs/nobody/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


def test_a_stream_in_which_nothing_happens_has_heartbeats(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    service.job_events.heartbeat_seconds = 0.02
    _run(service)
    with _watch(client) as stream:
        assert [stream.next().name for _ in range(2)] == ["status", "progress"]
        beats = [next(stream.lines) for _ in range(6)]
    assert beats == [": heartbeat", ""] * 3


def test_watchers_are_bounded_and_one_that_goes_makes_room(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    service.job_events.max_subscribers = 2
    _run(service)
    with ExitStack() as stack:
        held = [stack.enter_context(_watch(client)) for _ in range(2)]
        assert [stream.next().name for stream in held] == ["status", "status"]
        answer = stack.enter_context(client.stream("GET", "/jobs/j/events"))
        assert answer.status_code == 429
        assert json.loads(answer.read())["code"] == "queue_full"
        assert answer.headers["Retry-After"]

    def there_is_room() -> bool:
        with client.stream("GET", "/jobs/j/events") as again:
            return again.status_code == 200

    eventually(there_is_room, what="room for a watcher")


def test_the_watchers_of_one_tenant_leave_room_for_another(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    service.job_events.max_subscribers = 2
    _run(service)
    client.put("/tenants/acme", json={}).raise_for_status()
    submit(service.queue, "k", training=TRAINING, tenant="acme")
    with ExitStack() as stack:
        held = [stack.enter_context(_watch(client)) for _ in range(2)]
        assert [stream.next().name for stream in held] == ["status", "status"]
        in_acme = {"X-Tenant": "acme"}
        first = stack.enter_context(client.stream("GET", "/jobs/k/events", headers=in_acme))
        second = stack.enter_context(client.stream("GET", "/jobs/k/events", headers=in_acme))
        assert (first.status_code, second.status_code) == (200, 429)


def test_a_change_that_came_before_the_watcher_was_known_is_told(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    claim = _run(service)
    with _watch(client) as first:
        first.next()
        states = service.queue.state

        def late(job_id: str, *, tenant: str) -> JobState:
            # Read for the second watcher, then changed, looked at and told to the first: all before the second is one.
            state = states(job_id, tenant=tenant)
            service.queue.heartbeat(claim, progress={"step": 8})
            while first.next().data.get("step") != 8:
                pass
            return state

        service.queue.state = late  # type: ignore[method-assign]
        with _watch(client) as second:
            steps = [
                told.data["step"] for told in (second.next(), second.next(), second.next()) if told.name != "status"
            ]
    assert steps == [0, 8]


def test_a_service_that_stops_ends_its_streams(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    _run(service)
    with _watch(client) as stream:
        stream.next()
        service.draining = True
        assert [told.name for told in stream.rest()] == ["progress"]


def test_an_open_stream_does_not_hold_up_the_end_of_the_service(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path / "data", trainers=0, base="zeros:2,2") as process:
        opened = Catalog(tmp_path / "data", now=time.time)
        with closing(opened.database):
            submit(JobQueue(opened.database, opened.writer, now=time.time, lease_seconds=15), training=TRAINING)
        with _watch(process.client) as stream:
            stream.next()
            begun = time.monotonic()
            process.process.terminate()
            assert [told.name for told in stream.rest()] == ["progress"]
        assert process.process.wait(60) == 0
        assert time.monotonic() - begun < scaled(
            15
        )  # without an end of its own the stream would take the whole grace: 28 s


def test_of_a_fleet_the_progress_counts_its_adapters(both: tuple[httpx.Client, Service]) -> None:
    client, service = both
    queue = service.queue
    submit_fleet(queue, ["a", "b", "c"], training=TRAINING)
    claim = claimed(queue)
    publish_for(service.catalog, queue, claim, queue.waiting(claim)[:2])
    queue.heartbeat(claim, progress={"adapters": queue.tally(claim)})
    queue.cancel("j", tenant="default")
    assert _all(client)[0].data == {"adapters": {"published": 2, "failed": 0, "total": 3}}


def _state(**fields: Any) -> JobState:
    usual: dict[str, Any] = dict.fromkeys(("progress", "metrics", "result", "error"))
    return JobState(**usual | {"log": (), "status": JobStatus.RUNNING, "attempt": 1, "fence": 1} | fields)


def test_who_reads_slowly_misses_progress_and_no_line() -> None:
    seen = [*events_since(_state(progress={"step": 1}), StreamPosition())][-1].position
    log = [LogLine("t", f"line {number}", number) for number in range(1, 6)]
    later = _state(progress={"step": 900}, log=log)
    assert [event.data for event in events_since(later, seen)] == [
        *({"time": "t", "text": f"line {number}"} for number in range(1, 6)),
        {"step": 900},
    ]


def test_a_job_that_waits_again_or_runs_again_says_so() -> None:
    seen = StreamPosition()
    told = []
    for status, attempt, fence in (("running", 1, 1), ("queued", 0, 1), ("running", 1, 2), ("running", 2, 3)):
        for event in events_since(_state(status=JobStatus(status), attempt=attempt, fence=fence), seen):
            seen = event.position
            told.append(tuple(event.data.values()))
    assert told == [("running", 1), ("queued", 0), ("running", 1), ("running", 2)]


def test_an_id_says_all_that_was_seen_and_only_of_its_own_job() -> None:
    for seen in (StreamPosition(), StreamPosition(3, JobStatus.RUNNING, "0123abcd", 17, True)):
        assert read_event_id("j", event_id("j", seen)) == seen
        assert read_event_id("k", event_id("j", seen)) == StreamPosition()
