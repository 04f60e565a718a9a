"""Standard input, output and error, however the command was started."""

import io
import os
import sys
from typing import TextIO


def prepare() -> None:
    """Closed ones become the null device; output in an encoding that lacks a character has ? for it."""
    # In this order: each takes the lowest number that is free, so that no connection becomes standard output.
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    sys.stderr = sys.stderr or _null("w")
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _null(mode: str) -> TextIO:
    return io.TextIOWrapper(io.FileIO(os.devnull, mode), encoding="utf-8")
