"""`PUT /datasets/{name}`: bombs, headers that lie, what only looks like a table, and clients that go away."""

import io
import os
import socket
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pytest

from app.service import Service
from tests.conftest import NewFolder
from tests.integration.hostile.case import Case, Target, problem_of
from tests.integration.hostile.conftest import settings_for
from tests.support.catalog_factories import stored_files
from tests.support.data_set_files import arrow_stream, lists, npz, parquet
from tests.support.fork_server import own_starts
from tests.support.service import eventually, serving
from tests.support.slow_data_set import reader_of, slow_parquet
from tests.unit.adapters.datasets.test_npz import header, zipped

CSV, JSONL, PARQUET = "text/csv", "application/x-ndjson", "application/vnd.apache.parquet"
ARROW, NPZ = "application/vnd.apache.arrow.stream", "application/x-npz"
MAX_DATASET_BYTES = 2**25
_MEMORY_BYTES = 2**29


@pytest.fixture(scope="module")
def tried(new_folder: NewFolder) -> Iterator[Target]:
    """One worker with an adapter and a data set: no case may change it."""
    settings = settings_for(
        new_folder("datasets"),
        feature_space=None,
        max_dataset_bytes=MAX_DATASET_BYTES,
        trainer_memory_bytes=_MEMORY_BYTES,
    )
    with serving(settings) as (client, service):
        client.put("/adapters/acme", json={"A": [[1.0], [0.5]], "B": [[1.0] * 10]}).raise_for_status()
        client.put("/datasets/kept", content=b"x\n1\n", headers={"Content-Type": CSV}).raise_for_status()
        target = Target(client, service, ["acme"])
        yield target
        target.is_untouched()
        assert [entry["name"] for entry in client.get("/datasets").json()["data"]] == ["kept"]


def _case(
    title: str,
    kind: str,
    body: bytes | Callable[[], bytes],
    *says: str,
    field: str | None = None,
    row: int | None = None,
) -> Case:
    return Case(
        name=title,
        method="PUT",
        path="/datasets/fresh",
        code="invalid_dataset",
        says=says,
        field=field,
        row=row,
        body=body,
        headers={"Content-Type": kind},
    )


def _constant(rows: int) -> bytes:
    """Parquet with equal rows."""
    return parquet(pa.table({"x": np.zeros(rows, np.int64)}), row_group_size=rows)


def _pickled(name: str) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.array([{"a": 1}], dtype=object)}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _arrow_claiming(length: int) -> bytes:
    """An Arrow stream whose batch claims another length."""
    stream = arrow_stream(pa.table({"x": pa.array([7] * 77, pa.int64())}))
    field_node = struct.pack("<qq", 77, 0)
    assert stream.count(field_node) == 1
    return stream.replace(field_node, struct.pack("<qq", length, 0))


_PARQUET = parquet(pa.table({"x": [1.5, 2.5], "t": ["a", "b"]}))
_ENDS_IN = len(_PARQUET) - 8

BOMBS = [
    _case("80 bytes that claim 32 GiB", NPZ, zipped({"x.npy": header((2**32,))[:80]}), "x"),
    _case("a header that claims 32 GiB", NPZ, zipped({"x.npy": header((2**32,))}), "'x'", "34359738368"),
    _case("a shape past any number", NPZ, zipped({"x.npy": header((2**62, 2**62))}), "'x'"),
    _case(
        "a zip bomb",
        NPZ,
        lambda: zipped({"x.npy": header((2**23,)) + bytes(2**26)}, zipfile.ZIP_DEFLATED),
        str(MAX_DATASET_BYTES),
    ),
    _case("20,000 members", NPZ, lambda: zipped({f"{n}.npy": b"" for n in range(20_000)}), "20000 columns"),
    _case("a Parquet bomb", PARQUET, lambda: _constant(10_000_000), str(MAX_DATASET_BYTES)),
    _case(
        "a Parquet bomb of lists",
        PARQUET,
        lambda: parquet(pa.table({"x": lists([[0.0] * 100_000] * 100, pa.float64())})),
        str(MAX_DATASET_BYTES),
    ),
    _case(
        "a packed Arrow bomb",
        ARROW,
        lambda: arrow_stream(pa.table({"x": np.zeros(10**7)}), compression="zstd"),
        "bytes",
    ),
    _case("a batch that claims 2^40 rows", ARROW, _arrow_claiming(2**40), "Arrow"),
    _case("a batch that claims minus one rows", ARROW, _arrow_claiming(-1), "Arrow"),
    _case("a million columns of CSV", CSV, lambda: b",".join(b"c%d" % n for n in range(10**6)) + b"\n", "columns"),
    _case("20,000 keys", JSONL, lambda: b"{%s}" % b",".join(b'"%d":1' % n for n in range(20_000)), "columns"),
    _case(
        "20,000 columns of Parquet", PARQUET, lambda: parquet(pa.table({f"{n}": [1] for n in range(20_000)})), "columns"
    ),
    _case("a line that never ends", JSONL, lambda: b'{"x":"' + b"a" * (2**24 + 1), "line 1"),
    _case("a quote that never ends", CSV, lambda: b'x\n"' + b"a\n" * 2**21, "quote"),
]

