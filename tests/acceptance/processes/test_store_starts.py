"""A start on a catalogue and blobs that do not belong together is refused; nothing is lost by it."""

import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from adapters.storage.quarantine import Quarantine
from app.bootstrap import open_catalog
from app.processes.store_guard import guarded_store
from app.settings import EXIT_CONFIG, Settings
from tests.support.deadlines import scaled
from tests.support.service import LORAPLEX, ServiceProcess, environment, eventually, free_port, serving

pytestmark = pytest.mark.slow

BASE = "random:10,2,42"
NAMES = ("first", "second", "third")
ROWS = [[0.5] * 10]


def _upload(client: httpx.Client, name: str, value: float) -> str:
    answer = client.put(f"/adapters/{name}", json={"A": [[value]] * 2, "B": [[value] * 10]}).raise_for_status()
    return str(answer.json()["digest"])


def _process(folder: Path) -> ServiceProcess:
    return ServiceProcess(folder, base=BASE, trainers=0)


@contextmanager
def _service(folder: Path, *, accept_catalog: bool = False) -> Iterator[httpx.Client]:
    """Run a service in this process, after the checks of `loraplex serve`."""
    settings = Settings(data_dir=folder, base=BASE)
    with guarded_store(settings, accept_catalog=accept_catalog), serving(settings) as (client, _):
        yield client


def _refused(folder: Path, command: str = "serve") -> str:
    """What a start says that is refused at once."""
    port = ["--port", str(free_port())] if command == "serve" else []
    ended = subprocess.run(
        [LORAPLEX, command, "--data-dir", folder, *port],
        env=environment(base=BASE),
        capture_output=True,
        text=True,
        timeout=scaled(60),
    )
    assert ended.returncode == EXIT_CONFIG, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def _count_blobs(folder: Path) -> int:
    return len(list((folder / "blobs").iterdir()))


def _blobs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "blobs").iterdir()}


def _quarantined(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "quarantine").glob("*"))


def _kept(folder: Path) -> list[Path]:
    return list((folder / "quarantine").glob("kept-*/*"))


