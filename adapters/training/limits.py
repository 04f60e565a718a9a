"""Bounds and block sizes that several modules of the training share."""

MAX_STEPS = 10_000_000
"""Steps of a training at most."""
MAX_DATASET_ROWS = 2**23
"""Rows of a data set that one training takes; planning keeps about 200 bytes per row in memory."""
HISTORY_LENGTH = 1000
"""Steps up to which the history keeps every one."""
