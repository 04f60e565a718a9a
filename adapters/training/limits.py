"""Bounds and block sizes that several modules of the training share."""

# Steps of a training at most.
MAX_STEPS = 10_000_000
# Rows of a data set that one training takes; planning keeps about 200 bytes per row in memory.
MAX_DATASET_ROWS = 2**23
# Steps up to which the history keeps every one.
HISTORY_LENGTH = 1000

# The block sizes below also decide what `planning.estimate` expects a fit to allocate.
# Rows that are read and evaluated together.
CHUNK_ROWS = 8192
# Inputs and residuals that are summed together: 32 MiB as float64, and a few times that for temporary values.
SUM_CHUNK_NUMBERS = 2**22
# Outputs of the base layer that are kept for all steps; more are computed batch by batch.
MAX_CACHED_OUTPUTS = 2**26
# Numbers of the rows and factors of a stack of groups, so that they stay in the cache of a core.
STACK_NUMBERS = 2**20
# Groups of a stack at most.
MAX_STACK_GROUPS = 256
