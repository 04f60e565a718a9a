"""Whether the service is there."""

from loraplex.calls.builders import get
from loraplex.effects import Attempt, Steps
from loraplex.errors import LoraplexError


def ready(seconds: float) -> Steps[bool]:
    """Whether it says that it can serve: asked once, since its saying no is the answer."""
    try:
        answer = yield Attempt(get("/readyz", bool), seconds)
    except LoraplexError:
        return False
    return bool(answer.status == 200)
