"""The lines that a service has logged."""

import json
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