LIES = [
    _case("a pickled array", NPZ, _pickled("danger"), "danger", "pickle", field="danger"),
    _case("a pickle", NPZ, b"\x80\x04\x95\x00\x00.", "NPZ", field="body"),
    _case("an array alone", NPZ, header((1,)) + bytes(8), "NPZ", field="body"),
    _case("Parquet as CSV", CSV, _PARQUET, "CSV", field="body"),
    _case("Parquet as Arrow", ARROW, _PARQUET, "Arrow", field="body"),
    _case("CSV as Parquet", PARQUET, b"x\n1\n", "Parquet", field="body"),
    _case("a footer longer than the file", PARQUET, _PARQUET[:_ENDS_IN] + b"\xff\xff\xff\x7fPAR1", "Parquet"),
    _case("a footer of noughts", PARQUET, b"PAR1" + bytes(64) + struct.pack("<I", 64) + b"PAR1", "Parquet"),
    _case("a truncated NPZ", NPZ, npz(x=np.arange(1000.0))[:-30], "NPZ"),
    _case("a truncated Parquet", PARQUET, _PARQUET[:-30], "Parquet"),
    _case("a truncated Arrow stream", ARROW, arrow_stream(pa.table({"x": np.arange(99.0)}))[:-200], "Arrow"),
    _case("nothing at all", CSV, b"", "first line"),
    _case("only a name", CSV, b"x\n", "no rows"),
    _case("a name with a NUL, CSV", CSV, b"a\0b\n1\n", "NUL"),
    _case("a name with a NUL, JSON lines", JSONL, b'{"a\\u0000b": 1}', "column 0"),
    _case("a name with a NUL, Arrow", ARROW, arrow_stream(pa.table({"a\0b": [1]})), "column 0"),
    _case("a name of blanks", ARROW, arrow_stream(pa.table({" ": [1]})), "column 0"),
    _case("a name twice, CSV", CSV, b"x,y,x\n1,2,3\n", "'x'"),
    _case("a name twice, Arrow", ARROW, arrow_stream(pa.table([[1], [2]], names=["x", "x"])), "'x'"),
    _case("a name twice, Parquet", PARQUET, parquet(pa.table([[1], [2]], names=["x", "x"])), "'x'"),
    _case("bytes that are no text", CSV, b"x,y\n1,\xc3\x28\n", "UTF-8", row=0),
    _case("a name that leads upwards", NPZ, zipped({"../x": b""}), "not a .npy"),
    _case("structs", ARROW, arrow_stream(pa.table({"s": [{"a": 1}]})), "'s'", field="s"),
]


@pytest.mark.parametrize("case", BOMBS + LIES, ids=lambda case: case.name)
def test_it_is_refused_and_nothing_stays(tried: Target, case: Case) -> None:
    tried.refuses(case)
    assert list((tried.service.settings.data_dir / "tmp").iterdir()) == []


