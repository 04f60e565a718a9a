"""Fitter that runs fits as tasks of a Ray cluster. Only this module and `row_sorter` import ray.

A fit is one task, which asks for the memory that the job is estimated to need. A fleet whose stacks do not depend on
each other is several tasks, each with a share of the stacks. Ray decides when and where a task runs. What the tasks
send comes through a mailbox, an actor on the head node: Ray Client has no streaming generators.
"""

import atexit
import json
import logging
import math
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, OwnerDiedError, RayError

from adapters.errors import LoraplexError, StorageFailed, StorageFull
from adapters.training.execution.fit_client import (
    Done,
    Failed,
    FitRequest,
    FitterDied,
    Frame,
    Note,
    Outcomes,
    Progress,
    ShareRows,
)
from adapters.training.execution.fit_task import (
    OUT_OF_MEMORY,
    FitProcess,
    ItemKind,
    frame_from_bytes,
    run_fit,
    write_checkpoint,
)
from adapters.training.execution.mailbox import Item, Mailbox
from adapters.training.execution.row_sorter import RowSorter, SortedRows, row_table

_POLL_SECONDS = 0.5
_SECONDS_BEFORE_NOTE = 10.0
# More shares than cores: what a dead node leaves is spread over the others.
_SHARES_PER_CORE = 4
# Deaths of the tasks of one share, after which the job has its next attempt.
_MAX_DEATHS = 3
_OBJECT_STORE_BYTES = 512 * 2**20
# Errors of a node's storage, which end an attempt as the loss of a node does, not the job. The disk that is full is
# that of one node, too, and the next task may run on another one.
_OF_NODE = (StorageFailed, StorageFull)
# Resource that only the head node has.
_HEAD = {"node:__internal_head__": 0.001}

log = logging.getLogger(__name__)


def run_task(
    mailbox: Any, number: int, *, process: str, request: bytes, share: tuple[int, int], done: Sequence[int],
    checkpoint: bytes | None, sorted_shares: list[SortedRows] | None,
) -> None:  # fmt: skip
    """Run a task on a node.

    number: that of the request. sorted_shares: the rows of all shares, if they were sorted. The other arguments are
    those of `run_fit`.
    """

    def send(kind: ItemKind, content: bytes) -> None:
        ray.get(mailbox.put.remote(Item(number, share[0], kind, content)))

    def write_rows(path: Path) -> ShareRows:
        assert sorted_shares is not None
        begin, end, blocks = sorted_shares[share[0]]
        row_table(process, request).write_share(path, ((first, ray.get(block)) for first, block in blocks))
        return ShareRows(str(path), begin, end)

    rows = None if sorted_shares is None else write_rows
    run_fit(process, request, share=share, done=done, checkpoint=checkpoint, send=send, write_rows=rows)


@dataclass(slots=True, eq=False)
class _ShareState:
    """State of a share of the stacks of a fleet, or of a whole fit."""

    number: int
    task: Any = None
    """Reference to the end of its task; None after the end."""
    heard_at: float | None = None
    """Time of the last item of its task; None before the first one."""
    error: Exception | None = None
    """Why the task ended early, while its last items may still be in the mailbox."""
    ended_at: float = 0.0
    """Time at which the end of the task was found."""
    fitted: list[int] = field(default_factory=list)
    """Positions of a fleet that it has fitted."""
    deaths: int = 0
    is_done: bool = False


@dataclass(slots=True, eq=False)
class _Sort:
    """Sort of the rows of a fleet with Ray Data."""

    actor: Any
    """The `RowSorter`."""
    shares: Any
    """Reference to what its `sort` returns."""
    has_ended: bool = False


class _Connection(threading.Thread):
    """Connection to a cluster, on a thread of its own: it takes seconds, and ray replaces signals on the main thread.

    The kernel ends the processes of a cluster of this machine when the thread that started them ends.
    """

    def __init__(self, address: str | None) -> None:
        super().__init__(name="ray", daemon=True)
        self._address, self._folder = address, tempfile.mkdtemp(prefix="loraplex-ray-")
        self._mailbox: Any = None
        self._connected, self._closed = threading.Event(), threading.Event()
        self.start()

    def wait(self, seconds: float) -> Any:
        """Return a new mailbox on the cluster; None if there is none in time, or after an error."""
        self._connected.wait(seconds)
        return self._mailbox

    def close(self) -> None:
        """Leave the cluster, and end one of this machine."""
        self._closed.set()
        self.join()
        with suppress(Exception):
            ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self) -> None:
        """Connect, and stay until the end of the connection."""
        options: dict[str, Any] = {"address": self._address}
        if self._address is None:
            options = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": self._folder,
            }
        try:
            ray.init(**options, log_to_driver=False, configure_logging=False)
            mailbox = ray.remote(num_cpus=0, max_restarts=0)(Mailbox).options(resources=_HEAD).remote()
            ray.get(mailbox.take.remote(0.0))
            self._mailbox = mailbox
        except Exception as error:
            log.error("there is no connection to the Ray cluster: %s", error)
        self._connected.set()
        if self._mailbox is not None:
            self._closed.wait()


