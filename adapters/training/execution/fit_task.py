"""Fit on a node of a cluster, in a child process like one of the trainer; what comes from it is sent to the trainer.

Whatever runs tasks on nodes calls `run_fit`, which imports no library of a cluster. The request comes as bytes, names
blobs, and has no path of the trainer's machine, except for the folder of blobs that all nodes share without a bucket.
"""

import fcntl
import io
import json
import logging
import math
import os
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from adapters.errors import LoraplexError
from adapters.storage.blob_location import BlobLocation
from adapters.training.execution.fit_client import ChildFitter, Done, Failed, FitRequest, FitterDied, Frame, ShareRows

# Interval of the items that show that a fit without frames runs, and of the checks for a new checkpoint.
_SECONDS_BETWEEN_ITEMS = 1.0
# Another prefix than that of earlier releases, whose folders have no lock.
_FIT_FOLDER = "loraplex-task-"
# Prefix of folders that could not be locked, which no other task removes.
_UNLOCKED_FOLDER = "loraplex-unlocked-"


class ItemKind(StrEnum):
    """Kind of what a fit on a node sends."""

    FRAME = "frame"
    """A frame, as `Frame.write` writes it."""
    CHECKPOINT = "checkpoint"
    """The file of a checkpoint."""
    LOG = "log"
    """Lines for the log of the trainer."""
    ALIVE = "alive"
    """Nothing, from a fit that has sent nothing else for a second."""
    DIED = "died"
    """End of a fit whose process died; `out_of_memory` if that is why."""


