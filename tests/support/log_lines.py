"""The lines that a service has logged."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.service import eventually


def lines(log: Path) -> list[dict[str, Any]]:
    """Every whole line, each of which must be an object."""
    text = log.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def line_of(log: Path, request_id: str) -> dict[str, Any]:
    """The one line of a request, once it is there."""

    def found() -> list[dict[str, Any]]:
        return [line for line in lines(log) if line["event"] == "request" and line["request_id"] == request_id]

    (line,) = eventually(found, what=f"the line of {request_id}")
    return dict(line)


@contextmanager
def logging_restored() -> Iterator[None]:
    """Undo what `serve` and `trainer` set up: lines to a standard error that is closed afterwards."""
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook)
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        sys.excepthook, threading.excepthook = hooks