class RayFitter:
    """Fitter on a Ray cluster: one started on this machine, or a running one. It serves one request at a time."""

    def __init__(self, process: FitProcess, *, address: str | None = None, gpus: float = 0) -> None:
        """Configure the tasks; `is_ready` connects to the cluster.

        address: `ray://host:port`; None starts a cluster of this machine, which ends with this process. gpus: GPUs
        that a task asks for.
        """
        self._process, self._address, self._gpus = process, address, gpus
        self._connection: _Connection | None = None
        self._mailbox: Any = None
        self._poll: Any = None
        self._polled_at = self._received_at = self._began_at = 0.0
        self._number = 0
        self._request: Any = None
        self._sort: _Sort | None = None
        self._task: Any = None
        self._checkpoint = Path()
        self._shares: list[_ShareState] = []
        self._finished = 0
        self._frames: deque[Frame] = deque()
        atexit.register(self.close)

    def is_ready(self, seconds: float) -> bool:
        """Return whether the cluster is connected; connect to it if not, and wait `seconds`. Raises `FitterDied`."""
        if self._mailbox is None:
            if self._connection is None:
                self._connection = _Connection(self._address)
            # The thread ends without a mailbox after an error.
            self._mailbox = self._connection.wait(seconds)
            if self._mailbox is None and not self._connection.is_alive():
                self.close()
                raise FitterDied
            _restore_signal_handlers()
        return self._mailbox is not None

    def begin(self, request: FitRequest, *, checkpoint: Path = Path()) -> None:
        """Submit the tasks of a fit. Raises `FitterDied`."""
        while not self.is_ready(1.0):
            pass
        self._number += 1
        self._checkpoint, self._frames, self._finished = checkpoint, deque(), len(request.done)
        self._received_at = self._began_at = time.monotonic()
        memory = min(request.job.memory_bytes or self._process.memory_bytes, self._process.memory_bytes)
        options = {"num_cpus": self._process.threads, "memory": memory, "num_gpus": self._gpus}
        self._task = ray.remote(run_task).options(**options, max_retries=0)
        try:
            self._request = ray.put(json.dumps(request.to_json()).encode())
            self._shares = [_ShareState(number) for number in range(_count_shares(request))]
            self._sort = None
            if request.job.scratch_bytes and not request.job.spec.candidates:
                actor = ray.remote(num_cpus=0, max_restarts=0)(RowSorter).options(resources=_HEAD).remote()
                shares = actor.sort.remote(self._process.to_json(), self._request, len(self._shares))
                self._sort = _Sort(actor, shares)
                self._frames.append(Note(text="the rows do not fit in memory, and are sorted by group with Ray Data"))
            for share in self._shares:
                self._submit(share)
            if not _is_feasible(options):
                required = ", ".join(f"{name}={amount}" for name, amount in options.items())
                text = f"no node of the cluster has what the fit asks for, {required}: it waits for one"
                self._frames.append(Note(text=text))
        except Exception as error:
            raise self._lose_cluster(error) from error

    def next_frame(self, seconds: float) -> Frame | None:
        """Return the next frame, or None if none came in time; raise `FitterDied`."""
        now = time.monotonic()
        ends_at = now + seconds
        if now - self._received_at > self._process.stopped_seconds:
            # The trainer has not polled for that long. Tasks may have waited for a full mailbox: that is no silence.
            for share in self._shares:
                share.heard_at = None if share.heard_at is None else now
        while not self._frames:
            if not self._shares:
                raise FitterDied
            self._receive(max(0.0, ends_at - time.monotonic()))
            if time.monotonic() >= ends_at:
                break
        return self._frames.popleft() if self._frames else None

    def kill(self) -> None:
        """Cancel the tasks of the request, which ends their processes."""
        self._cancel()
        self._frames.clear()

    def _cancel(self) -> None:
        shares, self._shares, self._request = self._shares, [], None
        self._free_rows()
        # What cancelled tasks still send to the mailbox has the old number, and is dropped.
        self._number += 1
        for share in shares:
            if share.task is not None:
                # Of a task that has just ended, or of a cluster that is gone, nothing is left to cancel.
                with suppress(Exception):
                    ray.cancel(share.task, force=True, recursive=False)

    def _free_rows(self) -> None:
        """End the actor with the sorted rows, if there is one."""
        sort, self._sort = self._sort, None
        if sort is not None:
            with suppress(Exception):
                ray.kill(sort.actor)

    def close(self) -> None:
        """Leave the cluster, and end one of this machine."""
        connection, self._connection, self._mailbox, self._poll, self._request = self._connection, *[None] * 4
        self._sort = None
        self._shares = []
        if connection is not None:
            connection.close()

    def _lose_cluster(self, error: Exception) -> FitterDied:
        """Log a failed call, close the connection, and return the error to raise.

        Ray Client raises errors of several libraries.
        """
        log.error("the Ray cluster does not answer: %s", error)
        self.close()
        return FitterDied()

    def _submit(self, share: _ShareState) -> None:
        """Submit a task for what is left of a share."""
        share.heard_at = share.error = None
        checkpoint = self._checkpoint.read_bytes() if self._checkpoint.is_file() else None
        share.task = self._task.remote(
            self._mailbox, self._number, process=self._process.to_json(), request=self._request,
            share=(share.number, len(self._shares)), done=share.fitted, checkpoint=checkpoint,
            sorted_shares=None if self._sort is None else self._sort.shares,
        )  # fmt: skip

    def _receive(self, seconds: float) -> None:
        """Wait for items of the mailbox, and for the ends of the sort and of tasks."""
        sort, sort_error = self._sort, None
        try:
            if self._poll is None:
                self._poll, self._polled_at = self._mailbox.take.remote(_POLL_SECONDS), time.monotonic()
            sorting = [] if sort is None or sort.has_ended else [sort.shares]
            tasks = [share.task for share in self._shares if share.task is not None]
            ready, _ = ray.wait([*sorting, self._poll, *tasks], timeout=seconds, num_returns=1)
            if sort is not None and sort.shares in ready:
                sort.has_ended, sort_error = True, _error_of(sort.shares)
                self._began_at = time.monotonic()
            items = None
            if self._poll in ready:
                items, self._poll = ray.get(self._poll), None
            for share in self._shares:
                if share.task in ready:
                    share.error, share.task, share.ended_at = _error_of(share.task), None, time.monotonic()
        except Exception as error:
            raise self._lose_cluster(error) from error
        self._received_at = time.monotonic()
        if sort_error is not None and not self._fail(sort_error):
            # Each task would have the same error.
            log.error("the rows could not be sorted: %s", sort_error)
            raise FitterDied(out_of_memory=isinstance(sort_error, OutOfMemoryError))
        if items is None:
            return
        for item in map(Item._make, items):
            if item.kind == ItemKind.LOG:
                for line in item.content.decode(errors="replace").splitlines():
                    log.warning("a task says: %s", line)
            elif item.request == self._number and self._shares:
                self._accept(self._shares[item.share], ItemKind(item.kind), item.content)
        self._find_deaths()

    def _fail(self, error: Exception) -> bool:
        """End the fit, or its attempt, if the cause of an error is one of this project; return whether it is."""
        cause = _cause_of(error)
        if cause is None:
            return False
        self._cancel()
        # `next_frame` raises `FitterDied` after the note.
        is_of_node = isinstance(cause, _OF_NODE)
        self._frames.append(_node_failed(cause.detail) if is_of_node else Failed(error=cause.members()))
        return True

    def _accept(self, share: _ShareState, kind: ItemKind, content: bytes) -> None:
        share.heard_at = self._received_at
        if kind is ItemKind.CHECKPOINT:
            write_checkpoint(self._checkpoint, content)
        elif kind is ItemKind.DIED:
            self._replace_task(share, "its process died", out_of_memory=content == OUT_OF_MEMORY)
        elif kind is ItemKind.FRAME and not share.is_done:
            self._accept_frame(share, frame_from_bytes(content))

    def _accept_frame(self, share: _ShareState, frame: Frame) -> None:
        """Pass a frame on, as if all shares were one fit."""
        if isinstance(frame, Failed) and frame.error["code"] in [kind.code for kind in _OF_NODE]:
            frame = _node_failed(frame.error["detail"])
            try:
                self._replace_task(share, frame.text)
            except FitterDied:
                # `next_frame` raises it after the note.
                self._cancel()
        elif isinstance(frame, Failed):
            self._cancel()
        elif isinstance(frame, Done):
            share.is_done = True
            if not all(other.is_done for other in self._shares):
                return
            self._shares, self._request = [], None
            self._free_rows()
        elif isinstance(frame, Outcomes):
            positions = [trained.position for trained in frame.trained] + [position for position, _ in frame.failed]
            if not set(positions).isdisjoint(share.fitted):
                # A task that counted as dead has sent the stack.
                return
            share.fitted += positions
            self._finished += len(positions)
        elif isinstance(frame, Progress) and len(self._shares) > 1:
            frame = replace(frame, step=self._finished)
        self._frames.append(frame)

    def _find_deaths(self) -> None:
        """Replace the tasks that have died or are silent, after their last items have been taken."""
        now = time.monotonic()
        for share in self._shares:
            if share.is_done:
                continue
            # Only a poll that began after the end has taken all that the task had put into the mailbox.
            if share.error is not None and share.ended_at < self._polled_at:
                if self._fail(share.error):
                    return
                out_of_memory = isinstance(share.error, OutOfMemoryError)
                self._replace_task(share, str(share.error), out_of_memory=out_of_memory)
            is_silent = share.heard_at is not None and now - share.heard_at > self._process.stopped_seconds
            if share.task is not None and is_silent:
                with suppress(RayError):
                    ray.cancel(share.task, force=True, recursive=False)
                self._replace_task(share, f"nothing came from it for {self._process.stopped_seconds:g} s")
        is_sorting = self._sort is not None and not self._sort.has_ended
        is_waiting = self._shares and not is_sorting and all(share.heard_at is None for share in self._shares)
        if is_waiting and now - self._began_at > _SECONDS_BEFORE_NOTE:
            self._began_at = math.inf
            self._frames.append(Note(text="the fit waits for resources of the cluster"))

    def _replace_task(self, share: _ShareState, reason: str, *, out_of_memory: bool = False) -> None:
        """Submit a task for the rest of a fleet's share; raise `FitterDied` if that cannot help, or for another fit."""
        share.deaths += 1
        log.warning("a task died: %s", reason)
        # The sorted rows of all shares end with the `RowSorter`.
        has_no_rows = isinstance(getattr(share.error, "cause", None), OwnerDiedError)
        if out_of_memory or has_no_rows or len(self._shares) == 1 or share.deaths == _MAX_DEATHS:
            raise FitterDied(out_of_memory=out_of_memory)
        try:
            self._submit(share)
        except Exception as error:
            raise self._lose_cluster(error) from error


