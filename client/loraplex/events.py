"""Server-sent events (WHATWG HTML, section 9.2): bytes → events."""

import codecs
import json
from collections.abc import Iterator

from loraplex.errors import BadAnswer
from loraplex.results import Event


class EventParser:
    """Takes a stream's bytes as they come, cut anywhere, and gives the events that are complete."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._name = ""
        self._data: list[str] = []
        self._id: str | None = None

    def feed(self, received: bytes) -> Iterator[Event]:
        """The events that these bytes complete; raises `BadAnswer` where one is none of loraplex's."""
        lines = (self._text + self._decode(received)).replace("\r\n", "\n").split("\n")
        self._text = lines.pop()
        for line in lines:
            if line:
                self._take(line)
            else:
                yield from self._end()

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        elif field == "id" and "\0" not in value:
            self._id = value

    def _end(self) -> Iterator[Event]:
        name, text, self._name, self._data = self._name, "\n".join(self._data), "", []
        if not text:
            return
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise BadAnswer(f"an event's data is no JSON object: {text[:100]}", expected="an event of a job")
        yield Event(name, data, self._id)
