"""Whether the service is there."""

from loraplex.calls.making import get
from loraplex.errors import LoraplexError
from loraplex.steps import Attempt, Steps


def ready(seconds: float) -> Steps[bool]:
    """Whether it says that it can serve: asked once, since its saying no is the answer."""
    try:
        answer = yield Attempt(get("/readyz", bool), seconds)
    except LoraplexError:
        return False
    return bool(answer.status == 200)