def _restore_signal_handlers() -> None:
    """Install the handlers of this process again: the core of ray replaces that of SIGTERM, and would abort."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


def _count_shares(request: FitRequest) -> int:
    """Return the number of tasks: 1 unless it is a fleet whose stacks do not depend on each other."""
    job = request.job
    if not job.is_fleet or job.spec.candidates:
        return 1
    cores = int(ray.cluster_resources().get("CPU", 1))
    return max(1, min(_SHARES_PER_CORE * cores, job.positions - len(request.done)))


def _is_feasible(options: Mapping[str, Any]) -> bool:
    """Return whether a node of the cluster has what a task asks for, if nothing else ran there."""
    required = {"CPU": options["num_cpus"], "memory": options["memory"], "GPU": options["num_gpus"]}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0) >= amount for name, amount in required.items()) for node in nodes)


def _node_failed(detail: object) -> Note:
    return Note(text=f"the storage of a node failed: {detail}")


def _cause_of(error: BaseException) -> LoraplexError | None:
    """Return the error of this project that an error of Ray was raised for."""
    cause: BaseException | None = error
    while cause is not None:
        # What Ray raises in place of an error is of its class too, but has another code.
        if isinstance(cause, LoraplexError) and not isinstance(cause, RayError):
            return cause
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    return None


def _error_of(task: Any) -> Exception | None:
    """Return the error that a task has ended with."""
    try:
        ray.get(task)
    except RayError as error:
        failure: Exception = error
        return failure
    return None
