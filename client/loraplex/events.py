"""Events of a job: the parser of their stream, and their validation."""

import codecs
import json
from collections.abc import Iterator

from loraplex import decode
from loraplex.errors import BadAnswer
from loraplex.results import Event, JobStatus


class EventParser:
    """Incremental parser of server-sent events (WHATWG HTML, section 9.2.6)."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._name = ""
        self._data: list[str] = []
        self._id: str | None = None

    def feed(self, received: bytes) -> Iterator[Event]:
        """Return the events that these bytes complete; raise `BadAnswer` for an event that loraplex does not send."""
        lines = (self._text + self._decode(received)).replace("\r\n", "\n").split("\n")
        self._text = lines.pop()
        for line in lines:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                self._name = value
            elif field == "data":
                self._data.append(value)
            elif field == "id" and "\0" not in value:
                self._id = value
            elif not line:
                yield from self._end()

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


def is_last(event: Event) -> bool:
    """Return whether this is the last event of a job; raise `BadAnswer` for data that `Display` cannot read."""
    try:
        if event.name == "progress":
            decode.progress(event.data)
        elif event.name == "log":
            decode.log_line(event.data)
        return event.name == "status" and JobStatus(event.data["status"]).ended
    except (KeyError, ValueError) as error:
        detail = f"an event {event.name!r} is not one of loraplex: {error!r}"
        raise BadAnswer(detail, expected="an event of a job") from error
