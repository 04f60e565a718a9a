"""Deadlines of tests, scaled by one factor that is measured on this machine."""

import functools
import hashlib
import time

_REFERENCE_SECONDS = 0.03
"""What the probe takes on a core of the machine that the deadlines were chosen on, with nothing else running."""
_LARGEST = 8.0


@functools.cache
def slowness() -> float:
    """Return how many times longer a fixed computation takes here than on the reference machine, from 1 to 8.

    It is the wall-clock time, so that it includes the load of other processes.
    """
    block = bytes(2**20)
    begin = time.perf_counter()
    for _ in range(50):
        hashlib.sha256(block)
    return min(max((time.perf_counter() - begin) / _REFERENCE_SECONDS, 1.0), _LARGEST)


def scaled(seconds: float) -> float:
    """Return a deadline for this machine, in seconds."""
    return seconds * slowness()
