"""What can go wrong with a benchmark."""


class BenchFailed(Exception):
    """A measurement is not what it claims to be, or could not be made: the run ends, and says why."""
