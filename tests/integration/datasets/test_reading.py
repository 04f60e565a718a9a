"""The process that reads: its bounds, and how it ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pytest

from adapters.datasets import ingest as module
from adapters.datasets.ingest import Format, Ingestion, IngestionCancelled, upload_file
from adapters.datasets.validation import IngestReport
from adapters.errors import BadRows, InvalidDataset, LoraplexError, StorageFailed, StorageFull
from tests.support.data_set_files import arrow_stream, parquet
from tests.support.fork_server import own_starts
from tests.support.service import DEADLINE_SECONDS, eventually
from tests.support.slow_data_set import reader_of, slow_parquet

_MEMORY_BYTES = 2**28


@pytest.fixture(scope="module", autouse=True)
def _own_processes() -> Iterator[None]:
    with own_starts():
        yield


def _read(folder: Path, content: bytes, kind: Format, *, max_bytes: int = 2**32) -> IngestReport:
    with upload_file(folder) as raw:
        raw.write(content)
        return Ingestion(raw, kind, memory_bytes=_MEMORY_BYTES, max_bytes=max_bytes).run(folder / "out")


class Slow:
    """A reading that runs in a thread until something ends it."""

    def __init__(self, folder: Path) -> None:
        self._raw = upload_file(folder)
        raw = self._raw.__enter__()
        raw.write(slow_parquet())
        self.reading = Ingestion(raw, Format.PARQUET, memory_bytes=_MEMORY_BYTES, max_bytes=2**32)
        self.raised: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(folder / "out",))
        self._thread.start()
        self.process = reader_of(os.getpid())
        eventually(lambda: (folder / "out").exists() and (folder / "out").stat().st_size, what="a first batch")

    def _run(self, out: Path) -> None:
        try:
            self.reading.run(out)
        except BaseException as error:
            self.raised = error

    def end(self) -> BaseException | None:
        """What it raised, once it has ended."""
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()
        self._raw.__exit__(None, None, None)
        assert not psutil.pid_exists(self.process.pid)
        return self.raised


def test_a_report_comes_back_as_it_was_made(tmp_path: Path) -> None:
    report = _read(tmp_path, b"x,t\n1,a\nNaN,\n2,b\n", Format.CSV)
    assert IngestReport.from_json(report.to_json()) == report
    assert (report.rows, report.bytes) == (3, (tmp_path / "out").stat().st_size)
    assert [bad.reason for bad in report.bad_rows] == ["NaN", "null"]


def test_errors_come_back_with_all_they_say(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="two columns are called 'x'") as caught:
        _read(tmp_path, b"x,x\n1,2\n", Format.CSV)
    assert (caught.value.field, caught.value.given) == ("body", "x")
    with pytest.raises(BadRows) as rows:
        _read(tmp_path, b"x\n1,2\n", Format.CSV)
    assert [bad.row for bad in rows.value.rows] == [0]


# A write to the first bytes of a process's memory is EIO.
@pytest.mark.parametrize(("out", "expected"), [("/dev/full", StorageFull), ("/proc/self/mem", StorageFailed)])
def test_a_disk_that_is_full_or_fails_is_no_fault_of_the_file(
    tmp_path: Path, out: str, expected: type[LoraplexError]
) -> None:
    with upload_file(tmp_path) as raw:
        raw.write(b"x\n1\n")
        with pytest.raises(expected):
            Ingestion(raw, Format.CSV, memory_bytes=_MEMORY_BYTES, max_bytes=2**20).run(Path(out))


def test_nothing_of_an_upload_has_a_name(tmp_path: Path) -> None:
    with upload_file(tmp_path / "tmp") as raw:
        raw.write(b"rows")
        assert list((tmp_path / "tmp").iterdir()) == []


def test_a_cancel_ends_the_process(tmp_path: Path) -> None:
    slow = Slow(tmp_path)
    slow.reading.cancel()
    assert isinstance(slow.end(), IngestionCancelled)


def test_a_cancel_before_the_start_starts_nothing(tmp_path: Path) -> None:
    with upload_file(tmp_path) as raw:
        reading = Ingestion(raw, Format.CSV, memory_bytes=_MEMORY_BYTES, max_bytes=2**20)
        reading.cancel()
        with pytest.raises(IngestionCancelled):
            reading.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed_refuses_the_file(tmp_path: Path) -> None:
    slow = Slow(tmp_path)
    slow.process.kill()
    raised = slow.end()
    assert isinstance(raised, InvalidDataset)
    assert "died (status -9)" in raised.detail


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_SECONDS", 0.5)
    with pytest.raises(InvalidDataset, match="not read within"):
        _read(tmp_path, slow_parquet(), Format.PARQUET)


_PARENT = """
import sys
from pathlib import Path
from adapters.datasets.ingest import Format
from adapters.datasets.ingest import Ingestion, upload_file
folder = Path(sys.argv[1])
with upload_file(folder) as raw:
    raw.write((folder / "slow").read_bytes())
    Ingestion(raw, Format.PARQUET, memory_bytes=2**28, max_bytes=2**32).run(folder / "out")
"""


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    (tmp_path / "slow").write_bytes(slow_parquet())
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)])
    process = reader_of(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    eventually(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, what="its end")


def _packed_batch() -> bytes:
    return arrow_stream(pa.table({"x": np.zeros(30_000_000)}), compression="zstd")


def _long_text_many_times() -> bytes:
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), ["x" * 10**6])
    return arrow_stream(pa.table({"x": texts}))


def _one_long_list() -> bytes:
    offsets, values = pa.array([0, 30_000_000], pa.int32()), pa.array(np.zeros(30_000_000))
    return parquet(pa.table({"x": pa.ListArray.from_arrays(offsets, values)}))


_BOMBS: dict[Callable[[], bytes], Format] = {
    _packed_batch: Format.ARROW,
    _long_text_many_times: Format.ARROW,
    _one_long_list: Format.PARQUET,
}
_MEASURED = """
import resource, sys
from pathlib import Path
from adapters.datasets.ingest import Format
from adapters.datasets.ingest import Ingestion, upload_file
from adapters.errors import InvalidDataset
path = Path(sys.argv[1])
with upload_file(path.parent) as raw:
    raw.write(path.read_bytes())
    try:
        Ingestion(raw, Format(sys.argv[2]), memory_bytes=2**28, max_bytes=2**32).run(path.with_name("out"))
    except InvalidDataset as error:
        print(error.detail)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


@pytest.mark.parametrize("make", _BOMBS)
def test_a_bomb_is_refused_within_the_memory_that_was_given(tmp_path: Path, make: Callable[[], bytes]) -> None:
    content = make()
    assert len(content) < 2**23
    (tmp_path / "raw").write_bytes(content)
    # Of a process of its own: its only child is the one that is measured.
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "raw"), _BOMBS[make]]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert str(_MEMORY_BYTES) in said[0]
    # Besides its data it maps its libraries.
    assert int(said[1]) < _MEMORY_BYTES + 2**26