@contextmanager
def _accepting(folder: Path) -> Iterator[httpx.Client]:
    """A service that was started with `--accept-catalog`."""
    port = free_port()
    with (folder.parent / "accepting.log").open("wb") as log:
        process = subprocess.Popen(
            [LORAPLEX, "serve", "--accept-catalog", "--data-dir", folder, "--port", str(port)],
            env=environment(base=BASE, trainers=0),
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(600):
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    assert process.poll() is None, (folder.parent / "accepting.log").read_text()
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        assert process.wait(scaled(60)) == 0


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of services that have ended: `live`, its catalogue of `before` the last upload, and `other`."""
    folder = tmp_path_factory.mktemp("stores")
    with _service(folder / "live") as client:
        for value, name in enumerate(NAMES, 1):
            _upload(client, name, value)
        with closing(sqlite3.connect(folder / "live" / "catalog.sqlite3", timeout=15)) as live:
            (folder / "before").mkdir()
            with closing(sqlite3.connect(folder / "before" / "catalog.sqlite3")) as copy:
                live.backup(copy)
        for value in (4, 5):
            _upload(client, "late", value)
    with _service(folder / "other") as client:
        _upload(client, "stranger", 9)
    return {name: folder / name for name in ("live", "before", "other")}


@pytest.fixture
def folder(stores: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the live store, whose service has ended."""
    return Path(shutil.copytree(stores["live"], tmp_path / "data"))


def _remove(catalog: Path, stores: dict[str, Path]) -> None:
    catalog.unlink()


def _truncate(catalog: Path, stores: dict[str, Path]) -> None:
    catalog.write_bytes(b"")


def _cut_short(catalog: Path, stores: dict[str, Path]) -> None:
    catalog.write_bytes(catalog.read_bytes()[:8192])


def _replace_by_older(catalog: Path, stores: dict[str, Path]) -> None:
    shutil.copyfile(stores["before"] / "catalog.sqlite3", catalog)


def _replace_by_others(catalog: Path, stores: dict[str, Path]) -> None:
    shutil.copyfile(stores["other"] / "catalog.sqlite3", catalog)


def _replace_by_tableless(catalog: Path, stores: dict[str, Path]) -> None:
    catalog.unlink()
    with closing(sqlite3.connect(catalog)) as connection:
        connection.execute("CREATE TABLE notes (text)")


@pytest.mark.parametrize(
    ("change", "said", "command"),
    [
        (_remove, "missing or empty", "serve"),
        (_remove, "missing or empty", "trainer"),
        (_truncate, "missing or empty", "serve"),
        (_cut_short, "is damaged", "serve"),
        (_replace_by_tableless, "missing or empty", "serve"),
        (_replace_by_older, "older than the blobs", "serve"),
        (_replace_by_others, "belongs to the store", "serve"),
    ],
)
def test_a_start_without_its_catalogue_is_refused_and_loses_nothing(
    folder: Path, stores: dict[str, Path], change: Callable[[Path, dict[str, Path]], None], said: str, command: str
) -> None:
    catalog, before = folder / "catalog.sqlite3", _blobs(folder)
    change(catalog, stores)
    left = catalog.read_bytes() if catalog.exists() else None
    message = _refused(folder, command)
    assert said in message
    assert "docs/operations.md" in message
    assert ("--accept-catalog" in message) == (change is not _cut_short)
    assert _blobs(folder) == before
    assert (catalog.read_bytes() if catalog.exists() else None) == left
    # With its own catalogue it starts, and all is there.
    if change is _remove and command == "serve":
        shutil.copyfile(stores["live"] / "catalog.sqlite3", catalog)
        with _process(folder) as service:
            for reference in (*NAMES, "late@1", "late@2"):
                answer = service.client.post("/predict", json={"adapter": reference, "inputs": ROWS})
                assert answer.status_code == 200, answer.text
        assert _quarantined(folder) == []


def test_an_accepted_catalogue_starts_from_then_on_and_its_orphans_are_in_quarantine(
    folder: Path, stores: dict[str, Path]
) -> None:
    _replace_by_older(folder / "catalog.sqlite3", stores)
    before = _blobs(folder)
    with _accepting(folder) as client:
        assert [adapter["name"] for adapter in client.get("/adapters").json()["data"]] == sorted(NAMES)
        assert client.post("/predict", json={"adapter": "third", "inputs": ROWS}).status_code == 200
        assert client.get("/adapters/late").status_code == 404
    orphans = before.keys() - _blobs(folder).keys()
    assert len(orphans) == 2
    assert {path.name for path in _kept(folder)} == orphans
    with _service(folder) as client:
        assert _upload(client, "late", 4).startswith("sha256:")


def test_a_missing_catalogue_can_be_accepted_too_and_deletes_nothing(folder: Path) -> None:
    (folder / "catalog.sqlite3").unlink()
    contents = {content for name, content in _blobs(folder).items() if name != "store-id"}
    with _service(folder, accept_catalog=True) as client:
        assert client.get("/adapters").json()["data"] == []
    # They stay, although their days are over.
    Quarantine(folder, now=lambda: 1e10, days=0).purge()
    assert {path.read_bytes() for path in _kept(folder)} == contents
    with _service(folder) as client:
        assert client.get("/adapters").json()["data"] == []


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "another folder"])
def test_a_start_before_its_blobs_are_mounted_is_refused(
    folder: Path, stores: dict[str, Path], tmp_path: Path, instead: str
) -> None:
    blobs, catalog = folder / "blobs", (folder / "catalog.sqlite3").read_bytes()
    blobs.rename(tmp_path / "unmounted")
    if instead == "an empty folder":
        blobs.mkdir()
    elif instead == "another folder":
        shutil.copytree(stores["other"] / "blobs", blobs)
    left = _blobs(folder) if blobs.exists() else None
    assert "--accept-catalog" in _refused(folder)
    assert (folder / "catalog.sqlite3").read_bytes() == catalog
    assert (_blobs(folder) if blobs.exists() else None) == left
    shutil.rmtree(blobs, ignore_errors=True)
    (tmp_path / "unmounted").rename(blobs)
    if instead == "nothing":
        with _service(folder) as client:
            assert client.post("/predict", json={"adapter": "first", "inputs": ROWS}).status_code == 200