def test_a_file_name_that_leads_upwards_writes_nothing(tried: Target) -> None:
    content = zipped({"../../escaped.npy": header((1,)) + bytes(8)})
    answer = tried.client.put("/datasets/escaped", content=content, headers={"Content-Type": NPZ})
    assert [column["name"] for column in answer.json()["columns"]] == ["../../escaped"]
    assert not list(tried.service.settings.data_dir.parent.rglob("escaped*"))
    tried.client.delete("/datasets/escaped").raise_for_status()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [ARROW, PARQUET, NPZ])
def test_a_file_with_bytes_changed_is_read_or_refused(tried: Target, kind: str, seed: int) -> None:
    table = pa.table({"x": [1.5, None, 3], "t": ["a", "bb", None], "l": [[1.0], [2.0, 3.0], None]})
    good = {ARROW: arrow_stream(table), PARQUET: parquet(table), NPZ: npz(x=np.arange(6.0).reshape(3, 2))}[kind]
    rng = np.random.default_rng(seed)
    content = np.frombuffer(good, np.uint8).copy()
    content[rng.integers(0, len(content), 4)] = rng.integers(0, 256, 4)
    answer = tried.client.put("/datasets/changed", content=content.tobytes(), headers={"Content-Type": kind})
    if answer.status_code == 201:
        tried.client.delete("/datasets/changed").raise_for_status()
    else:
        assert problem_of(answer)["code"] == "invalid_dataset"


def test_a_large_body_is_never_whole_in_memory(tried: Target) -> None:
    process = psutil.Process()
    before, most = process.memory_info().rss, 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, process.memory_info().rss)

    def body() -> Iterator[bytes]:
        part = bytes(2**16)
        for _ in range(2**25 // 2**16):
            yield part

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answer = tried.client.put("/datasets/fresh", content=body(), headers={"Content-Type": NPZ})
    finally:
        ended.set()
        watcher.join()
    assert problem_of(answer)["code"] == "invalid_dataset"
    assert most > 0
    assert most - before < 2**24


def _request(client: httpx.Client, length: int) -> socket.socket:
    url = client.base_url
    connection = socket.create_connection((url.host, url.port or 80))
    head = (
        "PUT /datasets/fresh HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {PARQUET}",
        f"Content-Length: {length}",
        "",
        "",
    )
    connection.sendall("\r\n".join(head).encode())
    return connection


def _left(service: Service) -> set[str]:
    folder = service.settings.data_dir
    return stored_files(folder) | {path.name for path in (folder / "tmp").iterdir()}


@pytest.mark.parametrize("sent", [0, 100, 3_000_000])
def test_a_client_that_goes_away_in_the_middle_leaves_nothing(tried: Target, sent: int) -> None:
    before, files = _left(tried.service), _open_temporaries()
    with _request(tried.client, 2**24) as connection:
        connection.sendall(bytes(sent))
        eventually(lambda: _open_temporaries() > files, what="the start of the upload")
    eventually(lambda: _open_temporaries() == files, what="the end of the upload")
    assert _left(tried.service) == before


def test_a_client_that_goes_away_while_its_file_is_read_ends_the_reading(new_folder: NewFolder) -> None:
    settings = settings_for(new_folder("leaves"), feature_space=None)
    with own_starts(), serving(settings) as (client, service):
        with _request(client, len(slow_parquet())) as connection:
            connection.sendall(slow_parquet())
            process = reader_of(os.getpid())
        eventually(lambda: not psutil.pid_exists(process.pid), what="the end of the reading process")
        eventually(lambda: not _left(service), what="the removal of its file")


def test_a_reading_process_that_is_killed_is_a_refusal(new_folder: NewFolder) -> None:
    settings = settings_for(new_folder("killed"), feature_space=None)
    with own_starts(), serving(settings) as (client, service):
        killer = threading.Thread(target=lambda: reader_of(os.getpid()).kill())
        killer.start()
        answer = client.put("/datasets/fresh", content=slow_parquet(), headers={"Content-Type": PARQUET})
        killer.join()
        assert problem_of(answer)["code"] == "invalid_dataset"
        assert not _left(service)


def _open_temporaries() -> int:
    """How many nameless files this process, and with it the service, has open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # closed since they were listed
    return sum("/data/tmp/" in link and link.endswith("(deleted)") for link in links)
