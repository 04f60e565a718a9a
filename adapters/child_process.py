"""Child processes of the service: the launcher, signals, and a clock of how long a process has been stopped.

`python -m adapters.child_process MODULE …` imports MODULE and calls its `main`. The launcher is part of the domain
because the fit client starts the fit process with it; `app.processes` starts its workers and trainers with it too.
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

_CHECK_SECONDS = 1.0
# Most seconds that one check may add, because the checking process may itself have been stopped.
_MAX_STEP_SECONDS = 2.0


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `main` of a module in a new process."""
    return [sys.executable, "-P", "-m", __name__, module, *arguments]


def main() -> None:
    """Import the module that the first argument names, and run its `main`."""
    # The imported objects, hundreds of thousands, are never freed. Without the collector, which would scan them again
    # and again while they are created, a process starts a quarter faster.
    gc.disable()
    del sys.argv[0]
    module = import_module(sys.argv[0])
    gc.freeze()
    gc.enable()
    module.main()


def on_parent_exit(action: Callable[[], None]) -> None:
    """Call `action` on a thread when standard input, a pipe from the supervisor, is closed."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        action()

    threading.Thread(target=watch, daemon=True).start()


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # On a thread: the handler interrupts the main thread, which may hold the event's lock.
        signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    return stop


class StoppedClock:
    """Measure of how long one process has been stopped (SIGSTOP) without a break. Linux only.

    A stopped process keeps what it holds, and does not end by itself.
    """

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._checked_at = monotonic() - _CHECK_SECONDS
        self._was_stopped = False
        self._seconds = 0.0

    def seconds(self, pid: int) -> float:
        """Return for how many seconds the process has been stopped, from checks that are about a second apart."""
        now = self._monotonic()
        step = now - self._checked_at
        if self._was_stopped or step >= _CHECK_SECONDS:
            self._checked_at = now
            # The first check that finds the process stopped adds nothing.
            was_stopped, self._was_stopped = self._was_stopped, _is_stopped(pid)
            still = was_stopped and self._was_stopped
            self._seconds = self._seconds + min(step, _MAX_STEP_SECONDS) if still else 0.0
        return self._seconds


def _is_stopped(pid: int) -> bool:
    """Return whether a process is in state T (stopped), not in state t (held by a debugger)."""
    try:
        # The state follows the name, which is in parentheses and may contain parentheses.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    main()
