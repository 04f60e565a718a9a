"""Client of the child process that fits: the values that the two exchange, and the life of the process."""

import base64
import json
import logging
import math
import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from adapters.child_process import StoppedClock, command
from adapters.jobs.training_job import TrainingJob
from adapters.storage.blob_location import BlobLocation
from adapters.training.gradient.training_loop import Epoch

# Messages of the CPU allocator, C++, Python and libgomp about a failed allocation; some abort after it.
_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "MemoryError",
    "Thread creation failed",
    "Out of memory",
)
_LAST_LINES = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Message of the fit process. The base class says that the process is ready for requests."""

    contents: Sequence[bytes] = ()
    """Blobs that follow the frame on the pipe."""
    epochs: Sequence[Epoch] = ()
    """Epochs that have ended since the last frame, if the request asked for their times."""

    def write(self, file: BinaryIO) -> None:
        """Write a line of JSON with the lengths of the contents, and the contents."""
        members = {member.name: getattr(self, member.name) for member in fields(self)}
        members |= {"kind": type(self).__name__, "contents": [len(content) for content in self.contents]}
        file.write(b"".join((json.dumps(members).encode(), b"\n", *self.contents)))
        file.flush()

    @staticmethod
    def read(file: BinaryIO) -> "Frame | None":
        """Read what `write` wrote; None if the file ends, even in the middle of a frame."""
        line = file.readline()
        if not line.endswith(b"\n"):
            return None
        members = json.loads(line)
        lengths = members["contents"]
        members["contents"] = [file.read(length) for length in lengths]
        members["epochs"] = [Epoch(*epoch) for epoch in members["epochs"]]
        if any(len(content) < length for content, length in zip(members["contents"], lengths, strict=True)):
            return None
        return _FRAMES[members.pop("kind")](**members)


@dataclass(frozen=True, kw_only=True)
class Note(Frame):
    """Line for the log of the job."""

    text: str
    resumed: bool = False
    """Whether the fit continues from a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Progress(Frame):
    """Latest step of the fit."""

    step: int = 0
    loss: float | None = None
    history: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Failed(Progress):
    """End of a fit with an error, and the step that it reached."""

    error: Mapping[str, Any]
    """Members of the problem."""


class Trained(NamedTuple):
    """An adapter of a fleet that was trained."""

    position: int
    metrics: Mapping[str, Any]
    report: Mapping[str, Any] | None = None
    """`AdapterReport.to_json`; None if nothing was evaluated and nothing was chosen."""
    spec: Mapping[str, Any] | None = None
    """The specification with the settings that `auto` has chosen; None if it has chosen nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcomes(Frame):
    """End of a stack of a fleet. The contents are the adapters that were trained, then the evidence of some of them."""

    trained: Sequence[Trained]
    failed: Sequence[tuple[int, Mapping[str, Any]]]
    """Position and error of each group without an adapter."""
    evidence: Sequence[int] = ()
    """Positions of the adapters whose evidence is among the contents, in order."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained", [Trained(*members) for members in self.trained])


@dataclass(frozen=True, kw_only=True)
class Done(Frame):
    """End of a fit. The contents are the adapter and `also`; a fleet's adapters came in `Outcomes`."""

    metrics: Mapping[str, Any]
    history: Sequence[tuple[int, float]] = ()
    spec: Mapping[str, Any] | None = None
    """The specification with the settings that the rows have chosen; None for a fleet."""
    report: Mapping[str, Any] | None = None
    """`AdapterReport.to_json`; None if nothing was evaluated and nothing was chosen."""
    suspects: Sequence[Mapping[str, Any]] | None = None
    """Rows whose label the other rows contradict, worst first; None if they were not looked for."""
    result: Mapping[str, Any] | None = None
    """Result of an evaluation, which has no contents."""
    also: Sequence[str] = ()
    """What follows the adapter in the contents, in order: `statistics`, `evidence`. Both are kept with the version."""

    def attachment(self, kind: str) -> bytes | None:
        """Return what was attached to the adapter, if it was."""
        return self.contents[1 + self.also.index(kind)] if kind in self.also else None


