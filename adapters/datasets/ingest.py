"""Ingestion of an uploaded file: a child process reads it, checks it, and writes the stored form.

The parsers see a client's bytes only in the child process, under a memory limit. `Ingestion` starts the process and
waits for it. The child, `main`, gets JSON as its argument and answers with JSON on standard output. It exits when
standard input is closed, which also happens if its parent dies.
"""

import errno
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from enum import StrEnum
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from adapters.datasets.arrow_file import ArrowFileWriter, min_row_bytes, too_large_error
from adapters.datasets.columns import PlannedColumn, Source, to_stored_array
from adapters.datasets.validation import ColumnReport, IngestReport
from adapters.errors import BadRow, BadRows, InvalidDataset, StorageFailed, StorageFull, shorten
from adapters.storage.blobs import DISK_FAILED, DISK_FULL


class Format(StrEnum):
    """File format of an upload."""

    CSV = "csv"
    """Comma-separated text with a header line."""
    JSON_LINES = "json_lines"
    """One JSON object per line."""
    PARQUET = "parquet"
    ARROW = "arrow"
    """Arrow's IPC stream."""
    NPZ = "npz"
    """A zip of NumPy arrays."""


# Formats by media type. Some formats have two names in use.
CONTENT_TYPES: Mapping[str, Format] = {
    "text/csv": Format.CSV,
    "application/x-ndjson": Format.JSON_LINES,
    "application/jsonl": Format.JSON_LINES,
    "application/vnd.apache.parquet": Format.PARQUET,
    "application/x-parquet": Format.PARQUET,
    "application/vnd.apache.arrow.stream": Format.ARROW,
    "application/x-npz": Format.NPZ,
    "application/zip": Format.NPZ,
}


_MAX_MEMORY_BYTES = 2**30
_MIN_SECONDS, _BYTES_PER_SECOND = 120.0, 2**20
_MODULE = "adapters.datasets.ingest"
_ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # the others reserve more than they use, which counts
    "MALLOC_ARENA_MAX": "2",
    # Memory that Arrow frees for each column is returned, because with many columns the gaps add up.
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

# Members of an error that the child process found, which its parent raises again.
_ERROR_MEMBERS = frozenset({"detail", "field", "row", "given", "expected"})

log = logging.getLogger(__name__)


class IngestionCancelled(Exception):
    """The ingestion was cancelled."""


