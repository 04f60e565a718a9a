"""Signals, exit status and argument that a supervisor and its child processes share."""

import os
import signal
import threading
from collections.abc import Callable

EXIT_CONFIG = 78
"""Exit status (sysexits.h) of a child that can never start with these settings: starting it again is no use."""
FIRST = "first"
"""Argument of one worker of a service: it does what is done once at a start."""


def when_parent_ends(action: Callable[[], None]) -> None:
    """Call `action`, from a thread, once standard input is at its end: it is a pipe of the supervisor's."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        action()

    threading.Thread(target=watch, daemon=True).start()


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # From a thread: a handler interrupts this very thread, which may hold the event's lock.
        signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    return stop