_FRAMES: Mapping[str, type[Frame]] = {kind.__name__: kind for kind in (Frame, Note, Progress, Failed, Outcomes, Done)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """A live version: the canonical bytes of its adapter within a blob, and what is known of the rows it comes from."""

    blob: str | None
    """None if its outputs cannot be compared at all."""
    offset: int
    length: int
    evidence: bytes | None = None
    """`RowEvidence.to_bytes` of its training rows, if it was trained on all rows with cross-validation."""
    is_of_job: bool = False
    """Whether a job trained it; without evidence, then not on the rows that the split holds out."""
    unjudged: str | None = None
    """Why it cannot be compared on rows that it was not trained on, if so."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        evidence = None if self.evidence is None else base64.b64encode(self.evidence).decode()
        return asdict(self) | {"evidence": evidence}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StoredAdapter":
        """Read what `to_json` returned."""
        text = values["evidence"]
        return cls(**{**values, "evidence": None if text is None else base64.b64decode(text)})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """Version that an evaluation compares, or the base layer."""

    reference: str | None
    """`name@version`; None for the base layer."""
    digest: str | None = None
    """Digest of its canonical bytes; None for the base layer, and for a version that is gone."""
    blob: str = ""
    offset: int = 0
    length: int = 0
    loss: str | None = None
    """What it was trained with."""
    problem: str | None = None
    """Why it cannot be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """Request for the fit of one claimed job. Data is named by blob, wherever the fit runs."""

    job: TrainingJob
    base: str
    """Fingerprint of the base layer that the job was queued for."""
    feature_space: str | None
    data: str
    """Blob of the data file."""
    done: tuple[int, ...] = ()
    """Positions of a fleet's adapters that have a version or an error."""
    live: Mapping[int, StoredAdapter] = field(default_factory=dict)
    """Live versions by the position of the adapter, if the publish rule compares with them."""
    wants_prior: bool = False
    """Whether a fleet's mean is wanted too, at the position after the last group's."""
    statistics: str | None = None
    """Blob of the statistics that an update starts from."""
    compared: tuple[StoredVersion, ...] = ()
    """Versions that an evaluation compares."""
    checkpoint_seconds: float = 60.0
    """Time between two checkpoints."""
    times_epochs: bool = False
    """Whether the frames report the times of epochs."""
    share: tuple[int, int] = (0, 1)
    """Share of a fleet, and number of shares: a stack belongs to the share of its number modulo the shares."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        members = {member.name: getattr(self, member.name) for member in fields(self)}
        live = {str(position): stored.to_json() for position, stored in self.live.items()}
        compared = list(map(asdict, self.compared))
        return {**members, "job": self.job.to_json(), "live": live, "compared": compared}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FitRequest":
        """Read what `to_json` returned."""
        job, done = TrainingJob.from_json(values["job"]), tuple(values["done"])
        live = {int(position): StoredAdapter.from_json(stored) for position, stored in values["live"].items()}
        compared = tuple(StoredVersion(**version) for version in values["compared"])
        share = tuple(values["share"])
        return cls(**{**values, "job": job, "done": done, "live": live, "compared": compared, "share": share})


class ShareRows(NamedTuple):
    """File with the rows of a share of a fleet, in the order of the groups."""

    path: str
    begin: int
    """Index, in that order, of the first row of its first stack."""
    end: int
    """Index after the last row with which a stack of it may begin."""


@dataclass(eq=False)
class FitterDied(Exception):
    """The child process ended, or was killed, before it had answered."""

    out_of_memory: bool = False
    """Whether its last lines report a failed allocation."""


class Fitter(Protocol):
    """The seam between the trainer and where its fits run.

    A fit reads what a `FitRequest` names from the shared blobs and writes nothing there: publishing stays with the
    trainer, under its fencing token. A fitter serves one request at a time, and its frames come in order: any number of
    `Note`, `Progress` and `Outcomes`, then one `Done` or `Failed`.
    """

    def is_ready(self, seconds: float) -> bool:
        """Return whether a request can begin; start what a fit needs if it does not run, and wait `seconds`.

        Raises `FitterDied` if it cannot be started.
        """

    def begin(self, request: FitRequest, *, checkpoint: Path = Path()) -> None:
        """Start a fit; its frames come from `next_frame`. Raises `FitterDied`.

        checkpoint: the file, on this machine, that the fit continues from, and that has its checkpoints.
        """

    def next_frame(self, seconds: float) -> Frame | None:
        """Return the next frame, or None if none came in time, so that the trainer can keep its lease.

        Raises `FitterDied` if no more frames will come.
        """

    def kill(self) -> None:
        """End the fit immediately. No frame of the request comes after this.

        The fit may be repeated: the same request gives the same adapters.
        """


class ChildFitter:
    """Fitter that runs fits in a child process with torch and the base layer in its memory.

    It serves job after job, so that a small one does not pay for the start. After a kill it is started again.
    """

    def __init__(
        self,
        base_arguments: Mapping[str, str],
        *,
        blobs: BlobLocation,
        threads: int,
        memory_bytes: int,
        stopped_seconds: float = math.inf,
    ) -> None:
        """Configure the process; one that is stopped (SIGSTOP) for more than `stopped_seconds` is killed."""
        self._first = json.dumps({"base": dict(base_arguments), "threads": threads, "memory_bytes": memory_bytes})
        self.blobs = blobs
        self._stopped_seconds = stopped_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def start(self) -> "subprocess.Popen[bytes]":
        """Return the process, started if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.kill()
        pipe = subprocess.PIPE
        module = command("adapters.training.execution.fit_child")
        self._process = subprocess.Popen(module, stdin=pipe, stdout=pipe, stderr=pipe)
        # If the machine or the container runs out of memory, the kernel ends this process and none that serves.
        with suppress(OSError):
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._last_lines: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._stopped = StoppedClock()
        threading.Thread(target=_read_frames, args=(self._process, self._frames), daemon=True).start()
        self._listener = threading.Thread(target=_log_lines, args=(self._process, self._last_lines), daemon=True)
        self._listener.start()
        self._send(self._first)
        return self._process

    def is_ready(self, seconds: float) -> bool:
        """Return whether it has loaded torch and the base layer; start it if it does not run, and wait `seconds`.

        Raises `FitterDied` if it ended instead.
        """
        process = self.start()
        if not self._ready and self.next_frame(seconds) is not None:
            _lower_priority(process.pid)
            self._ready = True
        return self._ready

    def begin(self, request: FitRequest, *, checkpoint: Path = Path(), rows: ShareRows | None = None) -> None:
        """Start a fit as soon as the process is ready; its frames come from `next_frame`.

        checkpoint: the file of its checkpoints. rows: those of a share of a fleet, if they were sorted elsewhere; the
        process deletes the file. Raises `FitterDied`.
        """
        while not self.is_ready(1.0):
            pass
        locations = {"blobs": self.blobs.to_json(), "checkpoint": str(checkpoint), "rows": rows}
        self._send(json.dumps({"request": request.to_json(), **locations}))

    def next_frame(self, seconds: float) -> Frame | None:
        """Return the next frame, or None if none came in time; raise `FitterDied`."""
        try:
            frame = self._frames.get(timeout=seconds)
        except queue.Empty:
            self._end_if_stopped()
            return None
        if frame is None:
            raise self._death()
        return frame

    def kill(self) -> None:
        """End the process immediately."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                # Closing flushes a request that it never read.
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process = None
        self._ready = False

    def _end_if_stopped(self) -> None:
        """Kill a process that has been stopped for too long; the next frame reports its death."""
        if self._process is not None and self._stopped.seconds(self._process.pid) > self._stopped_seconds:
            log.error("the fit process has been stopped for more than %g s and is killed", self._stopped_seconds)
            self._process.kill()
            self._stopped = StoppedClock()

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> FitterDied:
        self._listener.join(1.0)
        lines = (line.decode(errors="replace") for line in self._last_lines)
        return FitterDied(out_of_memory=any(map(is_allocation_failure, lines)))


def _lower_priority(process: int) -> None:
    """Schedule all threads of a process only when a core is idle, so that serving comes first.

    Call it after the process has loaded what it needs: on busy cores the start would take minutes.
    """
    # Only Linux has this scheduling class, and not in every sandbox.
    with suppress(AttributeError, OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(ProcessLookupError):  # a thread that has ended meanwhile
                os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


def is_allocation_failure(text: str) -> bool:
    """Return whether an error text reports a failed allocation, for which torch has no type."""
    return any(words in text for words in _NO_MEMORY)


def _log_lines(process: "subprocess.Popen[bytes]", last_lines: "deque[bytes]") -> None:
    """Log the lines of its standard error, and keep the newest."""
    assert process.stderr is not None
    with suppress(ValueError, OSError):  # closed, by `kill` or from outside
        for line in process.stderr:
            last_lines.append(line)
            log.warning("the fit process says: %s", line.decode(errors="replace").rstrip())


def _read_frames(process: "subprocess.Popen[bytes]", frames: "queue.SimpleQueue[Frame | None]") -> None:
    assert process.stdout is not None
    try:
        with suppress(ValueError):  # the pipe was closed by `kill`
            while (frame := Frame.read(process.stdout)) is not None:  # type: ignore[arg-type]  # it is buffered
                frames.put(frame)
    finally:
        # Also after a frame that cannot be read, because the trainer would wait for the next one without end.
        frames.put(None)
