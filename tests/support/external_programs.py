"""Programs, files and rights that some tests need, and that a machine may lack."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

NEED_ALL = "TESTS_NEED_ALL"
"""If this environment variable is set, as in `.ci/run`, a test that lacks something fails; otherwise it is skipped."""
_SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
"""Files of other projects that tests read and the repository does not have, in a folder beside it."""


def program(*names: str) -> str:
    """The path of the first of these that is installed; skips, or fails, the test where none is."""
    # Debian has servers in /usr/sbin, which is on root's path alone.
    places = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    for name in names:
        if path := shutil.which(name, path=places):
            return path
    return skip_or_fail(f"{' or '.join(names)} is not installed")


def shared_file(name: str) -> Path:
    """The path of a file in the folder of shared data; skips, or fails, the test where there is none."""
    path = _SHARED_DATA / name
    if not path.exists():
        skip_or_fail(f"{path} does not exist")
    return path


def skip_or_fail(message: str) -> NoReturn:
    """Skip the test because this machine lacks something, or fail it if `TESTS_NEED_ALL` is set."""
    if os.environ.get(NEED_ALL):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)
