"""Address of the service."""

import os

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "LORAPLEX_URL"


def address(url: str | None = None) -> str:
    """Return the given address, or that of the environment, or that of a local `loraplex serve`."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
