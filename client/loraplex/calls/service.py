"""Whether the service is there."""

from dataclasses import replace

from loraplex.calls.making import get
from loraplex.errors import LoraplexError
from loraplex.steps import Attempt, Steps


def ready(seconds: float) -> Steps[bool]:
    """Whether it says that it can serve: asked once, since its saying no is the answer."""
    call = replace(get("/readyz", bool), timeout=seconds)
    try:
        answer = yield Attempt(call, seconds)
    except LoraplexError:
        return False
    return bool(answer.status == 200)
