"""The hold of a process that answers requests on the process that reads an uploaded file for it."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from adapters.datasets.readers.formats import Format
from adapters.datasets.report import Report
from adapters.errors import BadRow, BadRows, InvalidDataset, StorageFull

_MOST_MEMORY_BYTES = 2**30
_LEAST_SECONDS, _BYTES_A_SECOND = 120.0, 2**20
_MODULE = "adapters.datasets.ingest_process"
_QUIET = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # the others reserve far more than they use, which the limit would count
    "MALLOC_ARENA_MAX": "2",
    # What Arrow sets aside for a column and gives back must not leave a hole: with many columns those add up.
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

log = logging.getLogger(__name__)


class ReadingCancelled(Exception):
    """Nobody wants the file read any more."""


@contextmanager
def raw_file(folder: Path) -> Iterator[IO[bytes]]:
    """A file in `folder` for the bytes of an upload. It has no name: whatever ends this process ends it too."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        yield file


class Reading:
    """One uploaded file on its way into the stored form, in a child process that can be ended at any time."""

    def __init__(self, raw: IO[bytes], kind: Format, *, memory_bytes: int, max_bytes: int) -> None:
        self._raw = raw
        self._kind = kind
        self._memory_bytes = min(memory_bytes, _MOST_MEMORY_BYTES)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self._too_slow = False

    def cancel(self) -> None:
        """Let `run` end at once, or never begin. Call it from any thread."""
        with self._lock:
            self._cancelled = True
            self._kill()

    def run(self, out: Path) -> Report:
        """Write the stored form to `out`, and wait for it.

        Raises `InvalidDataset`, `BadRows`, `StorageFull`, and `ReadingCancelled` after a `cancel`.
        """
        seconds = _LEAST_SECONDS + os.fstat(self._raw.fileno()).st_size / _BYTES_A_SECOND
        process = self._start(out)
        timer = threading.Timer(seconds, self._give_up)
        timer.start()
        try:
            assert process.stdout is not None
            answer = process.stdout.read()
        finally:
            timer.cancel()
            with self._lock:
                self._kill()
                self._process = None
        if self._cancelled:
            raise ReadingCancelled
        if self._too_slow:
            raise _refused(f"the file was not read within {seconds:.0f} seconds")
        return self._understood(answer, process.returncode)

    def _start(self, out: Path) -> "subprocess.Popen[bytes]":
        request = {
            "raw": f"/dev/fd/{self._raw.fileno()}",
            "format": self._kind,
            "out": str(out),
            "memory_bytes": self._memory_bytes,
            "max_bytes": self._max_bytes,
        }
        with self._lock:
            if self._cancelled:
                raise ReadingCancelled
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(self._raw.fileno(),),
                env=os.environ | _QUIET,
            )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self._process

    def _give_up(self) -> None:
        with self._lock:
            self._too_slow = self._process is not None
            self._kill()

    def _kill(self) -> None:
        """End the child, whatever it does; hold the lock. Of one that has ended already the status stays."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _understood(self, text: bytes, status: int) -> Report:
        try:
            answer: Mapping[str, Any] = json.loads(text)
        except ValueError:
            # What the C++ side cannot allocate it sometimes dies of; a kill is the kernel's, out of memory too.
            raise _refused(
                f"the process that read the file died (status {status}), as one does that needs more than the"
                f" {self._memory_bytes} bytes of memory that it may use"
            ) from None
        if "report" in answer:
            return Report.from_json(answer["report"])
        if "invalid" in answer:
            raise InvalidDataset(**answer["invalid"])
        if "bad_rows" in answer:
            rows = [BadRow(**bad) for bad in answer["bad_rows"]]
            raise BadRows(answer["detail"], rows=rows, field=answer["field"])
        if "storage_full" in answer:
            raise StorageFull("the disk is full: the data set could not be stored")
        if "out_of_memory" in answer:
            raise _refused(
                f"to read the file takes more than {self._memory_bytes} bytes of memory: write it in smaller batches or"
                " row groups, or with fewer columns"
            )
        log.error("a data set could not be read:\n%s", answer["failed"])
        raise _refused(f"the file cannot be read: {str(answer['failed']).strip().splitlines()[-1][:300]}")


def _refused(detail: str) -> InvalidDataset:
    return InvalidDataset(detail, field="body", expected="a file that can be read within bounds")
