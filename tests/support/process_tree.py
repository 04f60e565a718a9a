"""Processes from outside: who belongs to a service, and who is gone."""

import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import psutil  # type: ignore[import-untyped]

from tests.support.databases import database_settings
from tests.support.deadlines import scaled
from tests.support.fork_server import ForkedPopen
from tests.support.service import LORAPLEX, ServiceProcess, environment, eventually

Process: TypeAlias = Any  # psutil has no types
LEASE_SECONDS = 2
WORKER, TRAINER, FIT = "app.processes.worker", "app.processes.trainer", "adapters.training.execution.fit_child"


def session_of(leader: int) -> list[Process]:
    """Every process that runs in the session that `leader` began; one that only waits to be collected does not."""
    members = []
    for process in psutil.process_iter():
        try:
            of_session = os.getsid(process.pid) == leader
            if of_session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    return members


def children(module: str, of: int | None = None) -> list[Process]:
    """The children of a process, of this one by default, that run this module."""
    found = []
    for child in psutil.Process(of).children():
        # A zombie has no command line.
        with suppress(psutil.NoSuchProcess):
            if module in child.cmdline():
                found.append(child)
    return found


def running(leader: int, module: str) -> list[Process]:
    """The processes of a session that run this module, oldest first."""
    found = []
    for process in session_of(leader):
        try:
            if module in process.cmdline():
                found.append((process.create_time(), process.pid, process))
        except psutil.NoSuchProcess:
            pass
    return [process for *_, process in sorted(found, key=lambda entry: entry[:2])]


def the(leader: int, module: str) -> Process:
    """The one process of a session that runs this module, waited for."""
    (process,) = eventually(lambda: running(leader, module), what=f"a process of {module}")
    return process


def another(leader: int, module: str, than: Process) -> Process:
    """The process that took the place of one that died."""
    return eventually(
        lambda: next((process for process in running(leader, module) if process != than), None),
        what=f"another process of {module}",
    )


def workers(service: ServiceProcess) -> list[Process]:
    """The processes of a service that answer requests."""
    return running(service.process.pid, WORKER)


def all_gone(processes: Iterable[Process]) -> bool:
    """Whether none of them runs."""
    return not any(is_running(process) for process in processes)


def is_running(process: Process) -> bool:
    """Whether a process runs, or could; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def suspend_without_lock(processes: Sequence[Process], data_dir: Path) -> None:
    """Stop processes at a moment without a transaction: the lock of its catalogue would hold everybody up."""

    def suspend() -> bool:
        for process in processes:
            process.suspend()
        try:
            with closing(sqlite3.connect(data_dir / "catalog.sqlite3", timeout=0)) as connection:
                connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            for process in processes:
                process.resume()
            return False
        return True

    eventually(suspend, what="a moment without a lock")


@contextmanager
def suspended(process: Process) -> Iterator[None]:
    """Let a process stand still meanwhile."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


class TrainerProcess:
    """`loraplex trainer` as its users start it, in a session of its own."""

    def __init__(self, data_dir: Path, *, forks: bool = True, **settings: Any) -> None:
        """Start it, forked unless `forks` is false."""
        self.log = data_dir.parent / f"trainer-{id(self)}.log"
        popen = ForkedPopen if forks else subprocess.Popen
        with self.log.open("ab") as log:
            self.process = popen(
                [LORAPLEX, "trainer", "--data-dir", data_dir],
                env=environment(**database_settings(data_dir) | settings),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(scaled(30)))

    def __enter__(self) -> "TrainerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        for process in session_of(self.process.pid):
            process.kill()
        self.process.wait()
