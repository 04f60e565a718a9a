"""Signals, the exit status and the argument that the supervisor and its child processes share."""

import os
import signal
import threading
from collections.abc import Callable

# Exit status (sysexits.h) of a child that cannot start with these settings, so that a restart is useless.
EXIT_CONFIG = 78
# Argument of the worker that logs the warnings at the start of a service.
FIRST_WORKER = "first"


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
