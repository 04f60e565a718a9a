"""What the processes print on standard error: one line an event, as JSON for machines or as text for people.

Everything that logs does so through the standard library, uvicorn and Alembic too; structlog makes the lines.
"""

import json
import logging
import sys
import threading
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from app.settings import LogFormat

Render = Callable[[MutableMapping[str, Any]], bytes]
"""The fields of an event, in their order → its line, without the end of the line."""
_FIRST = ("timestamp", "level", "event", "logger", "process")
_COLUMN = 30
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {0x2028: "\\u2028", 0x2029: "\\u2029"}
"""What could begin a line or speak to a terminal, as it is shown instead."""
_LINE_ENDS = {"\x85".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}
"""What JSON leaves as it is, and some readers take for the end of a line."""

log = logging.getLogger(__name__)


def configure(form: LogFormat = LogFormat.AUTO, *, process: str = "loraplex") -> None:
    """Let this process log from INFO on; of Alembic, which talks at every start, only what is wrong.

    `process` stands in each line. May be called again, once a process knows its name.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _named(process),
                # Text, and nothing more: structlog's other forms of a traceback show local variables, which are inputs.
                structlog.processors.format_exc_info,
                _rendered(line_of(form)),
            ],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    sys.excepthook = _log_the_end
    threading.excepthook = lambda told: _log_the_end(told.exc_type, told.exc_value, told.exc_traceback)


def _log_the_end(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, KeyboardInterrupt):
        log.critical("nothing has caught this", exc_info=(kind, error, traceback))


def line_of(form: LogFormat) -> Render:
    """How an event becomes a line in this form; `auto` is text where standard error is a terminal."""
    terminal = sys.stderr.isatty()
    return _console(colors=terminal) if form is LogFormat.CONSOLE or (form is LogFormat.AUTO and terminal) else _json


def _named(process: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, fields: EventDict) -> EventDict:
        fields["process"] = process
        fields.pop("color_message", None)  # uvicorn's second form of the same
        return fields

    return add


def _rendered(render: Render) -> Processor:
    def end(_logger: WrappedLogger, _method: str, fields: EventDict) -> str:
        first = {name: fields[name] for name in _FIRST if name in fields}
        return render(first | dict(fields)).decode()

    return end


def _json(fields: MutableMapping[str, Any]) -> bytes:
    try:
        line = orjson.dumps(fields, default=str)
    except (TypeError, ValueError):  # a lone surrogate, an integer past 64 bits
        return json.dumps(dict(fields), default=str).encode()
    if not line.isascii():
        for character, escaped in _LINE_ENDS.items():
            line = line.replace(character, escaped)
    return line


def _console(*, colors: bool) -> Render:
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, sort_keys=False, pad_event_to=_COLUMN, exception_formatter=structlog.dev.plain_traceback
    )

    def render(fields: MutableMapping[str, Any]) -> bytes:
        shown = {name: value if name == "exception" else _printable(value) for name, value in fields.items()}
        return str(renderer(None, "", shown)).encode("utf-8", "backslashreplace")

    return render


def _printable(value: object) -> object:
    return value.translate(_CONTROLS) if isinstance(value, str) else value
