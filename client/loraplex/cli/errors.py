"""Errors on standard error, in one or two lines that say what to do, and exit statuses."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import typer

from loraplex import errors
from loraplex.cli.output import problem
from loraplex.errors import LoraplexError
from loraplex.progress import escape

REFUSED: Final = 1
"""The service refused the request, or a file cannot be used."""
USAGE: Final = 2
"""The command line is wrong, or does not fit the data. Nothing was trained, published or deleted; `FILE` may have been
uploaded as a data set."""
UNREACHABLE: Final = 3
"""No service answered, or not in time."""
JOB_ENDED_BADLY: Final = 4
"""A job failed or was cancelled."""
INTERRUPTED: Final = 130
"""Ctrl-C."""


class WrongUsage(LoraplexError):
    """The command line is incomplete or contradictory."""

    code = "usage"


class BadFile(LoraplexError):
    """A file cannot be used."""


class Interrupted(LoraplexError):
    """The command was ended by Ctrl-C."""


# All other errors are REFUSED.
_STATUSES = (
    (Interrupted, INTERRUPTED),
    (WrongUsage, USAGE),
    (errors.Unreachable | errors.TimedOut | errors.BadAnswer, UNREACHABLE),
    (errors.JobFailed | errors.JobCancelled, JOB_ENDED_BADLY),
)
_NOT_RUNNING = "Is the service running at {url}? Start it with `loraplex serve`, or say where it is by --url."
_OTHER_SERVICE = "Is {url} the address of a loraplex service? Say where it is by --url or LORAPLEX_URL."
_LISTED = "`loraplex {}` lists the existing ones."
_HINTS = (
    (errors.Unreachable, _NOT_RUNNING),
    (errors.BadAnswer | errors.RouteNotFound, _OTHER_SERVICE),
    (errors.AdapterNotFound, _LISTED.format("adapters")),
    (errors.DatasetNotFound, _LISTED.format("dataset list")),
    (errors.JobNotFound, _LISTED.format("jobs")),
    (errors.Unauthenticated, "`loraplex login --url {url}` keeps a key for it, or set LORAPLEX_KEY."),
    (errors.QueueFull, "It is busy: try again in a moment."),
)
_SHOWN_ROWS = 5


@contextmanager
def reported(url: str, *, as_json: bool) -> Iterator[None]:
    """Print an error, and exit with its status."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (LoraplexError, OSError) as caught:
        error = _bad_file(caught) if isinstance(caught, OSError) else caught
        print(json.dumps(problem(error)) if as_json else in_words(error, url), file=sys.stderr)
        raise typer.Exit(exit_status(error)) from None


def exit_status(error: LoraplexError) -> int:
    """Return the exit status of an error."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), REFUSED)


def in_words(error: LoraplexError, url: str) -> str:
    """Return an error in one or two lines, with up to five bad rows of a data set below."""
    if isinstance(error, Interrupted):  # our own lines
        return error.detail
    bad_rows = list_bad_rows(error.rows) if isinstance(error, errors.BadRows) else ()
    return "\n".join(escape(line) for line in (f"loraplex: {error.detail}", _hint(error, url), *bad_rows) if line)


def list_bad_rows(rows: Sequence[errors.BadRow]) -> Iterator[str]:
    """Yield a line for each of the first rows of a data set that cannot be used, and the number of the others."""
    for bad in rows[:_SHOWN_ROWS]:
        yield f"  row {bad.row}" + (f", column {bad.column}" if bad.column else "") + f": {bad.reason}"
    if len(rows) > _SHOWN_ROWS:
        yield f"  … and {len(rows) - _SHOWN_ROWS} more"


def _bad_file(error: OSError) -> BadFile:
    return BadFile(": ".join(map(str, filter(None, ("Cannot read or write", error.filename, error.strerror or error)))))


def _hint(error: LoraplexError, url: str) -> str:
    # An answer that has neither the form of the service nor that of `/v2` comes from a proxy.
    if error.status is not None and not {"code", "error"} & error.members.keys():
        return _OTHER_SERVICE.format(url=url)
    return next((hint.format(url=url) for kind, hint in _HINTS if isinstance(error, kind)), _position(error))


def _position(error: LoraplexError) -> str:
    """Return the position of an error, unless its detail already gives it."""
    # The field `body` of an uploaded file is not shown, because the user named a file and not a field.
    field = None if error.field == "body" else error.field
    parts = {"field": field, "row": error.row, "given": error.given, "expected": error.expected or None}
    shown = [
        f"{name}: {value}"
        for name, value in parts.items()
        if value is not None and (f"row {value}" if name == "row" else str(value)) not in error.detail
    ]
    return "  " + "; ".join(shown) if shown else ""
