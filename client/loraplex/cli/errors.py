"""Errors on standard error, one or two lines that say what to do, and the exit status that they mean."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from loraplex import errors
from loraplex.cli.exit_codes import INTERRUPTED, JOB_ENDED_BADLY, REFUSED, UNREACHABLE, USAGE
from loraplex.cli.json_output import problem
from loraplex.errors import LoraplexError
from loraplex.sanitize import visible

_FEW_ROWS = 5
_WHOLE = "body"
"""The field of a problem with a file that was sent, which says nothing to who named the file."""


class WrongUsage(LoraplexError):
    """The command line does not say what to do"""

    code = "usage"


class BadFile(LoraplexError):
    """A file cannot be used"""

    code = "bad_file"


class Interrupted(LoraplexError):
    """It was ended by Ctrl-C"""

    code = "interrupted"


@contextmanager
def told(url: str, *, as_json: bool) -> Iterator[None]:
    """Say what went wrong, and end with its exit status."""
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
    """What the command ends with."""
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
    """One or two lines for people; up to five rows of a data set below."""
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
    return "\n".join(map(visible, lines))


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
    """Whether something answered that speaks neither as the service does nor as its `/v2` does."""
    return error.status is not None and not {"code", "error"} & error.members.keys()


def _where(error: LoraplexError) -> str:
    """What the detail may not have said."""
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
