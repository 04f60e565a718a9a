"""What the services of a process have in common, made once: the tables of a new catalogue, and the routes.

The migrations take 50 ms of a core for each new data folder, and FastAPI takes as much for the routes of each service.
"""

import secrets
import sqlite3
from contextlib import closing
from copy import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import FastAPI
from starlette.datastructures import State

from adapters.storage.sqlite_database import SqliteDatabase
from adapters.storage.store_identity import migration_lock
from app.http import application

_MIGRATE, _BUILD_ROUTES = SqliteDatabase._migrate, application.build_routes


class _Migrated(SqliteDatabase):
    """Database that is always migrated."""

    _migrate = _MIGRATE


@cache
def _catalog() -> bytes:
    """Return the file of a catalogue that this process has migrated."""
    with TemporaryDirectory() as folder:
        database = _Migrated(Path(folder))
        database.close()
        return database.path.read_bytes()


def _copy_or_migrate(database: SqliteDatabase, folder: Path) -> None:
    """Give a new catalogue its tables, and an id of its own; migrate one that exists."""
    with migration_lock(folder):
        is_new = not database.path.exists()
        if is_new:
            new = folder / "new-catalog"
            new.write_bytes(_catalog())
            with closing(sqlite3.connect(new)) as connection, connection:
                connection.execute("UPDATE catalog SET store_id = ?", (secrets.token_hex(16),))
            # At once: another process may look at the folder.
            new.rename(database.path)
    if not is_new:
        _MIGRATE(database, folder)


_routes = cache(_BUILD_ROUTES)


def _copy_routes() -> FastAPI:
    """Return an application with the routes of all, and a state of its own."""
    app = copy(_routes())
    app.state = State()
    return app


def copy_new_catalogs() -> None:
    """Let new catalogues of this process be copies from now on."""
    SqliteDatabase._migrate = _copy_or_migrate  # type: ignore[assignment,method-assign]


def share_routes() -> None:
    """Let the services of this process have the routes in common from now on."""
    application.build_routes = _copy_routes


def prepare_forks() -> None:
    """Make the routes, and load what migrations need, for the services that are forked from this process."""
    share_routes()
    _catalog()
    for route in _routes().routes:
        # FastAPI makes those of an included router when the first request arrives.
        if candidates := getattr(route, "effective_candidates", None):
            candidates()
