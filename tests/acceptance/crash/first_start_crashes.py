"""Dies by `kill -9` at each step of opening a store: a new one up to its first upload, and one of an older release.

`python -m tests.acceptance.crash.first_start_crashes FOLDER` makes `FOLDER/new/N` and `FOLDER/old/N`, where a child
died before its Nth step, and says how many there are. A step is a file that is made, opened for writing, renamed,
removed or synced, a connection to the database, or a commit.
"""

import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from tests.acceptance.crash.crash_points import die
from tests.support.catalog_factories import migrate, put

_CALLS = {"os.mkdir", "os.rename", "os.remove", "sqlite3.connect", "fcntl.flock"}


def make_older(folder: Path) -> None:
    """A store as the release before store ids left it: with a blob of a crash, and half of one."""
    newer, blobs = folder.with_name(f"{folder.name}-newer"), folder / "blobs"
    catalog = Catalog(newer, now=time.time)
    for seed, name in enumerate(("acme", "zeta")):
        put(catalog, name, seed)
    catalog.close()
    blobs.mkdir(parents=True)
    migrate(folder / "catalog.sqlite3", "0002")
    with closing(sqlite3.connect(folder / "catalog.sqlite3", isolation_level=None)) as connection:
        connection.execute("ATTACH ? AS newer", (str(newer / "catalog.sqlite3"),))
        for table in ("adapters", "versions", "aliases"):
            columns = ", ".join(f'"{row[1]}"' for row in connection.execute(f"PRAGMA main.table_info({table})"))
            connection.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM newer.{table}")
        connection.execute("UPDATE catalog SET revision = (SELECT revision FROM newer.catalog)")
        for (file,) in connection.execute("SELECT file FROM main.versions").fetchall():
            plain = file.rpartition("-")[2]
            (newer / "blobs" / file).rename(blobs / plain)
            connection.execute("UPDATE main.versions SET file = ? WHERE file = ?", (plain, file))
    shutil.rmtree(newer)
    (blobs / ("0" * 32)).write_bytes(b"no row ever came")
    (blobs / ("1" * 32 + ".tmp")).write_bytes(b"half")


def _open(folder: Path) -> None:
    catalog = Catalog(folder, now=time.time)
    catalog.sweep()
    put(catalog, "first", 7)


def _die_before(step: int) -> None:
    """End this process before that step, counted from 1."""
    taken = 0

    def count(*_: object, **__: object) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            die()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _CALLS or writes:
            count()

    fsync = os.fsync

    def counted_fsync(descriptor: Any) -> None:
        count()
        fsync(descriptor)
        count()

    os.fsync = counted_fsync  # type: ignore[assignment]
    sa.event.listen(sa.Engine, "commit", count)
    sys.addaudithook(audit)


def _die_everywhere(folder: Path, make: Callable[[Path], object]) -> int:
    """Leave a folder for each step that `_open` takes; return how many it takes."""
    for step in range(1, 1000):
        store = folder / str(step)
        make(store)
        child = os.fork()
        if child == 0:
            _die_before(step)
            _open(store)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            shutil.rmtree(store)
            return step - 1
    raise AssertionError("there is no end to the steps")


def main() -> None:
    """Die at each step of both."""
    folder = Path(sys.argv[1])
    make_older(folder / "start")
    steps = {
        "new": _die_everywhere(folder / "new", lambda store: store.mkdir(parents=True)),
        "old": _die_everywhere(folder / "old", lambda store: shutil.copytree(folder / "start", store)),
    }
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
