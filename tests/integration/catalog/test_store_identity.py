"""What the check of a store says of files that cannot be read, and of a catalogue without its row."""

import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters.catalog.catalog import Catalog
from adapters.errors import CatalogNotLoadable
from adapters.storage import store_identity
from adapters.storage.store_identity import check_store, complete_store, read_id
from app.processes.store_guard import guarded_store
from app.settings import Settings
from tests.integration.catalog.disk_calls import DiskCalls
from tests.support.catalog_factories import put
from tests.support.service import eventually


@pytest.fixture
def store(folder: Path, catalog: Catalog) -> Path:
    """A data folder with one adapter."""
    put(catalog, "acme")
    catalog.database.close()
    return folder


def _execute(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "catalog.sqlite3")) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints=1")
        connection.execute(statement)


def _without_constraints(folder: Path, values: str) -> None:
    """Put another row into the table `catalog`, which then has no constraints."""
    _execute(folder, "DROP TABLE catalog")
    _execute(folder, "CREATE TABLE catalog (id, revision, store_id)")
    _execute(folder, f"INSERT INTO catalog VALUES (1, {values})")


def _replace(path: Path, *, by_folder: bool) -> None:
    if path.is_dir():
        path.rename(path.with_name("moved"))
    else:
        path.unlink(missing_ok=True)
    if by_folder:
        path.mkdir()
    else:
        path.write_text("not a folder")


@pytest.mark.parametrize(
    ("name", "by_folder"), [("store-id", True), ("blobs/store-id", True), ("blobs", False)], ids=str
)
def test_a_file_in_place_of_a_folder_or_the_reverse_is_refused(store: Path, name: str, by_folder: bool) -> None:
    _replace(store / name, by_folder=by_folder)
    with pytest.raises(CatalogNotLoadable, match="cannot be read: "):
        check_store(store)
    with pytest.raises(CatalogNotLoadable), guarded_store(Settings(data_dir=store), accept_catalog=False):
        pass


def _forbidden(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    return call


@pytest.mark.parametrize("name", ["data/store-id", "blobs/store-id", "blobs", "catalog.sqlite3"])
def test_what_may_not_be_read_is_refused(store: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", _forbidden(Path.read_text, name))
    monkeypatch.setattr(Path, "stat", _forbidden(Path.stat, name))
    monkeypatch.setattr(os, "scandir", _forbidden(os.scandir, name))
    with pytest.raises(CatalogNotLoadable, match="cannot be read: Permission denied"):
        check_store(store)
    with (
        pytest.raises(CatalogNotLoadable, match="cannot be read: Permission denied"),
        guarded_store(Settings(data_dir=store), accept_catalog=False),
    ):
        pass


@pytest.mark.parametrize(
    ("values", "said"),
    [("NULL, 'id'", "its revision is NULL"), ("'x', 'id'", "its revision is not a whole"), ("1, 2", "its store id")],
)
def test_a_row_that_cannot_be_read_is_damage(store: Path, values: str, said: str) -> None:
    _without_constraints(store, values)
    with pytest.raises(CatalogNotLoadable, match=f"is damaged: {said}"):
        check_store(store)
    (store / "store-id").unlink()
    with pytest.raises(CatalogNotLoadable, match=f"is damaged: {said}"):
        complete_store(store)


@pytest.mark.parametrize(("change", "said"), [("DELETE FROM catalog", "no row"), (None, "no store id")])
def test_a_store_is_not_completed_without_its_row(store: Path, change: str | None, said: str) -> None:
    if change is None:
        _without_constraints(store, "1, NULL")
    else:
        _execute(store, change)
    (store / "store-id").unlink()
    with pytest.raises(CatalogNotLoadable, match=said):
        complete_store(store)
    assert read_id(store / "store-id") is None


def test_both_ids_are_synced_before_their_names(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [store / "store-id", store / "blobs" / "store-id"]
    for path in paths:
        path.unlink()
    calls = DiskCalls(monkeypatch)
    complete_store(store)
    for path in paths:
        calls.assert_durable(path)


def test_a_wait_for_a_migration_is_logged_once_and_not_given_up(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_identity, "_SECONDS_BEFORE_LOG", 0.1, raising=False)
    (store / "store-id").unlink()
    opened: list[Catalog] = []
    with (store / "migrate.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: opened.append(Catalog(store, now=lambda: 0.0)), daemon=True)
        thread.start()
        eventually(lambda: "another process that migrates" in caplog.text, seconds=10, what="a line in the log")
        assert thread.is_alive()
    thread.join(60)
    assert read_id(store / "store-id") is not None
    opened[0].database.close()
    waits = [record for record in caplog.records if "migrates" in record.getMessage()]
    assert [record.levelno for record in waits] == [logging.WARNING]
