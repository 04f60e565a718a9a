"""Style sheets and scripts, under an address that changes with their content."""

import hashlib
import os
from functools import cache
from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parents[1] / "static"
PREFIX = "/static"
_NOSNIFF = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}


@cache
def release() -> str:
    """A name for all files together. A module's relative imports stay within it, so they change as one."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(FOLDER).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return f"v-{digest.hexdigest()[:16]}"


def address(path: str) -> str:
    """Where a page finds one of the files."""
    return f"{PREFIX}/{release()}/{path}"


class Assets(StaticFiles):
    """The files in `app/web/static`: kept for good under today's name, and asked after each time otherwise."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file."""
        first, _, rest = path.partition(os.sep)
        named = first == release()
        answer = await super().get_response(rest if named else path, scope)
        answer.headers.update(_NOSNIFF)
        answer.headers["Cache-Control"] = "public, max-age=31536000, immutable" if named else "no-cache"
        return answer
