"""What a run says while it runs."""

import sys
import time

_BEGIN = time.monotonic()


def say(text: str) -> None:
    """One line on standard error, with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGIN:6.0f} s] {text}", file=sys.stderr, flush=True)
