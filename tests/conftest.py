"""Fixtures that all tests may use, and the groups in which tests run on one worker.

The process that only hands the tests to its workers reads this file too. Torch and the service take four seconds of a
core to import, and they are imported only where tests run.
"""

import gc
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import httpx._transports.default as httpx_transports
import pytest
from _pytest.nodeid import NodeId

from tests.support.storage_kinds import CLUSTER, POSTGRES, SQLITE

if TYPE_CHECKING:
    from app.service import Service
    from tests.support.object_server import ObjectServer
    from tests.support.postgres_server import PostgresServer

_TESTS = Path(__file__).parent

# Containers often switch bytecode files off. Then each worker rewrites all tests again, and each process that a test
# starts compiles the packages again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Several processes share the cores. OpenBLAS's threads then wait for one another, and a regression of scikit-learn
# takes ten seconds instead of a hundredth.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# httpx reads the certificates of the authorities for each client anew, which takes 20 ms of a core.
httpx_transports.create_ssl_context = cache(httpx.create_ssl_context)  # type: ignore[attr-defined]

_SAMPLED = [_TESTS / "integration" / name for name in ("access", "hostile")]
"""Folders whose tests, each with one of its parameters, run on PostgreSQL and a bucket too."""
_KINDS = ("acceptance", "integration", "unit")
"""In the order in which they run: the longest groups first, so that no worker is left with one at the end."""


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Leave the tests and what they import, a million objects, out of all later garbage collections."""
    gc.disable()
    try:
        if session.config.getoption("dist", "no") == "no":
            _prepare_process()
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _prepare_process() -> None:
    """Let what tests start in this process share what is the same for all."""
    import torch

    from tests.support.fork_server import fork_children_of_the_tests
    from tests.support.service_templates import copy_new_catalogs, share_routes

    torch.set_num_threads(1)
    fork_children_of_the_tests()
    copy_new_catalogs()
    share_routes()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the group whose tests run on one worker, because they share fixtures.

    That is the folder of the package fixture that it uses, and otherwise its file. A slow test that shares nothing is a
    group of its own. A test file may set another group by `pytest.mark.xdist_group`.
    """
    _sample(items)
    for item in items:
        if _needs_server(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: _KINDS.index(item.path.relative_to(_TESTS).parts[0]))
    if not items or not hasattr(items[0].config, "workerinput"):
        return
    # The groups of whole folders are the longest.
    items.sort(key=lambda item: not _fixtures_of(item, "package"))
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        group = marker.args[0] if marker else _group_of(item)
        # pytest-xdist 3.8 appends the group to an attribute that pytest 9.2 does not read.
        item._id = NodeId.parse(f"{item.nodeid}@{group}")


def _is_sampled(item: pytest.Item) -> bool:
    """Return whether a test runs with one of its parameters on PostgreSQL and a bucket, besides its mark."""
    return item.path.parent in _SAMPLED and item.get_closest_marker("only_on_sqlite") is None


def _sample(items: list[pytest.Item]) -> None:
    """Leave one item on PostgreSQL and a bucket of each function that has many parameters."""
    if os.environ.get("TESTS_DATABASE"):
        return
    functions: set[str] = set()
    kept = []
    for item in items:
        if _database_of(item) == CLUSTER and _is_sampled(item) and not item.get_closest_marker("on_both_storages"):
            function = item.nodeid.partition("[")[0]
            if function in functions:
                continue
            functions.add(function)
        kept.append(item)
    items[:] = kept


def _fixtures_of(item: pytest.Item, *scopes: str) -> list[str]:
    """The folders or files of its fixtures of these scopes."""
    # pytest has no public call that tells a fixture's scope.
    definitions = [definition[-1] for definition in item._fixtureinfo.name2fixturedefs.values()]  # type: ignore[attr-defined]
    return sorted(definition.baseid for definition in definitions if definition.scope in scopes)


def _database_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("database_kind")