@contextmanager
def upload_file(folder: Path) -> Iterator[IO[bytes]]:
    """Open a file in `folder` for the bytes of an upload. It has no name, so it disappears with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        yield file


class Ingestion:
    """Ingestion of one uploaded file in a child process that can be cancelled at any time."""

    def __init__(self, raw: IO[bytes], kind: Format, *, memory_bytes: int, max_bytes: int) -> None:
        self._raw = raw
        self._kind = kind
        self._memory_bytes = min(memory_bytes, _MAX_MEMORY_BYTES)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        # Why the process was killed.
        self._stopped: Exception | None = None

    def cancel(self) -> None:
        """Stop `run` immediately, or keep it from starting. Thread-safe."""
        self._stop(IngestionCancelled())

    def run(self, out: Path) -> IngestReport:
        """Write the stored form to `out`, and return the report.

        Raises `InvalidDataset`, `BadRows`, `StorageFull`, `StorageFailed`, and `IngestionCancelled` after a `cancel`.
        """
        seconds = _MIN_SECONDS + os.fstat(self._raw.fileno()).st_size / _BYTES_PER_SECOND
        too_slow = _unreadable_file(f"the file was not read within {seconds:.0f} seconds")
        with self._start(out) as process:
            timer = threading.Timer(seconds, self._stop, [too_slow])
            timer.start()
            try:
                assert process.stdout is not None
                answer = process.stdout.read()
            finally:
                timer.cancel()
                with self._lock:
                    process.kill()
                    process.wait()
        if self._stopped is not None:
            raise self._stopped
        return self._parse_answer(answer, process.returncode)

    def _start(self, out: Path) -> "subprocess.Popen[bytes]":
        request = {
            "raw": f"/dev/fd/{self._raw.fileno()}",
            "format": self._kind,
            "out": str(out),
            "memory_bytes": self._memory_bytes,
            "max_bytes": self._max_bytes,
        }
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            # Its standard input stays open and empty: it is closed if this process dies, and then the child exits.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(self._raw.fileno(),),
                env=os.environ | _ENVIRONMENT,
            )
        return self._process

    def _stop(self, reason: Exception) -> None:
        # The lock keeps the process from being waited for meanwhile: its id may then belong to another one.
        with self._lock:
            self._stopped = self._stopped or reason
            if self._process is not None:
                self._process.kill()

    def _parse_answer(self, text: bytes, status: int) -> IngestReport:
        try:
            answer: Mapping[str, Any] = json.loads(text)
        except ValueError:
            # C++ code may die if an allocation fails, and the kernel may kill the process when memory is short.
            reason = f"it may use {self._memory_bytes} bytes of memory"
            raise _unreadable_file(f"the process that read the file died (status {status}); {reason}") from None
        if "report" in answer:
            return IngestReport.from_json(answer["report"])
        if "bad_rows" in answer:
            rows = [BadRow(**bad) for bad in answer["bad_rows"]]
            raise BadRows(answer["detail"], rows=rows, field=answer["field"])
        if "storage_full" in answer:
            raise StorageFull("the disk is full: the data set could not be stored")
        if "storage_failed" in answer:
            detail = f"the data set cannot be written: nothing was stored ({answer['storage_failed']})"
            log.error("%s", detail)
            raise StorageFailed(detail)
        if "traceback" in answer:
            log.error("a data set could not be read:\n%s", answer["traceback"])
        raise InvalidDataset(**{name: value for name, value in answer["invalid"].items() if name in _ERROR_MEMBERS})


def _unreadable_file(detail: str) -> InvalidDataset:
    return InvalidDataset(detail, expected="a file that can be read within bounds")


def convert(raw: str, kind: Format, out: Path, *, max_bytes: int) -> IngestReport:
    """Read the file at `raw`, and write its stored form to `out`.

    Raises `InvalidDataset` if the file cannot be read, has no rows, or would be stored in more than `max_bytes` bytes;
    `BadRows` for rows that are not rows of a table; `MemoryError`; and `OSError`, for example if the disk is full.
    """
    source = _open_source(raw, kind)
    if source.rows is not None and source.rows * min_row_bytes(source.columns) > max_bytes:
        raise too_large_error(max_bytes)
    report = ColumnReport(source.columns)
    with closing(ArrowFileWriter(out, source.columns, report, max_bytes=max_bytes)) as file:
        for arrays in source.chunks(report.add_unreadable):
            file.add([_to_stored(array, column) for array, column in zip(arrays, source.columns, strict=True)])
        digest, size = file.finish()
    if file.rows == 0:
        raise InvalidDataset("the data set has no rows", expected="one or more rows")
    if source.rows is not None and file.rows != source.rows:
        raise InvalidDataset(f"the file says {source.rows} rows, and has {file.rows}", expected="a whole file")
    return IngestReport(rows=file.rows, columns=report.columns(), bad_rows=report.bad_rows(), digest=digest, bytes=size)


def _open_source(path: str, kind: Format) -> Source:
    # Imported here, because only the child process parses files: the processes that answer requests stay smaller.
    from adapters.datasets.readers.arrow import open_arrow_stream, open_parquet
    from adapters.datasets.readers.csv import open_csv
    from adapters.datasets.readers.json import open_json_lines
    from adapters.datasets.readers.npz import open_npz

    readers: Mapping[Format, Callable[[str], Source]] = {
        Format.CSV: open_csv,
        Format.JSON_LINES: open_json_lines,
        Format.PARQUET: open_parquet,
        Format.ARROW: open_arrow_stream,
        Format.NPZ: open_npz,
    }
    return readers[kind](path)


def _to_stored(array: Any, column: PlannedColumn) -> Any:
    try:
        return to_stored_array(array, column.type)
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, ValueError) as error:
        detail = f"the column {column.name!r} has a value that {column.type} cannot hold: {shorten(str(error))}"
        raise InvalidDataset(detail, field=column.name, expected=str(column.type)) from None


def main() -> None:
    """Read one file as the child process."""
    request = json.loads(sys.argv[1])
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    sys.meta_path.insert(0, _NoPandas())
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    # A lower priority than that of the processes that answer requests.
    os.nice(10)
    # RLIMIT_DATA, not RLIMIT_AS, because pages of mapped files and libraries can be reclaimed.
    limits = {"DATA": request["memory_bytes"], "FSIZE": request["max_bytes"], "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    sys.stdout.write(json.dumps(_run_request(request)))
    sys.stdout.flush()


class _NoPandas(MetaPathFinder):
    """Finder that hides pandas.

    If pandas is installed, pyarrow imports it to check for its types, which takes longer than most files and counts
    towards the memory limit.
    """

    def find_spec(self, fullname: str, *_: object) -> None:
        """Raise `ModuleNotFoundError` for pandas."""
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def _exit_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


def _run_request(request: dict[str, Any]) -> dict[str, Any]:
    try:
        kind, out = Format(request["format"]), Path(request["out"])
        report = convert(request["raw"], kind, out, max_bytes=request["max_bytes"])
    except BadRows as error:
        return {"bad_rows": [bad._asdict() for bad in error.rows], "detail": error.detail, "field": error.field}
    except InvalidDataset as error:
        return {"invalid": error.members()}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return {"storage_full": True}
        if isinstance(error, OSError) and error.errno in DISK_FAILED:
            return {"storage_failed": f"{errno.errorcode[error.errno]}: {os.strerror(error.errno)}"}
        # pyarrow's own error is a `MemoryError` too, and a parser in C may wrap one.
        if any(isinstance(cause, MemoryError) for cause in (error, error.__cause__, error.__context__)):
            limit = f"more than {request['memory_bytes']} bytes of memory"
            hint = "write it in smaller batches or row groups, or with fewer columns"
            return {"invalid": _unreadable_file(f"to read the file takes {limit}: {hint}").members()}
        reason = traceback.format_exception_only(error)[-1].strip()[:300]
        invalid = _unreadable_file(f"the file cannot be read: {reason}").members()
        return {"invalid": invalid, "traceback": traceback.format_exc()}
    return {"report": report.to_json()}


if __name__ == "__main__":
    main()