def test_blobs_that_are_mounted_after_a_first_start_without_them_are_not_taken_for_orphans(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    with _service(folder):
        pass
    shutil.rmtree(folder / "blobs")
    shutil.copytree(stores["live"] / "blobs", folder / "blobs")
    (folder / "blobs" / "store-id").unlink(missing_ok=True)  # as an older release left them
    before = _blobs(folder)
    assert "--accept-catalog" in _refused(folder)
    assert _blobs(folder) == before


def test_a_restore_made_while_the_service_published_starts_and_has_what_the_copy_has(tmp_path: Path) -> None:
    live, restored = tmp_path / "live", tmp_path / "restored"
    restored.mkdir()
    with _service(live) as client:
        _upload(client, "kept", 1)
        stop = threading.Event()

        def publish() -> None:
            value = 2
            with httpx.Client(base_url=client.base_url, timeout=60) as another:
                while not stop.is_set():
                    _upload(another, "kept", value)
                    value += 1

        publisher = threading.Thread(target=publish)
        publisher.start()
        try:
            eventually(lambda: _count_blobs(live) > 3, what="a few versions")
            # As docs/operations.md says: first the catalogue, then the blobs.
            with (
                closing(sqlite3.connect(live / "catalog.sqlite3", timeout=15)) as source,
                closing(sqlite3.connect(restored / "catalog.sqlite3")) as copy,
            ):
                source.backup(copy)
                versions = copy.execute("SELECT version FROM versions").fetchall()
            newest = _count_blobs(live)
            eventually(lambda: _count_blobs(live) > newest + 3, what="versions after the copy of the catalogue")
            shutil.copytree(live / "blobs", restored / "blobs", ignore=shutil.ignore_patterns("*.tmp"))
        finally:
            stop.set()
            publisher.join(60)
    assert len(versions) > 1
    newer = len(_blobs(restored)) - len(versions) - 1
    assert newer > 1
    for _ in range(2):
        with _service(restored) as client:
            for (number,) in versions:
                answer = client.post("/predict", json={"adapter": f"kept@{number}", "inputs": ROWS})
                assert answer.status_code == 200, answer.text
            # As a process of the service does soon after its start.
            with closing(open_catalog(Settings(data_dir=restored, base=BASE))) as catalog:
                catalog.sweep_once()
            assert len(_quarantined(restored)) == newer


def _damage_a_page(catalog: Path) -> None:
    """Overwrite the first page of the table of versions."""
    with closing(sqlite3.connect(catalog)) as connection:
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'versions'").fetchone()
    content = bytearray(catalog.read_bytes())
    content[(page - 1) * size : page * size] = b"\xa5" * size
    catalog.write_bytes(content)


@pytest.mark.parametrize("command", ["serve", "trainer"])
def test_a_damaged_page_of_the_catalogue_is_found_at_the_start(folder: Path, command: str) -> None:
    _damage_a_page(folder / "catalog.sqlite3")
    before = _blobs(folder)
    message = _refused(folder, command)
    assert "is damaged" in message
    assert "backup" in message
    assert _blobs(folder) == before


@pytest.mark.parametrize("name", ["writers", "blobs"])
def test_a_start_on_a_folder_with_other_kinds_of_entries_says_so(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).touch()
    assert name in _refused(folder)
