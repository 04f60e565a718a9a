"""Names that a shell completes: the service is asked, and where it says nothing in half a second there are none."""

import json
from urllib.parse import quote

from loraplex.address import address

_SECONDS = 0.5
_MOST = 50


def complete_adapter(incomplete: str) -> list[str]:
    """Adapters whose names begin so."""
    return _names("adapters", incomplete)


def complete_dataset(incomplete: str) -> list[str]:
    """Data sets whose names begin so."""
    return _names("datasets", incomplete)


def complete_job(incomplete: str) -> list[str]:
    """The newest jobs' ids."""
    return [found for found in _ask("jobs?limit=50", "id") if found.startswith(incomplete)]


def _names(kind: str, incomplete: str) -> list[str]:
    return _ask(f"{kind}?limit={_MOST}&prefix={quote(incomplete)}", "name")


def _ask(path: str, member: str) -> list[str]:
    # Not the client: whoever presses a key waits for its import.
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(f"{address().rstrip('/')}/{path}", timeout=_SECONDS) as answer:
            return [str(found[member]) for found in json.load(answer)["data"]]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return []
