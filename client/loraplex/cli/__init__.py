"""Command line. Nothing slow is imported before a command needs it; start with `root`."""

import io
import os
import signal
import sys
from typing import TextIO


def main() -> None:
    """Run the command line, as the console script does."""
    _prepare_stdio()
    try:
        from loraplex.cli.root import cli

        cli(prog_name="loraplex")
    except KeyboardInterrupt:
        # Before a command has started, even while typer is imported: so the status is not that of `errors`.
        raise SystemExit(128 + signal.SIGINT) from None


def _prepare_stdio() -> None:
    """Open the null device for closed streams, and print `?` for characters that the encoding lacks."""
    # In this order: each stream takes the lowest free descriptor, so that no connection becomes standard output.
    sys.stdin = sys.stdin or _open_null("r")
    sys.stdout = sys.stdout or _open_null("w")
    sys.stderr = sys.stderr or _open_null("w")
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _open_null(mode: str) -> TextIO:
    return io.TextIOWrapper(io.FileIO(os.devnull, mode), encoding="utf-8")