def _needs_server(item: pytest.Item) -> bool:
    """Return whether a test uses PostgreSQL or a bucket."""
    callspec = getattr(item, "callspec", None)
    is_bucket = callspec is not None and callspec.params.get("location") == "bucket"
    fixtures = getattr(item, "fixturenames", ())
    return is_bucket or _database_of(item) in (POSTGRES, CLUSTER) or not {"postgres_server", "s3"}.isdisjoint(fixtures)


def _group_of(item: pytest.Item) -> str:
    packages = _fixtures_of(item, "package")
    if (kind := _database_of(item)) in (POSTGRES, CLUSTER):
        return str(kind)  # they share a server
    if "s3" in getattr(item, "fixturenames", ()):
        return CLUSTER
    if packages:
        return packages[0]
    is_alone = item.get_closest_marker("slow") is not None and not _needs_server(item)
    if is_alone and not _fixtures_of(item, "module", "class"):
        return item.nodeid
    return item.path.relative_to(_TESTS).as_posix()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests that are marked `on_both_databases` or `on_both_storages` once on each."""
    marked = metafunc.definition.get_closest_marker
    marks = {"only_on_sqlite": [SQLITE], "on_both_storages": [SQLITE, CLUSTER], "on_both_databases": [SQLITE, POSTGRES]}
    kinds = next((kinds for mark, kinds in marks.items() if marked(mark)), None)
    if kinds is None and _is_sampled(metafunc.definition):
        kinds = [SQLITE, CLUSTER]
    if "database_kind" in metafunc.fixturenames and kinds:
        chosen = os.environ.get("TESTS_DATABASE")
        metafunc.parametrize("database_kind", [chosen] if chosen and len(kinds) > 1 else kinds, indirect=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator["PostgresServer"]:
    """A PostgreSQL server, which the tests of one worker share."""
    from tests.support.postgres_server import PostgresServer

    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ObjectServer"]:
    """An S3 server, which the tests of one worker share; the variables of this process name it."""
    # What it needs is an extra.
    from tests.support.object_server import object_server

    with object_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def database_kind(request: pytest.FixtureRequest) -> str:
    """The storage of a test: SQLite and a folder, unless a mark or `TESTS_DATABASE` asks for another."""
    return str(getattr(request, "param", os.environ.get("TESTS_DATABASE", SQLITE)))


@pytest.fixture
def data_folder(request: pytest.FixtureRequest, tmp_path: Path, database_kind: str) -> Path:
    """A data folder, whose catalogue and blobs are where the test has them."""
    folder = tmp_path / "data"
    place_storage(request, folder, database_kind)
    return folder


NewFolder = Callable[[str], Path]


@pytest.fixture(scope="session")
def new_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, database_kind: str
) -> NewFolder:
    """Make a data folder like `data_folder`, for fixtures that tests share."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "data"
        place_storage(request, folder, database_kind)
        return folder

    return make


def place_storage(request: pytest.FixtureRequest, folder: Path, kind: str) -> None:
    """Give a folder a database and a bucket of its own, as its kind of storage has them."""
    from tests.support.databases import place_bucket, place_database

    if kind in (POSTGRES, CLUSTER):
        place_database(folder, request.getfixturevalue("postgres_server").new_database())
    if kind == CLUSTER:
        request.getfixturevalue("s3")
        from tests.support.object_server import new_url

        place_bucket(folder, new_url())


Serve = Callable[..., "tuple[httpx.Client, Service]"]


@pytest.fixture
def serve(data_folder: Path) -> Iterator[Serve]:
    """Start one worker with these settings, in this process; `trainer=True` trains too."""
    from app.settings import Settings
    from tests.support.databases import database_settings
    from tests.support.service import serving

    with ExitStack() as stack:

        def start(
            *, trainer: bool = False, own_fitter: bool = False, **settings: Any
        ) -> "tuple[httpx.Client, Service]":
            chosen: dict[str, Any] = {"data_dir": data_folder, "base": "random:10,2,42"} | settings
            chosen = database_settings(data_folder) | chosen
            return stack.enter_context(serving(Settings(**chosen), trainer=trainer, own_fitter=own_fitter))

        yield start


@pytest.fixture
def client(serve: Serve) -> httpx.Client:
    """A client of one worker with a random 10 → 2 base layer, without a trainer."""
    return serve()[0]
