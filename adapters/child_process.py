"""Starts a process of the service: `python -m adapters.child_process MODULE …` imports MODULE and calls its `main`.

What is imported stays for good, hundreds of thousands of objects, and Python's collector would walk over them again and
again while they come: a quarter of the time that a process takes to start.
"""

import gc
import sys
from importlib import import_module


def command(module: str, *arguments: str) -> list[str]:
    """What to run for it."""
    return [sys.executable, "-P", "-m", __name__, module, *arguments]


def main() -> None:
    """The process, from here on."""
    gc.disable()
    del sys.argv[0]
    module = import_module(sys.argv[0])
    gc.freeze()
    gc.enable()
    module.main()


if __name__ == "__main__":
    main()
