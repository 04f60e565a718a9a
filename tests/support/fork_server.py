"""Python processes of the tests, forked from one that has imported what they need.

A start of `loraplex serve` takes eight seconds of a core, and a fit process two, nearly all of it for imports. Here, a
server imports them once, and forks itself for each start. `ForkedPopen` takes the place of `subprocess.Popen`: its
process has the command line, descriptors, environment and folder that it would have, and it is a child of the tests'
process. A forked supervisor or trainer forks its own children in turn.

A process that depends on its start is started as the service does: with a preloaded library, with limits from a shell,
or if the test is about the start, or about memory.
"""

import atexit
import ctypes
import fcntl
import gc
import inspect
import io
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from adapters.datasets import ingest
from adapters.training.execution import fit_client

_ROOT = Path(__file__).parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_MESSAGE_BYTES = 2**17
# Room for the command line of a forked process, which it writes over that of the server.
_PADDING = " " * 4000
_ARG_START, _ARG_END = 45, 46  # of the fields of /proc/self/stat after the name
_ARGUMENTS = [*inspect.signature(subprocess.Popen._execute_child).parameters][1:]  # type: ignore[attr-defined]
# Epochs of trainings that tests cancel, and the pause in each of their steps.
_ENDLESS_EPOCHS, _REST_SECONDS = 100_000, 0.005
_LOCK = threading.Lock()
_LOWER_PRIORITY = fit_client._lower_priority

_READER, _FIT = "adapters.datasets.ingest", "adapters.training.execution.fit_child"
_IMPORTS = {
    "readers": (_READER, *(f"adapters.datasets.readers.{name}" for name in ("arrow", "csv", "json", "npz"))),
    "service": ("app.processes.worker", "app.processes.trainer", "app.cli", "loraplex.cli", _FIT),
}
"""Modules that each kind of server imports."""

# Coverage of a process is measured from its start.
CAN_FORK = sys.platform == "linux" and "COVERAGE_PROCESS_CONFIG" not in os.environ


@dataclass(frozen=True)
class _Program:
    """Command of a new process, and the environment that it starts in."""

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    pass_fds: Sequence[int]
    is_session_leader: bool

    @staticmethod
    def of(arguments: Sequence[Any]) -> tuple["_Program", list[int]]:
        """Read the arguments of `Popen._execute_child`; return the descriptors of the standard streams too."""
        values = dict(zip(_ARGUMENTS, arguments, strict=True))
        program = _Program(
            list(map(os.fspath, values["args"])),
            dict(os.environ if values["env"] is None else values["env"]),
            os.fspath(values["cwd"] or Path.cwd()),
            list(values["pass_fds"]),
            bool(values["start_new_session"]),
        )
        streams = (values["p2cread"], values["c2pwrite"], values["errwrite"])
        return program, [number if fd == -1 else fd for number, fd in enumerate(streams)]

    def lead_session(self) -> None:
        """Begin a session of its own if the program wants one and does not have it yet."""
        if self.is_session_leader and os.getsid(0) != os.getpid():
            os.setsid()

    def become(self, fds: Sequence[int]) -> NoReturn:
        """Run in this process, which was just forked, with `fds` as its standard streams and its `pass_fds`."""
        try:
            _forget_the_parent()
            self.lead_session()
            _move_descriptors(fds, [0, 1, 2, *self.pass_fds])
            os.chdir(self.folder)
            os.environ.clear()
            os.environ.update(self.environment)
            _show_command_line(self.command)
            status = self._run()
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)

    def _run(self) -> int:
        """Call what the command names, and return the exit status of a Python process that does so."""
        gc.enable()
        try:
            if self.command[0].endswith("/loraplex"):
                sys.argv = [*self.command]
                import_module("loraplex.cli").main()
            elif self.command[1] == "-c":
                sys.argv = ["-c", *self.command[3:]]
                exec(self.command[2], {"__name__": "__main__"})
            else:
                # python -P -m MODULE ARGUMENT…
                sys.argv = [*self.command[3:]]
                import_module(self.command[3]).main()
            status = 0
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        return status


def _forget_the_parent() -> None:
    """Undo what the process has from its parent, and would not have after an `exec`."""
    atexit._clear()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    if middleware := sys.modules.get("app.http.middleware"):
        # A process draws it when it imports the module; the ids of its requests begin with it.
        middleware._PROCESS_PREFIX = secrets.token_hex(10).encode()  # type: ignore[attr-defined]


