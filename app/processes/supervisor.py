"""Supervisor: starts, restarts and stops API workers and trainers as child processes."""

import errno
import logging
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters.child_process import StoppedClock, command, stop_on_signals
from app.observability.metrics.process_slot import METRICS, clean_slots
from app.processes.tls import tls_context
from app.settings import EXIT_CONFIG, Settings, SettingsError, as_environment, make_data_dir

# Argument of the worker that logs the warnings at the start of a service.
FIRST_WORKER = "first"
_POLL_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.5
# A child that ran this long before it died is restarted without a pause.
_STEADY_SECONDS = 30.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Child:
    """One child process with its restarts."""

    name: str
    arguments: Sequence[str]
    sockets: Sequence[int] = ()
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    start_at: float = 0.0
    pause_seconds: float = _FIRST_PAUSE_SECONDS
    stopped: StoppedClock = field(default_factory=StoppedClock)


def serve(settings: Settings) -> int:
    """Run the service until SIGTERM or SIGINT; return the exit status.

    The standard input of each child is a pipe from this process, so that the children end when it dies in any way.
    Raises `SettingsError` if it cannot listen on the address, or use the data folder or the certificate.
    """
    # The workers read the files themselves; here, because a mistake is reported before anything starts.
    scheme = "http" if tls_context(settings) is None else "https"
    make_data_dir(settings)
    stop = stop_on_signals()
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    log.info("listening on %s://%s:%d, data in %s", scheme, address, port, settings.data_dir)
    worker, trainer = command("app.processes.worker", str(listener.fileno())), command("app.processes.trainer")
    children = [
        _Child(f"worker {index + 1}", worker if index else [*worker, FIRST_WORKER], [listener.fileno()])
        for index in range(settings.workers)
    ]
    children += [_Child(f"trainer {index + 1}", trainer) for index in range(settings.trainers)]
    environment = as_environment(settings)
    _clean_metrics(settings)
    status = 0
    try:
        while not stop.is_set():
            for child in children:
                if _supervise(child, environment, settings.lease_seconds) == EXIT_CONFIG:
                    status = EXIT_CONFIG
                    stop.set()
            stop.wait(_POLL_SECONDS)
    finally:
        listener.close()
        _terminate(children, settings.shutdown_grace_seconds)
    return status


def _clean_metrics(settings: Settings) -> None:
    """Remove the metrics of an earlier run's processes, so that counters begin at zero."""
    try:
        for role, count in (("worker", settings.workers), ("trainer", settings.trainers)):
            if count:
                clean_slots(settings.data_dir / METRICS, role)
    except OSError as error:
        log.warning("the metrics of an earlier run cannot be removed: %s", error)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        hint = "; is another one running? --port takes another" if error.errno == errno.EADDRINUSE else ""
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror or error}{hint}") from None


def _supervise(child: _Child, environment: dict[str, str], lease_seconds: float) -> int | None:
    """Start a child that does not run, unless it pauses after a death; return its exit status if it has just ended.

    A child that has been stopped (SIGSTOP) for longer than the lease is killed, because it may hold the catalogue's
    lock.
    """
    now = time.monotonic()
    if child.process is None:
        if now >= child.start_at:
            child.process = subprocess.Popen(
                child.arguments, stdin=subprocess.PIPE, env=environment, pass_fds=child.sockets
            )
            child.started_at, child.stopped = now, StoppedClock()
        return None
    status = child.process.poll()
    if status is None:
        if child.stopped.seconds(child.process.pid) > lease_seconds:
            log.error("%s has been stopped for more than %g s and is killed", child.name, lease_seconds)
            child.process.kill()
            child.stopped = StoppedClock()
        return None
    if child.process.stdin is not None:
        child.process.stdin.close()
    child.process = None
    is_steady = now - child.started_at >= _STEADY_SECONDS
    child.start_at = now if is_steady else now + child.pause_seconds
    child.pause_seconds = _FIRST_PAUSE_SECONDS if is_steady else min(2 * child.pause_seconds, _MAX_PAUSE_SECONDS)
    if status != EXIT_CONFIG:
        log.error("%s ended with status %d; it is started again", child.name, status)
    return status


def _terminate(children: Sequence[_Child], grace_seconds: float) -> None:
    """Send SIGTERM to all children, and SIGKILL to those that do not end in time."""
    running = [child.process for child in children if child.process is not None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + grace_seconds
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("process %d has not ended in %g s and is killed", process.pid, grace_seconds)
            process.kill()
            process.wait()
