"""What a supervisor notes in the data folder while it runs, and what it checks after one that did not end cleanly."""

import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from adapters.catalog.catalog import Catalog
from adapters.errors import CatalogNotLoadable
from app.processes import store_guard
from app.processes.store_guard import guarded_store
from app.settings import Settings
from tests.support.catalog_factories import put
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

BASE = "random:10,2,42"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a folder with a catalogue of one adapter."""
    catalog = Catalog(tmp_path / "data", now=lambda: 0.0)
    put(catalog, "acme")
    catalog.database.close()
    return Settings(data_dir=tmp_path / "data", base=BASE)


@pytest.fixture
def is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every catalogue is too large to be checked before the start."""
    monkeypatch.setattr(store_guard, "MAX_BYTES_AT_START", 0)


@pytest.fixture
def damaged(settings: Settings) -> Settings:
    """A page of its table of versions is no page."""
    catalog = settings.data_dir / "catalog.sqlite3"
    with closing(sqlite3.connect(catalog)) as connection:
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'versions'").fetchone()
    with catalog.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)
    return settings


def _marks(settings: Settings) -> set[str]:
    return {path.name for path in (settings.data_dir / "running").iterdir()}


def _abandon(settings: Settings) -> str:
    """Leave what a supervisor leaves that was killed."""
    mark = settings.data_dir / "running" / "killed.lock"
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    return mark.name


def test_each_of_several_processes_has_a_mark_until_it_ends(settings: Settings) -> None:
    with guarded_store(settings, accept_catalog=False):
        with guarded_store(settings, accept_catalog=False):
            assert len(_marks(settings)) == 2
        assert len(_marks(settings)) == 1
    assert _marks(settings) == set()


def test_a_damaged_page_stops_the_start_and_the_next_one(damaged: Settings) -> None:
    for _ in range(2):
        with pytest.raises(CatalogNotLoadable, match="damaged"), guarded_store(damaged, accept_catalog=False):
            pass
    assert not (damaged.data_dir / "running").exists()


def test_a_large_catalogue_is_checked_after_an_unclean_end_only(
    damaged: Settings, is_large: None, caplog: pytest.LogCaptureFixture
) -> None:
    with guarded_store(damaged, accept_catalog=False):
        pass
    assert "damaged" not in caplog.text
    mark = _abandon(damaged)
    for _ in range(2):
        # It is checked again until it is sound: the mark stays.
        caplog.clear()
        with guarded_store(damaged, accept_catalog=False):
            eventually(lambda: "damaged" in caplog.text, seconds=30, what="the finding")
        assert caplog.records[-1].levelno == logging.ERROR
        assert _marks(damaged) == {mark}


def test_a_sound_large_catalogue_is_checked_once(settings: Settings, is_large: None) -> None:
    mark = _abandon(settings)
    with guarded_store(settings, accept_catalog=False):
        eventually(lambda: mark not in _marks(settings), seconds=30, what="the end of the check")
    assert _marks(settings) == set()


def test_a_killed_service_leaves_its_mark_and_the_next_end_removes_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with ServiceProcess(folder, base=BASE, trainers=0) as service:
        assert len(list((folder / "running").iterdir())) == 1
        service.kill_group()
    (mark,) = (folder / "running").iterdir()
    with ServiceProcess(folder, base=BASE, trainers=0):
        assert not mark.exists()
        assert len(list((folder / "running").iterdir())) == 1
    assert list((folder / "running").iterdir()) == []


def test_the_quarantine_is_purged_while_the_service_runs(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_guard, "_SECONDS_BETWEEN_PURGES", 0.05)
    old = settings.data_dir / "quarantine" / "20010909T014640Z-orphan"
    old.parent.mkdir()
    with guarded_store(settings, accept_catalog=False):
        old.write_bytes(b"orphan")
        eventually(lambda: not old.exists(), seconds=30, what="the purge")
    shutil.rmtree(old.parent)
