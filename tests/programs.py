"""Programs that some tests drive, and that a machine may lack."""

import os
import shutil

import pytest

NEED_ALL = "TESTS_NEED_ALL"
"""Where the environment has it, as `.ci/run` says, a test whose program is missing fails; elsewhere it is skipped."""


def program(*names: str) -> str:
    """The path of the first of these that is installed; skips, or fails, the test where none is."""
    # Debian has servers in /usr/sbin, which is on root's path alone.
    places = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    for name in names:
        if path := shutil.which(name, path=places):
            return path
    missing = f"{' or '.join(names)} is not installed"
    if os.environ.get(NEED_ALL):
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)
