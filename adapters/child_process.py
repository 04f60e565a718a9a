"""Child processes of the service: the launcher, and a clock of how long a process has been stopped.

`python -m adapters.child_process MODULE …` imports MODULE and calls its `main`. The launcher is part of the domain
because the fit client starts the fit process with it; `app.processes` starts its workers and trainers with it too.
"""

import gc
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


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


_CHECK_SECONDS = 1.0
_MAX_STEP_SECONDS = 2.0
"""Most seconds that one look may add: the process that looks may have been stopped too."""


class StoppedClock:
    """Measures how long one process has been stopped without a break, from regular looks at it. Linux only."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._looked_at = monotonic() - _CHECK_SECONDS
        self._was_stopped = False
        self._seconds = 0.0

    def seconds(self, pid: int) -> float:
        """Look about once a second, and at every call while it is stopped."""
        now = self._monotonic()
        step = now - self._looked_at
        if self._was_stopped or step >= _CHECK_SECONDS:
            self._looked_at = now
            # The first look that finds it stopped adds nothing.
            was_stopped, self._was_stopped = self._was_stopped, _is_stopped(pid)
            still = was_stopped and self._was_stopped
            self._seconds = self._seconds + min(step, _MAX_STEP_SECONDS) if still else 0.0
        return self._seconds


def _is_stopped(pid: int) -> bool:
    """Return whether a process is in state T. One that a debugger holds is in state t."""
    try:
        # The state follows the name, which is in parentheses and may have some of its own.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    main()
