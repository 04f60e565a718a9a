"""Logs of the processes on standard error: one line for each event, as JSON or as text.

All modules, uvicorn and Alembic log through the standard library; structlog formats the lines.
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

# Formats the fields of an event, in their order, as a line without its line feed.
Render = Callable[[MutableMapping[str, Any]], bytes]
_FIRST = ("timestamp", "level", "event", "logger", "process")
_COLUMN = 30
# Characters that could begin a line or control a terminal, and their escaped form.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {0x2028: "\\u2028", 0x2029: "\\u2029"}
# Characters that JSON does not escape, and that some readers take for the end of a line.
_LINE_ENDS = {"\x85".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}

log = logging.getLogger(__name__)


def configure(form: LogFormat = LogFormat.AUTO, *, process: str = "loraplex") -> None:
    """Log from INFO on, and from WARNING on for Alembic, which logs at every start.

    `process` is a field of each line. May be called again when the name of the process is known.
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
                # Plain tracebacks: structlog's other forms show local variables, which may be inputs.
                structlog.processors.format_exc_info,
                _renderer(line_of(form), process),
            ],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, KeyboardInterrupt):
        log.critical("uncaught exception", exc_info=(kind, error, traceback))


def line_of(form: LogFormat) -> Render:
    """Return the formatter of lines; `auto` means text if standard error is a terminal, otherwise JSON."""
    terminal = sys.stderr.isatty()
    return _console(colors=terminal) if form is LogFormat.CONSOLE or (form is LogFormat.AUTO and terminal) else _json


def _renderer(render: Render, process: str) -> Processor:
    """Return the last processor: it adds the name of the process, orders the fields and renders the line."""

    def render_line(_logger: WrappedLogger, _method: str, fields: EventDict) -> str:
        fields["process"] = process
        fields.pop("color_message", None)  # uvicorn adds the message again, with colors
        first = {name: fields[name] for name in _FIRST if name in fields}
        return render(first | dict(fields)).decode()

    return render_line


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
