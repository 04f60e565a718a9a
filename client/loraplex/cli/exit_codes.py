"""Exit statuses. docs/command-line.md has them as a table."""

from typing import Final

REFUSED: Final = 1
"""The service refused what was asked for, or a file could not be used."""
USAGE: Final = 2
"""The command line itself is wrong, or does not go with the data. Nothing was trained, published or deleted; `FILE` may
have been uploaded as a data set."""
UNREACHABLE: Final = 3
"""No service answered, or not in time."""
JOB_ENDED_BADLY: Final = 4
"""A job failed or was cancelled."""
INTERRUPTED: Final = 130
"""Ctrl-C."""
