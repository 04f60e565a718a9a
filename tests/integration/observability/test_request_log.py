"""How many lines are written, and that whoever reads them slowly holds nobody up."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.observability.logs import line_of
from app.observability.records import LogRecord
from app.observability.request_log import MAX_LINES_PER_SECOND, LineWriter, RequestLog
from app.settings import LogFormat, LogRequests
from tests.integration.observability.memory_log import Kept
from tests.support.service import eventually


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def answer(log: RequestLog, status: int = 200, times: int = 1) -> None:
    for _ in range(times):
        if log.reserve_line(status >= 400):
            log.add(LogRecord("/predict", "POST", status, 1.0, 1.25, b"id", "/predict"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def a_log(clock: Clock, wanted: LogRequests = LogRequests.ALL) -> tuple[RequestLog, Kept]:
    kept = Kept()
    return RequestLog(line_of(LogFormat.JSON), kept, process="worker-1", log_requests=wanted, clock=clock), kept


def test_past_a_thousand_lines_a_second_one_says_how_many_were_left_out(clock: Clock) -> None:
    log, kept = a_log(clock)
    for _ in range(10):
        answer(log, times=MAX_LINES_PER_SECOND)
        clock.now += 0.1
        log.flush()
    assert kept.of("requests left out") == []
    clock.now += 0.11
    log.flush()
    # A thousand at once, and a tenth of that came back nine times.
    written = len(kept.of("request"))
    assert written == pytest.approx(1.9 * MAX_LINES_PER_SECOND, abs=5)
    (line,) = kept.of("requests left out")
    assert line["left_out"] == 10 * MAX_LINES_PER_SECOND - written
    # The first of them came with the second thousand, a tenth of a second after the first one.
    assert line["seconds"] == pytest.approx(1.01)
    assert not log.has_unreported

    clock.now += 1.0
    log.flush()
    answer(log, times=MAX_LINES_PER_SECOND)
    log.flush()
    assert len(kept.of("request")) == written + MAX_LINES_PER_SECOND
    assert len(kept.of("requests left out")) == 1


def test_requests_that_succeed_take_no_room_from_those_that_fail(clock: Clock) -> None:
    log, kept = a_log(clock)
    answer(log, times=5 * MAX_LINES_PER_SECOND)
    answer(log, 503, times=10)
    log.flush()
    assert sum(line["status"] == 503 for line in kept.of("request")) == 10


def test_what_is_left_out_after_an_hour_of_rest_was_not_left_out_in_an_hour(clock: Clock) -> None:
    log, kept = a_log(clock)
    clock.now += 3600.0
    answer(log, times=MAX_LINES_PER_SECOND + 1)
    clock.now += 0.1
    answer(log, times=499)
    log.flush()
    assert kept.of("requests left out") == []
    clock.now += 0.95
    log.flush()
    (line,) = kept.of("requests left out")
    assert line["left_out"] == 500
    assert line["seconds"] == pytest.approx(1.05)


def test_what_found_no_room_with_the_writer_is_told_once_it_has_room_again(clock: Clock) -> None:
    log, kept = a_log(clock)
    kept.is_full = True
    for _ in range(5):
        answer(log, times=500)
        clock.now += 1.0
        log.flush()
    assert log.has_unreported
    assert kept.lines == []
    kept.is_full = False
    log.flush()
    (line,) = kept.lines
    assert (line["event"], line["left_out"]) == ("requests left out", 2500)
    assert line["seconds"] == pytest.approx(4.0)
    assert not log.has_unreported


@pytest.mark.parametrize(
    ("wanted", "statuses"),
    [(LogRequests.ALL, [200, 399, 400, 500]), (LogRequests.FAILED, [400, 500]), (LogRequests.NONE, [])],
)
def test_only_what_is_wanted_is_written_and_the_rest_is_not_counted_as_left_out(
    clock: Clock, wanted: LogRequests, statuses: list[int]
) -> None:
    log, kept = a_log(clock, wanted)
    for status in (200, 399, 400, 500):
        answer(log, status)
    assert not log.has_unreported
    clock.now += 2.0
    log.close()
    assert [line["status"] for line in kept.lines] == statuses


def test_what_was_left_out_is_told_at_the_end_too(clock: Clock) -> None:
    log, kept = a_log(clock)
    answer(log, times=MAX_LINES_PER_SECOND + 3)
    assert log.has_unreported
    log.close()
    assert kept.of("requests left out")[0]["left_out"] == 3


def test_a_reader_that_has_stopped_costs_lines_and_no_time() -> None:
    reading, writing = os.pipe()
    writer = LineWriter(writing, max_waiting_bytes=300_000)
    line = b"x" * 999 + b"\n"
    lost = sum(writer.put([line] * 100) for _ in range(10))
    assert 600 < lost <= 1000 - 300

    total, read = (1000 - lost) * len(line), bytearray()
    while len(read) < total:
        read += os.read(reading, 2**16)
    assert bytes(read) == line * (1000 - lost)

    def has_room() -> bool:
        return writer.put([line]) == 0

    eventually(has_room, what="room")
    writer.close(10)
    os.close(writing)
    os.close(reading)


def test_lines_stay_in_one_piece_beside_those_of_another_process() -> None:
    reading, writing = os.pipe()
    # Two writers to one pipe, as two workers have it. Lines of unlike lengths fill it again and again.
    writers = [LineWriter(writing), LineWriter(writing)]
    lines = [bytes([letter]) * (100 + 37 * n % 900) + b"\n" for letter in b"ab" for n in range(500)]
    read = bytearray()

    def take() -> None:
        while part := os.read(reading, 512):
            read.extend(part)

    reader = threading.Thread(target=take)
    reader.start()
    for at in range(0, 500, 50):
        assert writers[0].put(lines[at : at + 50]) == 0
        assert writers[1].put(lines[500 + at : 550 + at]) == 0
    for writer in writers:
        writer.close(10)
    os.close(writing)
    reader.join()
    os.close(reading)
    assert sorted(read.splitlines(keepends=True)) == sorted(lines)


def test_nobody_reads_any_more_and_nothing_is_raised() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = LineWriter(writing)
    assert writer.put([b"line\n"]) == 0
    writer.close(10)
    os.close(writing)


@pytest.mark.parametrize(("is_pipe", "calls"), [(True, 25), (False, 2)])
def test_a_write_has_64_kib_and_to_a_pipe_as_many_bytes_as_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_pipe: bool, calls: int
) -> None:
    reading, writing = os.pipe() if is_pipe else (None, os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
    sizes: list[int] = []
    write = os.write

    def counted(descriptor: int, part: bytes) -> int:
        if descriptor == writing:
            sizes.append(len(part))
            return len(part)
        return write(descriptor, part)

    monkeypatch.setattr(os, "write", counted)
    writer = LineWriter(writing)
    assert writer.put([b"x" * 999 + b"\n"] * 100) == 0
    writer.close(10)
    assert (len(sizes), sum(sizes)) == (calls, 100_000)
    for descriptor in (reading, writing):
        if descriptor is not None:
            os.close(descriptor)
