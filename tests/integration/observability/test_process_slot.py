"""The files that processes leave for each other: whose they are, what goes on, and what no damage does."""

import errno
import json
import logging
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.observability.metrics.definitions import QUEUE_ROWS
from app.observability.metrics.metric_values import sum_values
from app.observability.metrics.process_slot import ProcessSlot, clean_slots
from app.observability.metrics.recorder import Metrics
from tests.support.metrics_exposition import Shown, series, shown_of

PUBLISHED = series("adapters_published_total", source="upload")


def _all(metrics: Metrics) -> Shown:
    return shown_of(sum_values(process.values for process in metrics.all_processes()))


@contextmanager
def _no_room() -> Iterator[None]:
    """No file of this process may grow past a byte: the writing call fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_each_process_of_a_role_has_a_place_of_its_own_and_sees_the_sum(tmp_path: Path) -> None:
    opened = [Metrics(tmp_path, role) for role in ("worker", "worker", "trainer")]
    assert [metrics.process for metrics in opened] == ["worker-1", "worker-2", "trainer-1"]
    for number, metrics in enumerate(opened, 1):
        metrics.record_publish(0.1, number)
    for metrics in opened:
        metrics.all_processes()  # which writes its own
    for metrics in opened:
        assert _all(metrics)[PUBLISHED] == 6
    for metrics in opened:
        metrics.close()


def test_a_process_that_takes_a_place_goes_on_from_what_was_counted_there(tmp_path: Path) -> None:
    watching, dying = Metrics(tmp_path, "worker"), Metrics(tmp_path, "worker")
    dying.record_publish(0.1, 5)
    dying.put(QUEUE_ROWS, 7)
    dying.close()
    shown = _all(watching)
    assert shown[PUBLISHED] == 5
    assert series("queue_rows") not in shown, "what it has waiting, it has no more"
    assert series("process_starts_total", process="worker-2") not in shown
    again = Metrics(tmp_path, "worker")
    again.record_publish(0.1, 1)
    shown = _all(again)
    assert shown[PUBLISHED] == 6
    assert shown[series("process_starts_total", process="worker-2")] == 2
    watching.close()
    again.close()


def test_a_service_that_is_started_begins_at_zero_unless_one_of_its_processes_lives(tmp_path: Path) -> None:
    for role in ("worker", "trainer"):
        metrics = Metrics(tmp_path, role)
        metrics.record_publish(0.1, 1)
        metrics.close()
    alive = Metrics(tmp_path, "trainer")
    for role in ("worker", "trainer"):
        clean_slots(tmp_path, role)
    assert _all(alive)[PUBLISHED] == 1
    alive.close()
    clean_slots(tmp_path, "trainer")
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"written_at": 1}', b"\xff" * 100, b'{"written_at": 1, "numbers": [[1]]}']
)
def test_a_damaged_file_counts_as_none_and_is_written_anew(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "worker-1.json").write_bytes(damage)
    (tmp_path / "worker-9.json").write_bytes(damage)
    metrics = Metrics(tmp_path, "worker")
    metrics.record_publish(0.1, 3)
    for _ in range(3):
        assert _all(metrics)[PUBLISHED] == 3
    assert len([record for record in caplog.records if "does not hold metrics" in record.message]) == 2
    assert (tmp_path / "worker-9.json").read_bytes() == damage, "another release may have written it"
    metrics.close()
    again = Metrics(tmp_path, "worker")
    assert again.process == "worker-1"
    assert _all(again)[PUBLISHED] == 3
    again.close()


def test_the_file_has_the_form_that_other_releases_read_and_write(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "trainer")
    metrics.record_publish(0.1, 3)
    metrics.close()
    content = json.loads((tmp_path / "trainer-1.json").read_bytes())
    assert content.keys() == {"written_at", "numbers", "tallies"}
    assert content["written_at"] == 0
    assert ["loraplex_adapters_published_total", ["upload"], 3.0] in content["numbers"]
    ((name, labels, counts, total),) = content["tallies"]
    assert (name, labels, sum(counts), total) == ("loraplex_publish_seconds", ["upload"], 1, pytest.approx(0.1))
    again = Metrics(tmp_path, "trainer")
    assert _all(again)[PUBLISHED] == 3
    again.close()


def test_a_scrape_during_the_end_does_not_write_that_the_process_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(tmp_path, "trainer")
    scrapes: list[threading.Thread] = []
    release = ProcessSlot.release

    def scrape_first(slot: ProcessSlot) -> None:
        scrapes.append(threading.Thread(target=metrics.all_processes))
        scrapes[-1].start()
        scrapes[-1].join(0.2)
        release(slot)

    monkeypatch.setattr(ProcessSlot, "release", scrape_first)
    metrics.close()
    scrapes[0].join()
    assert json.loads((tmp_path / "trainer-1.json").read_bytes())["written_at"] == 0


def test_counts_of_another_shape_are_no_metrics(tmp_path: Path) -> None:
    numbers = [["loraplex_adapters_published_total", ["upload"], [7]]]
    tallies = [["loraplex_publish_seconds", ["upload"], [[1]] * 15, 1]]
    (tmp_path / "worker-9.json").write_text(json.dumps({"written_at": 1, "numbers": numbers, "tallies": tallies}))
    metrics = Metrics(tmp_path, "worker")
    metrics.record_publish(0.1, 3)
    assert _all(metrics)[PUBLISHED] == 3
    metrics.close()


def test_what_is_not_ours_or_cannot_be_read_now_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    metrics, other = Metrics(tmp_path, "worker"), Metrics(tmp_path, "worker")
    other.record_publish(0.1, 4)
    other.close()
    assert _all(metrics)[PUBLISHED] == 4

    def too_many(_path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", too_many)
        assert PUBLISHED not in _all(metrics) or _all(metrics)[PUBLISHED] == 0
    assert _all(metrics)[PUBLISHED] == 4
    assert notes.read_text() == "{}"
    assert caplog.records
    assert all("cannot be read now" in record.message for record in caplog.records)
    metrics.close()


def test_a_full_disk_is_told_of_once_and_stops_nobody_from_counting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, "worker")
    with _no_room():
        for _ in range(3):
            metrics.record_publish(0.1, 1)
            shown = _all(metrics)
    assert shown[PUBLISHED] == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert list(tmp_path.glob("*.tmp")) == []
    metrics.close()
    later = Metrics(tmp_path, "worker")
    assert _all(later)[PUBLISHED] == 3
    later.close()


def test_a_folder_that_cannot_be_made_leaves_a_process_with_its_own_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    metrics = Metrics(tmp_path / "file", "worker")
    metrics.record_publish(0.1, 1)
    assert _all(metrics)[PUBLISHED] == 1
    assert len(caplog.records) == 1
    metrics.close()


def test_a_route_or_a_method_of_any_kind_adds_no_series_without_end() -> None:
    metrics = Metrics(None, "worker")
    for number in range(1000):
        metrics.record_requests(f"/made-up/{number}", f"M{number}", 404, [0.1])
    shown = _all(metrics)
    requests = {labels: value for (name, labels), value in shown.items() if name == "loraplex_requests_total"}
    assert len(requests) <= 201
    assert sum(requests.values()) == 1000
