"""How a child process learns that its supervisor is gone: the pipe on its standard input closes."""

import os
import threading
from collections.abc import Callable

EXIT_CONFIG = 78
"""Exit status (sysexits.h) of a child that can never start with these settings: starting it again is no use."""


def when_parent_ends(action: Callable[[], None]) -> None:
    """Call `action`, from a thread, once standard input is at its end."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        action()

    threading.Thread(target=watch, daemon=True).start()