def _move_descriptors(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Give the descriptors these numbers, and close all others."""
    # First out of the way: the number of one may be that of another.
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(*fds, *numbers) + 1) for fd in fds]
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number)
    kept = [*sorted(numbers), os.sysconf("SC_OPEN_MAX")]
    for below, above in pairwise(kept):
        if above > below + 1:
            os.closerange(below + 1, above)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, "r", closefd=False), "utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
    )


def _show_command_line(command: Sequence[str]) -> None:
    """Write the command over this process's own, as `/proc/PID/cmdline` has it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    text = b"\0".join(map(os.fsencode, command))[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


class _ChildPopen(subprocess.Popen[bytes]):
    """`Popen` in a forked process: it forks this process.

    A fit is started anew if the blobs are in a bucket, because obstore's threads do not survive a fork of its trainer.
    """

    def _execute_child(self, *arguments: Any) -> None:
        if "LORAPLEX_BLOB_URL" in os.environ and _FIT in arguments[0]:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        program, streams = _Program.of(arguments)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            program.become([*streams, *program.pass_fds])
        _parent_after_fork(self, arguments)


class ForkedPopen(subprocess.Popen[bytes]):
    """`Popen` in the tests' process: a server forks itself.

    Only for the console script, `python -P -m` and `python -c`.
    """

    def _execute_child(self, *arguments: Any) -> None:
        if not CAN_FORK:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        program, streams = _Program.of(arguments)
        server = _Server.of("readers" if _READER in program.command else "service")
        self.pid = server.fork(program, [*streams, *program.pass_fds])
        _parent_after_fork(self, arguments)


def run_code(code: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[bytes]:
    """Run `python -c CODE ARGUMENT…` in a forked process, and return how it ended and what it wrote."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with ForkedPopen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _parent_after_fork(process: Any, arguments: Sequence[Any]) -> None:
    values = dict(zip(_ARGUMENTS, arguments, strict=True))
    process._child_created = True
    process._close_pipe_fds(
        *(values[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
    )


def fork_children_of_the_tests() -> None:
    """Let the processes that read files and those that fit, which this process starts, be forked from now on.

    Those that fit keep the priority of the tests.
    """
    _keep_priority(fit_client)
    if CAN_FORK:
        for module in (ingest, fit_client):
            _set_popen(module, ForkedPopen)


@contextmanager
def own_starts() -> Iterator[None]:
    """Let these processes be started as the service does, for tests of their memory, priority and start."""
    fit_client._lower_priority = _LOWER_PRIORITY
    for module in (ingest, fit_client):
        _set_popen(module, subprocess.Popen)
    try:
        yield
    finally:
        fork_children_of_the_tests()


def _keep_priority(module: Any) -> None:
    """Let fits run at the priority of the tests.

    A fit of a second can take minutes at idle priority, because other tests keep all cores busy.
    """
    module._lower_priority = lambda _process: None


def _rest_in_endless_fits(stack: Any) -> None:
    """Pause after each step of a fit that has too many epochs for any test to wait for its end.

    It would take a core from the other tests as long as it runs.
    """
    advance = stack.advance

    def advance_and_rest(self: Any) -> float:
        loss: float = advance(self)
        if self._spec.epochs >= _ENDLESS_EPOCHS:
            time.sleep(_REST_SECONDS)
        return loss

    stack.advance = advance_and_rest


def _set_popen(module: Any, popen: type[subprocess.Popen[bytes]]) -> None:
    """Put a class in the place of the `subprocess.Popen` that a module takes."""
    module.subprocess = SimpleNamespace(
        **{name: getattr(subprocess, name) for name in subprocess.__all__} | {"Popen": popen}
    )


_SERVERS: "dict[str, _Server]" = {}


class _Server:
    """Process that forks itself."""

    def __init__(self, kind: str) -> None:
        # An orphan becomes a child of this process, so the server's grandchildren do.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()", kind, _PADDING],
                cwd=_ROOT,
                env=os.environ | (ingest._ENVIRONMENT if kind == "readers" else {}),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
            )

    @staticmethod
    def of(kind: str) -> "_Server":
        """Return the server of a kind, started if there is none."""
        with _LOCK:
            if kind not in _SERVERS:
                _SERVERS[kind] = _Server(kind)
            return _SERVERS[kind]

    def fork(self, program: _Program, fds: Sequence[int]) -> int:
        """Start a program, and return the id of its process."""
        with _LOCK:
            socket.send_fds(self._control, [json.dumps(vars(program)).encode()], fds)
            return int(self._control.recv(16))

    def close(self) -> None:
        """End the server; what it has started goes on."""
        self._control.close()
        self._process.wait()


@atexit.register
def end_servers() -> None:
    """End the processes that fork."""
    while _SERVERS:
        _SERVERS.popitem()[1].close()


def serve() -> None:
    """Import the modules of the kind in the arguments, and fork for each message on standard input."""
    gc.disable()
    kind = sys.argv[1]
    for name in _IMPORTS[kind]:
        import_module(name)
    if kind == "service":
        for name in ("app.processes.supervisor", "adapters.training.execution.fit_client"):
            _set_popen(import_module(name), _ChildPopen)
        _keep_priority(import_module("adapters.training.execution.fit_client"))
        _rest_in_endless_fits(import_module("adapters.training.gradient.stack").Stack)
        import_module("tests.support.service_templates").prepare_forks()
    gc.freeze()
    # Python has put the folder that it started in there.
    sys.path.remove("")
    control = socket.socket(fileno=os.dup(0))
    while True:
        message, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 16)
        if not message:
            os._exit(0)
        control.send(str(_fork_orphan(_Program(**json.loads(message)), fds)).encode())
        for fd in fds:
            os.close(fd)


def _fork_orphan(program: _Program, fds: Sequence[int]) -> int:
    """Start a program in a process whose parent has ended, which makes it a child of the tests' process."""
    reading, writing = os.pipe()
    is_orphan, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            # First, because a test that ends at once kills what it finds in the session.
            program.lead_session()
            os.write(writing, str(os.getpid()).encode())
            # It may ask to be killed when its parent ends.
            os.read(is_orphan, 1)
            program.become(fds)
        os._exit(0)
    os.waitpid(parent, 0)
    os.write(tell, b".")
    child = int(os.read(reading, 16))
    for fd in (reading, writing, is_orphan, tell):
        os.close(fd)
    return child
