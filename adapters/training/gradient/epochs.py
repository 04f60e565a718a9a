"""When each epoch of a training began and ended: for whoever traces it, of very many only some."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from adapters.training.gradient.stack import History, ReportStep

# Epochs of one training that are told of; of more, every k-th.
MOST_EPOCHS = 200


class Epoch(NamedTuple):
    """One epoch that has ended, or the end of one that was gone on with."""

    number: int
    """From 1 on."""
    began: float
    """Seconds since the epoch of clocks."""
    ended: float
    every: int
    """It stands for so many: 1 where each is told of."""
    loss: float
    """Of its last step."""


class Epochs:
    """Takes the times while a training reports its steps."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._ended: list[Epoch] = []

    def timing(self, report: ReportStep, *, steps: int, steps_an_epoch: int) -> ReportStep:
        """`report`, with a look at the clock at the end of each epoch; call it when the first step begins."""
        every = math.ceil(math.ceil(steps / steps_an_epoch) / MOST_EPOCHS)
        began = self._now()

        def look(step: int, loss: float, history: History) -> None:
            nonlocal began
            if step % steps_an_epoch == 0 or step == steps:
                number, ended = math.ceil(step / steps_an_epoch), self._now()
                if number % every == 0:
                    self._ended.append(Epoch(number, began, ended, every, loss))
                began = ended
            report(step, loss, history)

        return look

    def take(self) -> list[Epoch]:
        """Those that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended
