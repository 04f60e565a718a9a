"""Errors on standard error, in one or two lines that say what to do, and exit statuses."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer

from loraplex import errors
from loraplex.cli.json_output import problem
from loraplex.errors import LoraplexError
from loraplex.sanitize import escape

_FEW_ROWS = 5
# Field of a problem with an uploaded file. It is not shown, because the user named a file and not a field.
_WHOLE = "body"


class WrongUsage(LoraplexError):
    """The command line is incomplete or contradictory."""

    code = "usage"


class BadFile(LoraplexError):
    """A file cannot be used."""

    code = "bad_file"


class Interrupted(LoraplexError):
    """The command was ended by Ctrl-C."""

    code = "interrupted"


@contextmanager
def told(url: str, *, as_json: bool) -> Iterator[None]:
    """Print an error, and exit with its status."""
    try:
        yield
    except LoraplexError as error:
        _say(error, url, as_json=as_json)
        raise typer.Exit(exit_status(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        of = f": {error.filename}" if error.filename else ""
        _say(BadFile(f"Cannot read or write{of}: {error.strerror or error}"), url, as_json=as_json)
        raise typer.Exit(REFUSED) from None


def _say(error: LoraplexError, url: str, *, as_json: bool) -> None:
    print(json.dumps(problem(error)) if as_json else in_words(error, url), file=sys.stderr)


def exit_status(error: LoraplexError) -> int:
    """Return the exit status of an error."""
    if isinstance(error, Interrupted):
        return INTERRUPTED
    if isinstance(error, WrongUsage):
        return USAGE
    if isinstance(error, errors.Unreachable | errors.TimedOut | errors.BadAnswer):
        return UNREACHABLE
    if isinstance(error, errors.JobFailed | errors.JobCancelled):
        return JOB_ENDED_BADLY
    return REFUSED


def in_words(error: LoraplexError, url: str) -> str:
    """Return an error in one or two lines, with up to five bad rows of a data set below."""
    if isinstance(error, Interrupted):  # our own lines
        return error.detail
    lines = [f"loraplex: {error.detail}"]
    hint = _hint(error, url)
    if hint:
        lines.append(hint)
    if isinstance(error, errors.BadRows):
        lines += [
            f"  row {bad.row}" + (f", column {bad.column}" if bad.column else "") + f": {bad.reason}"
            for bad in error.rows[:_FEW_ROWS]
        ]
        more = len(error.rows) - _FEW_ROWS
        lines += [f"  … and {more} more"] if more > 0 else []
    return "\n".join(map(escape, lines))


def _hint(error: LoraplexError, url: str) -> str:
    if isinstance(error, errors.Unreachable):
        return f"Is the service running at {url}? Start it with `loraplex serve`, or say where it is by --url."
    if isinstance(error, errors.BadAnswer | errors.RouteNotFound) or _from_in_between(error):
        return f"Is {url} the address of a loraplex service? Say where it is by --url or LORAPLEX_URL."
    if isinstance(error, errors.AdapterNotFound):
        return "`loraplex adapters` lists those that there are."
    if isinstance(error, errors.DatasetNotFound):
        return "`loraplex dataset list` lists those that there are."
    if isinstance(error, errors.JobNotFound):
        return "`loraplex jobs` lists those that there are."
    if isinstance(error, errors.QueueFull):
        return "It is busy: try again in a moment."
    return _where(error)


def _from_in_between(error: LoraplexError) -> bool:
    """Return whether the answer comes from a proxy: it has neither the form of the service nor that of `/v2`."""
    return error.status is not None and not {"code", "error"} & error.members.keys()


def _where(error: LoraplexError) -> str:
    """Return the position of an error, unless its detail already gives it."""
    parts = []
    if error.field and error.field != _WHOLE and error.field not in error.detail:
        parts.append(f"field: {error.field}")
    if error.row is not None and f"row {error.row}" not in error.detail:
        parts.append(f"row: {error.row}")
    if error.given is not None and str(error.given) not in error.detail:
        parts.append(f"given: {error.given}")
    if error.expected and error.expected not in error.detail:
        parts.append(f"expected: {error.expected}")
    return "  " + "; ".join(parts) if parts else ""


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
