"""Bounds and block sizes that several modules of the training share."""

MAX_STEPS = 10_000_000
"""Steps of a training at most."""
MAX_DATASET_ROWS = 2**23
"""Rows of a data set that one training takes; planning keeps about 200 bytes per row in memory."""
HISTORY_LENGTH = 1000
"""Steps up to which the history keeps every one."""

# The block sizes below also decide what `planning.estimate` expects a fit to allocate.
CHUNK_ROWS = 8192
"""Rows that are read and evaluated together."""
SUM_CHUNK_NUMBERS = 2**22
"""Inputs and residuals that are summed together: 32 MiB as float64, and a few times that for temporary values."""
MAX_CACHED_OUTPUTS = 2**26
"""Outputs of the base layer that are kept for all steps; more are computed batch by batch."""
STACK_NUMBERS = 2**20
"""Numbers of the rows and factors of a stack of groups, so that they stay in the cache of a core."""
MAX_STACK_GROUPS = 256
"""Groups of a stack at most."""
