"""Jobs: waited for, watched, cancelled, taken back; over connections that break."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import httpx
import numpy as np
import pytest
from loraplex import (
    AsyncClient,
    AsyncJob,
    BadAnswer,
    Client,
    Conflict,
    Display,
    Diverged,
    InvalidName,
    Job,
    JobCancelled,
    JobEnded,
    JobFailed,
    JobNotEnded,
    JobNotFound,
    JobStatus,
    Progress,
    TimedOut,
    Unreachable,
)
from loraplex._sync import connection, jobs
from loraplex.events import EventParser

from tests.conftest import Serve
from tests.integration.client.conftest import Connect, Start
from tests.integration.client.scripted_server import Scripted, event, hang_up, problem, reply, stay_silent, stream
from tests.integration.client.test_retries import JOB

RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(60, 10)), RNG.normal(size=(60, 2))
ENDED = JOB | {"status": "succeeded", "result": {"name": "acme", "version": 1, "digest": "sha256:1"}}
END = event("status", {"status": "succeeded", "attempt": 1, "result": ENDED["result"], "error": None}, "e9")


def test_a_job_is_waited_for_and_says_what_came_of_it(start: Start) -> None:
    client = start(trainer=True)
    job = client.train("acme", rank=2, inputs=X, targets=Y, training={"method": "adamw"})
    assert job.status is JobStatus.QUEUED
    done = job.wait(timeout=60)
    assert (done.status, str(done.result)) == (JobStatus.SUCCEEDED, "acme@1")
    assert done.metrics["train_loss"] < done.metrics["base_train_loss"]
    assert [point.step for point in done.history] == list(range(1, 51))
    assert done.progress.step == done.progress.steps == 50
    assert client.adapter("acme").live.digest == done.result.digest
    assert job.refresh().status is JobStatus.SUCCEEDED
    assert [adapter.version for adapter in job.adapters()] == [1]


def test_a_job_tells_what_happens_until_its_end(start: Start) -> None:
    client = start(trainer=True)
    events = list(client.train("acme", rank=2, inputs=X, targets=Y).events())
    assert {event.name for event in events} >= {"status", "progress", "metrics"}
    assert (events[-1].name, events[-1].data["status"]) == ("status", "succeeded")


def test_a_job_that_fails_raises_why_and_carries_the_job(start: Start) -> None:
    client = start(trainer=True)
    job = client.train("acme", rank=1, inputs=X, targets=Y, training={"method": "sgd", "learning_rate": 1e6})
    with pytest.raises(JobFailed, match="diverged") as failed:
        job.wait(timeout=60)
    reason = failed.value.job.error
    assert isinstance(reason, Diverged)
    assert failed.value.__cause__ is reason
    assert reason.step is not None
    assert failed.value.job.id == job.id
    assert isinstance(failed.value.job, Job | AsyncJob)


def test_a_job_is_cancelled_once(start: Start) -> None:
    client = start()
    job = client.train("acme", rank=1, inputs=X, targets=Y)
    assert job.cancel().status is JobStatus.CANCELLED
    with pytest.raises(JobCancelled):
        job.wait(timeout=60)
    assert [found.id for found in client.jobs(status="cancelled", adapter="acme")] == [job.id]
    assert list(client.jobs(status="running")) == []


def test_what_a_job_published_is_taken_back_once_it_has_ended(start: Start) -> None:
    client = start(trainer=True)
    client.upload("acme", A=np.ones((2, 1)), B=np.ones((1, 10)))
    job = client.train("acme", rank=1, inputs=X, targets=Y, training={"method": "closed_form"}).wait(timeout=60)
    done = job.revert()
    assert [(back.name, back.version, back.to) for back in done.reverted] == [("acme", 2, 1)]
    assert [skipped.reason for skipped in job.revert().skipped] == ["live_moved"]
    with pytest.raises(JobEnded):
        job.cancel()


def test_a_wait_that_is_up_leaves_the_job_alone(start: Start) -> None:
    client = start()
    job = client.train("acme", rank=1, inputs=X, targets=Y)
    with pytest.raises(TimedOut, match="still queued"):
        job.wait(timeout=0.2)
    assert job.refresh().status is JobStatus.QUEUED
    with pytest.raises(JobNotEnded):
        job.revert()


def test_an_interrupt_leaves_the_job_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    http, _ = serve()

    def interrupted(_parser: EventParser, _received: bytes) -> None:
        raise KeyboardInterrupt

    with Client(str(http.base_url)) as client:
        job = client.train("acme", rank=1, inputs=X, targets=Y)
        monkeypatch.setattr(EventParser, "feed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.wait()
        assert job.refresh().status is JobStatus.QUEUED


def test_jobs_are_listed_newest_first_and_no_more_than_asked_for(start: Start) -> None:
    client = start()
    made = [client.train(f"a{n}", rank=1, inputs=X[:2], targets=Y[:2]).id for n in range(3)]
    assert [job.id for job in client.jobs()] == made[::-1]
    assert [job.id for job in client.jobs(limit=2)] == made[:0:-1]


def test_a_list_goes_on_with_the_next_page(connect: Connect, scripted: Scripted) -> None:
    pages = [{"data": [JOB | {"id": "j1"}], "next_cursor": "c/1"}, {"data": [JOB | {"id": "j2"}], "next_cursor": None}]
    scripted.plan([reply(200, page) for page in pages])
    assert [job.id for job in connect(scripted.url).jobs(status="queued")] == ["j1", "j2"]
    first, second = (asked.line for asked in scripted.asked)
    assert "cursor" not in first
    assert "cursor=c%2F1" in second
    assert "status=queued" in second


def test_adapters_of_a_job_are_trained_again_by_outcome(connect: Connect, scripted: Scripted) -> None:
    listed: dict[str, Any] = {"data": [], "next_cursor": None}
    scripted.plan([reply(200, JOB), reply(200, listed), reply(202, JOB | {"id": "j2"}), problem(409, "data_gone")])
    job = connect(scripted.url).job("j1")
    assert list(job.adapters(outcome="worse", sort="gain")) == []
    assert "outcome=worse&sort=gain" in scripted.asked[-1].line
    assert job.retry(outcomes=["failed", "worse"], training={"bias": False}).id == "j2"
    assert scripted.asked[-1].line.startswith("POST /jobs/j1/retry ")
    assert json.loads(scripted.asked[-1].body) == {"outcomes": ["failed", "worse"], "training": {"bias": False}}
    with pytest.raises(Conflict) as refused:
        job.retry()
    assert refused.value.code == "data_gone"
    assert json.loads(scripted.asked[-1].body) == {}


def test_what_is_not_there_or_has_no_name_is_said(start: Start) -> None:
    client = start()
    for call in (client.job, client.cancel, lambda name: list(client.events(name)), client.wait):
        with pytest.raises(JobNotFound):
            call("nobody")
    with pytest.raises(InvalidName):
        client.adapter("a/b?c")
    with pytest.raises(InvalidName):
        client.delete("..")


def test_a_stream_that_breaks_goes_on_after_the_last_event(connect: Connect, scripted: Scripted) -> None:
    first = event("progress", {"step": 1, "steps": 9, "loss": 0.5}, "e1")
    second = event("log", {"time": "t", "text": "größer"}, "e2")
    scripted.plan([stream(first), hang_up, problem(503, "not_ready"), stream(second[:40], second[40:], END)])
    told = list(connect(scripted.url).events("j1"))
    assert [(each.name, each.id) for each in told] == [("progress", "e1"), ("log", "e2"), ("status", "e9")]
    assert told[1].data["text"] == "größer"
    assert [asked.headers.get("last-event-id") for asked in scripted.asked] == [None, "e1", "e1", "e1"]


def test_a_client_that_has_been_told_the_end_has_nothing_more_to_hear(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([reply(204, b"")])
    assert list(connect(scripted.url).events("j1")) == []


def test_a_stream_that_keeps_breaking_is_given_up(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([stream(b": heartbeat\n\n")] * 9)
    with pytest.raises(Unreachable):
        list(connect(scripted.url, retries=2).events("j1"))
    assert len(scripted.asked) == 3


def test_a_stream_that_ends_without_a_word_is_given_up_too(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([reply(200, b"", kind="text/event-stream")] * 9)
    with pytest.raises(BadAnswer, match="3 times"):
        list(connect(scripted.url, retries=2).events("j1"))
    assert len(scripted.asked) == 3


def test_a_stream_that_is_alive_may_end_as_often_as_it_likes(connect: Connect, scripted: Scripted) -> None:
    alive = reply(200, b": heartbeat\n\n", kind="text/event-stream")
    scripted.plan([*[alive] * 4, reply(200, END, kind="text/event-stream")])
    assert [each.name for each in connect(scripted.url, retries=1).events("j1")] == ["status"]


def test_a_wait_looks_at_the_job_where_no_stream_is_to_be_had(connect: Connect, scripted: Scripted) -> None:
    full = problem(429, "queue_full")
    scripted.plan([reply(200, JOB), full, full, reply(200, JOB | {"status": "running"}), reply(200, ENDED)])
    assert connect(scripted.url, retries=1).wait("j1").status is JobStatus.SUCCEEDED
    assert [asked.line.split()[1] for asked in scripted.asked] == [
        "/jobs/j1",
        "/jobs/j1/events",
        "/jobs/j1/events",
        "/jobs/j1",
        "/jobs/j1",
    ]


class Told(Display):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.open = False

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False

    def status(self, status: str) -> None:
        assert self.open
        self.said.append(status)

    def log(self, text: str) -> None:
        self.said.append(text)

    def progress(self, progress: Progress) -> None:
        self.said.append(f"{progress.step}/{progress.steps}")


def test_a_display_of_ones_own_is_told_each_line_once_whether_by_events_or_by_the_job(
    connect: Connect, scripted: Scripted
) -> None:
    lines = [{"time": f"t{n}", "text": text} for n, text in enumerate(("one", "two", "three"))]
    moved = event("progress", {"step": 1, "steps": 9, "loss": 0.5}, "e1")
    logged = [event("log", line, f"l{n}") for n, line in enumerate(lines[:2])]
    running = JOB | {"status": "running", "log": lines[:1]}
    # The stream breaks, and from then on the job itself is looked at.
    scripted.plan([reply(200, running), stream(*logged, moved), reply(200, ENDED | {"log": lines})])
    told = Told()
    connect(scripted.url, retries=0).wait("j1", progress=told)
    assert told.said == ["running", "one", "two", "1/9", "succeeded", "three"]
    assert not told.open


def test_progress_is_shown_in_lines_where_there_is_no_terminal(
    connect: Connect, scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = event("log", {"time": "t", "text": "slow \x1b[31m"}, "e0")
    moved = event("progress", {"step": 9, "steps": 9, "loss": 0.25, "seconds_left": 12.3}, "e1")
    scripted.plan([reply(200, JOB), stream(logged, moved, END), reply(200, ENDED)])
    connect(scripted.url).wait("j1", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "acme: queued",
        "acme:   slow \\x1b[31m",
        "acme: step 9/9 · loss 0.25 · 12 s left",
        "acme: succeeded",
    ]


def test_progress_is_a_bar_in_a_terminal(
    connect: Connect, scripted: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    logged = event("log", {"time": "t", "text": "slow"}, "e0")
    first, last = {"step": 0, "steps": 9, "loss": None}, {"step": 9, "steps": 9, "loss": 0.25}
    seen = stream(logged, event("progress", last, "e1"), END)
    scripted.plan([reply(200, JOB | {"progress": first}), seen, reply(200, ENDED | {"progress": last})])
    connect(scripted.url).wait("j1", progress=True)
    shown = capsys.readouterr().err
    assert "acme" in shown
    assert "━" in shown
    assert "  slow\n" in shown
    assert "queued" in shown
    assert "loss 0.25 · succeeded" in shown.rpartition("\r")[2]  # what stays


def test_leaving_the_iteration_closes_the_stream(scripted: Scripted) -> None:
    moved = event("progress", {"step": 1, "steps": 9, "loss": 0.5}, "e1")
    closed = threading.Event()

    def until_closed(connection: Any) -> None:
        connection.settimeout(20)
        if connection.recv(1) == b"":
            closed.set()

    scripted.plan([stream(moved, end=until_closed)] * 2)
    with Client(scripted.url) as client:
        for _ in client.events("j1"):
            break
        assert closed.wait(10)
        closed.clear()

    async def look() -> None:
        async with AsyncClient(scripted.url) as client:
            events = client.events("j1")
            async for _ in events:
                break
            await events.aclose()  # type: ignore[attr-defined]  # a generator
            assert await asyncio.to_thread(closed.wait, 10)

    asyncio.run(look())


def test_a_wait_keeps_its_time_over_a_silent_stream(connect: Connect, scripted: Scripted) -> None:
    scripted.plan([reply(200, JOB), reply(200, JOB), stay_silent(scripted)])
    with pytest.raises(TimedOut):
        connect(scripted.url, timeout=1.0, retries=0).wait("j1", timeout=0.05)


class Imagined(httpx.BaseTransport):
    """Answers in no time: each stream goes as `plan` says, and each word of it takes `heard` seconds.

    The job itself is always there, and queued.
    """

    def __init__(self, plan: Sequence[bytes | Exception], *, heard: float) -> None:
        self.now = 0.0
        self._plan = plan
        self._heard = heard

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=JOB)
        if self.now > 0 and isinstance(self._plan[-1], httpx.ConnectError):
            raise self._plan[-1]
        return httpx.Response(200, stream=Words(self))

    def words(self) -> Iterator[bytes]:
        for word in self._plan:
            self.now += 25.0 if isinstance(word, httpx.ReadTimeout) else self._heard
            if isinstance(word, Exception):
                raise word
            yield word


class Words(httpx.SyncByteStream):
    """A stream of an imagined service."""

    def __init__(self, world: Imagined) -> None:
        self._world = world

    def __iter__(self) -> Iterator[bytes]:
        return self._world.words()


TOLD = event("log", {"time": "t", "text": "one"}, "e1")


@pytest.mark.parametrize(
    "plan",
    [
        [TOLD, httpx.ReadError("it broke")],
        [TOLD, httpx.ReadTimeout("it was silent")],
        [TOLD],
        [*[b": heartbeat\n\n"] * 4, httpx.ReadTimeout("it was silent")],
        [TOLD, httpx.ConnectError("it broke, and is away")],
    ],
    ids=["breaks", "silent", "ends", "alive", "away"],
)
@pytest.mark.parametrize("timeout", [12.0, 30.0, 50.0, 100.0])
def test_a_wait_keeps_its_time_whatever_becomes_of_the_stream(
    monkeypatch: pytest.MonkeyPatch, plan: list[bytes | Exception], timeout: float
) -> None:
    world = Imagined(plan, heard=4.0)
    monkeypatch.setattr(connection, "time", world)
    monkeypatch.setattr(jobs, "time", world)
    with Client("http://imagined", transport=world) as client, pytest.raises(TimedOut, match="still queued"):
        client.wait("j1", timeout=timeout)
    assert timeout <= world.now < timeout + 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_events_are_read_however_their_bytes_are_cut(size: int, line: str) -> None:
    text = ': c\n\nevent: log\ndata: {\ndata: "text": "ü"}\nid: 1\nretry: 5\n\nevent:log\ndata:{}\n\nid: 2\n\n'
    received = text.replace("\n", line).encode()
    parser = EventParser()
    told = [each for at in range(0, len(received), size) for each in parser.feed(received[at : at + size])]
    assert [(each.name, each.data, each.id) for each in told] == [("log", {"text": "ü"}, "1"), ("log", {}, "1")]
    assert json.dumps(told[0].data)
