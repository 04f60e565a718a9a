"""The scrub reads every blob within its days, goes on after a restart, and reports what it finds once."""

import fcntl
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from adapters.access.usage import Usage
from adapters.maintenance import scrub as scrubbing
from adapters.maintenance.scrub import ScrubState, read_state, scrub
from app.bootstrap import open_catalog
from app.processes import worker
from app.settings import Settings
from tests.conftest import Serve
from tests.integration.maintenance.conftest import Filled
from tests.support.catalog_factories import make_adapter, publication, put

DAY = 86_400


class _Clock:
    seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def test_a_pass_takes_half_of_the_days_and_reads_every_blob_once(filled: Filled, clock: _Clock) -> None:
    read = []
    for day in range(16):
        clock.seconds = 1e9 + day * DAY
        read.append(scrub(filled.folder, days=30, now=clock))
    # Three of the six blobs by the middle of the fifteen days.
    assert (read[0], sum(read[:8]), sum(read)) == (0, 3, 6)
    assert read_state(filled.folder) == ScrubState(began_at=clock.seconds, finished_at=clock.seconds)
    clock.seconds += 1 * DAY
    put(filled.catalog, "late", 9)
    clock.seconds += 14 * DAY
    assert scrub(filled.folder, days=30, now=clock) == 7


def test_damage_is_logged_once_and_forgotten_when_it_is_repaired(
    filled: Filled, clock: _Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    filled.blob(filled.acme.file).write_bytes(bytes(filled.acme.bytes))
    filled.blob(filled.rows).unlink()
    for _ in range(3):
        scrub(filled.folder, days=2, now=clock)
        clock.seconds += DAY
    scrub(filled.folder, days=2, now=clock)
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2
    assert any("the scrub found damage: adapter acme@1: the bytes 0 to" in line for line in logged)
    assert any("the scrub found damage: data set rows@1: the file" in line for line in logged)
    assert set(read_state(filled.folder).damaged) == {filled.acme.file, filled.rows}
    # An upload of the same bytes repairs the one, and a deletion removes the other.
    filled.catalog.put(publication("acme", adapter=make_adapter(1)), tenant="default")
    filled.execute("DELETE FROM dataset_versions")
    scrub(filled.folder, days=2, now=clock)
    assert read_state(filled.folder).damaged == {}


@pytest.mark.parametrize("stored", ["", "{", "[]", '{"began_at": "x"}', '{"else": 1}', json.dumps({"position": 3})])
def test_a_state_that_cannot_be_read_begins_anew(filled: Filled, clock: _Clock, stored: str) -> None:
    (filled.folder / "scrub.json").write_text(stored)
    assert read_state(filled.folder) == ScrubState()
    assert scrub(filled.folder, days=1, now=clock) == 0
    clock.seconds += DAY / 2
    assert scrub(filled.folder, days=1, now=clock) == 6


def test_one_process_scrubs_at_a_time_and_a_clock_that_went_back_begins_anew(filled: Filled, clock: _Clock) -> None:
    scrub(filled.folder, days=1, now=clock)
    clock.seconds += DAY
    with (filled.folder / "scrub.json").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert scrub(filled.folder, days=1, now=clock) == 0
    clock.seconds -= 2 * DAY
    assert scrub(filled.folder, days=1, now=clock) == 0
    assert read_state(filled.folder).began_at == clock.seconds


def test_what_a_stopped_scrub_has_read_is_not_read_again(
    filled: Filled, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    scrub(filled.folder, days=1, now=clock)
    clock.seconds += DAY
    left = iter([False, False, True])
    assert scrub(filled.folder, days=1, now=clock, stop=lambda: next(left)) == 2
    assert scrubbing.read_state(filled.folder).finished_at is None
    assert scrub(filled.folder, days=1, now=clock) == 4
    assert scrubbing.read_state(filled.folder).finished_at == clock.seconds


def test_the_metrics_show_what_the_scrub_found(serve: Serve) -> None:
    client, service = serve()
    (service.settings.data_dir / "scrub.json").write_text(json.dumps({"finished_at": 5.0, "damaged": {"a": "b"}}))
    lines = client.get("/metrics").text.splitlines()
    assert "loraplex_scrub_damaged_blobs 1.0" in lines
    assert "loraplex_scrub_finished_timestamp_seconds 5.0" in lines


def test_the_first_worker_purges_the_trash_and_scrubs(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class _Ended(Exception):
        """Raised in place of the third pause."""

    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            (filled.folder / "scrub.json").unlink()
            (filled.folder / "scrub.json").mkdir()
        if len(pauses) == 3:
            raise _Ended

    monkeypatch.setattr("app.processes.worker.time.sleep", pause)
    settings = Settings(data_dir=filled.folder, trash_days=0)
    catalog = open_catalog(settings)
    with closing(catalog), ThreadPoolExecutor(1) as thread, pytest.raises(_Ended):
        thread.submit(worker._maintain, catalog, Usage(catalog.database, now=time.time), settings).result()
    assert filled.execute("SELECT count(*) FROM trashed_versions") == [(0,)]
    assert "the data folder cannot be maintained now" in caplog.text
