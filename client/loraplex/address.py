"""Where the service is, unless somebody says."""

import os

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "LORAPLEX_URL"


def address(url: str | None = None) -> str:
    """The one given, else the environment's, else where `loraplex serve` listens."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