# Callback that sends an item, and returns when there is room for the next one.
Send = Callable[[ItemKind, bytes], None]
# Callback that writes the rows of a share to a new file.
WriteRows = Callable[[Path], ShareRows]
OUT_OF_MEMORY = b"out_of_memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProcess:
    """Configuration of the child process on a node, the same for all fits of a trainer."""

    base: Mapping[str, str]
    """Arguments of `load_base_layer`; a file has to be at this path on each node."""
    blobs: BlobLocation
    threads: int
    memory_bytes: int
    stopped_seconds: float

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps(asdict(self) | {"blobs": self.blobs.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "FitProcess":
        """Read what `to_json` returned."""
        values = json.loads(text)
        return cls(**{**values, "blobs": BlobLocation.from_json(values["blobs"])})

    def blobs_here(self) -> BlobLocation:
        """Return the location of the blobs for this node, which may have copies of those in a bucket."""
        if self.blobs.url is None:
            return self.blobs
        blobs = replace(self.blobs, folder=_node_folder())
        blobs.open().create_folder()
        return blobs

    def open(self) -> ChildFitter:
        """Return the client of the process, which is not started yet."""
        return ChildFitter(
            self.base,
            blobs=self.blobs_here(),
            threads=self.threads,
            memory_bytes=self.memory_bytes,
            stopped_seconds=self.stopped_seconds,
        )


# The child process of this process, kept for the next task, by its configuration.
_KEPT: dict[str, ChildFitter] = {}


def run_fit(
    process: str, request: bytes, *, share: tuple[int, int], done: Sequence[int], checkpoint: bytes | None, send: Send,
    write_rows: WriteRows | None = None,
) -> None:  # fmt: skip
    """Run the fit of a request, or a share of a fleet's stacks, and send what comes from it, until it has ended.

    process: `FitProcess.to_json`. request: `FitRequest.to_json`, as JSON. done: positions of a fleet that an earlier
    task for this share has fitted. checkpoint: the checkpoint that the fit continues from. write_rows: how to get the
    rows of the share, if they were sorted for all of them.
    """
    fit = FitRequest.from_json(json.loads(request))
    fit = replace(fit, share=share, done=(*fit.done, *done))
    with _fit_folder() as folder, _log_lines() as lines:
        file = _CheckpointFile(folder / "checkpoint.safetensors", checkpoint)
        fitter = _kept_fitter(process)
        try:
            # Its start may take longer than a task may be silent.
            send(ItemKind.ALIVE, b"")
            while not fitter.is_ready(_SECONDS_BETWEEN_ITEMS):
                send(ItemKind.ALIVE, b"")
            rows = {} if write_rows is None else {"rows": _write_rows(write_rows, folder / "rows", send)}
            fitter.begin(fit, checkpoint=file.path, **rows)
            frame = None
            while not isinstance(frame, Done | Failed):
                frame = fitter.next_frame(_SECONDS_BETWEEN_ITEMS)
                if (content := file.changed()) is not None:
                    send(ItemKind.CHECKPOINT, content)
                lines.send(send)
                send(*((ItemKind.ALIVE, b"") if frame is None else (ItemKind.FRAME, frame_to_bytes(frame))))
        except FitterDied as death:
            fitter.kill()
            lines.send(send)
            send(ItemKind.DIED, OUT_OF_MEMORY if death.out_of_memory else b"")
        except LoraplexError as error:
            lines.send(send)
            send(ItemKind.FRAME, frame_to_bytes(Failed(error=error.members())))
        except BaseException:
            fitter.kill()
            raise
        else:
            if isinstance(frame, Failed):
                # After an allocation that failed, its heap is fragmented.
                fitter.kill()


def _write_rows(write_rows: WriteRows, path: Path, send: Send) -> ShareRows:
    """Write the rows of a share on a thread, and send items meanwhile: it may take longer than a task may be silent."""
    with ThreadPoolExecutor(1, "write-rows") as executor:
        writing = executor.submit(write_rows, path)
        while not wait([writing], _SECONDS_BETWEEN_ITEMS).done:
            send(ItemKind.ALIVE, b"")
        return writing.result()


def frame_to_bytes(frame: Frame) -> bytes:
    """Return a frame as one string of bytes."""
    file = io.BytesIO()
    frame.write(file)
    return file.getvalue()


def frame_from_bytes(content: bytes) -> Frame:
    """Read what `frame_to_bytes` returned."""
    frame = Frame.read(io.BytesIO(content))
    if frame is None:
        raise ValueError("the bytes end within a frame")
    return frame


def write_checkpoint(path: Path, content: bytes) -> None:
    """Replace the file of a checkpoint atomically; one that cannot be written is logged, and the fit continues."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("no checkpoint is written: %s", error)


class _CheckpointFile:
    """File of the checkpoints of a fit on this node."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        self.path = path
        if content is not None:
            path.write_bytes(content)
        self._changed_at = self._time()

    def changed(self) -> bytes | None:
        """Return the checkpoint if there is a new one since the last call."""
        changed_at = self._time()
        if changed_at == self._changed_at:
            return None
        self._changed_at = changed_at
        return self.path.read_bytes()

    def _time(self) -> float:
        return self.path.stat().st_mtime_ns if self.path.exists() else -math.inf


def _kept_fitter(process: str) -> ChildFitter:
    """Return the fitter of the last task, with its process, if it had the same configuration."""
    fitter = _KEPT.pop(process, None)
    for other in _KEPT.values():
        other.kill()
    _KEPT.clear()
    _KEPT[process] = fitter or FitProcess.from_json(process).open()
    return _KEPT[process]


def _node_folder() -> Path:
    """Return the folder, on this node, of the copies of blobs in a bucket; raise `PermissionError` if not its owner."""
    folder = Path(tempfile.gettempdir()) / f"loraplex-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


@contextmanager
def _fit_folder() -> Iterator[Path]:
    """Yield a temporary folder, and remove it; remove those of tasks that were killed, too.

    A folder belongs to the process that has it locked: numbers of processes may be those of another container.
    """
    for abandoned in Path(tempfile.gettempdir()).glob(f"{_FIT_FOLDER}*"):
        # It is of another user or of a running task, or another task has just removed it.
        with suppress(OSError):
            free = _lock(abandoned, fcntl.LOCK_NB)
            shutil.rmtree(abandoned, ignore_errors=True)
            os.close(free)
    folder, lock = _new_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _new_folder() -> tuple[Path, int | None]:
    """Return a new folder and its lock; None in place of a lock on a file system that has none for folders."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_FIT_FOLDER))
        try:
            lock = _lock(folder)
        except FileNotFoundError:
            # Another task has removed it before it was locked.
            continue
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            return Path(tempfile.mkdtemp(prefix=_UNLOCKED_FOLDER)), None
        if folder.exists():
            return folder, lock
        os.close(lock)


def _lock(folder: Path, how: int = 0) -> int:
    """Lock a folder until the descriptor that this returns is closed."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | how)
    except OSError:
        os.close(number)
        raise
    return number


@contextmanager
def _log_lines() -> "Iterator[_LogLines]":
    """Yield what the domain logs here, which includes the lines that the child process prints."""
    handler, logger = _LogLines(), logging.getLogger("adapters")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


class _LogLines(logging.Handler):
    """Log handler that keeps the lines until they are sent."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def send(self, send: Send) -> None:
        """Send the lines that there are."""
        if lines := [self._lines.popleft() for _ in range(len(self._lines))]:
            send(ItemKind.LOG, "\n".join(lines).encode())
