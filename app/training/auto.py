"""What a request leaves to the data, and what the data say."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters.errors import InvalidCombination
from adapters.training.planning.split import By, Split
from adapters.training.settings import Loss, Method
from app.training.fields import IGNORED, OF_GRADIENTS, refuse
from app.training.rows import Rows
from app.training.schemas import TrainingBody, TrainRequest, is_auto

_RANKS = (1, 2, 4, 8, 16, 32, 64)
_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
_RATE = 0.01
"""Where nothing is held out to choose one by."""
_FEWEST_ROWS = 10
"""Rows below which nothing is decided by held-out rows, not even in turn."""
_FEW_ROWS = 100
"""Rows below which none are kept from the training to decide by: a fifth of them says little, and is missed."""
_OF_ANY_SCALE = (Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY, Loss.COSINE, Loss.MULTIPLE_NEGATIVES)
"""Losses for which the size of the targets does not say how far the factors have to go."""
_FEW_ROWS_RANK = 16
_FULL_BATCH_ROWS = 256
_STEPS = 1000
_FEW_ROWS_STEPS = 200
"""Steps of all of a few rows: after these the held-out loss seldom falls, and more make it overconfident."""


@dataclass(slots=True)
class Decided:
    """What the data decided of a request that left it open, and why."""

    split: Split | None = None
    method: Method = Method.ADAMW
    values: dict[str, Any] = field(default_factory=dict)
    """Fields of the spec."""
    why: dict[str, str] = field(default_factory=dict)
    """By the request's field."""


@dataclass(frozen=True, slots=True)
class _Some:
    """How many rows one adapter is trained on."""

    rows: int
    is_fleet: bool

    def __str__(self) -> str:
        return f"about {self.rows} rows a group" if self.is_fleet else f"{self.rows} rows"


def decide(request: TrainRequest, rows: Rows, split: Split | None, *, holds_out: bool, most_rank: int) -> Decided:
    """Everything that the request leaves to the data; `holds_out`: whether it says which rows are held out.

    `most_rank`: the largest that the layer has a use for and the service accepts.
    """
    training, fleet = request.training, rows.fleet is not None and "{" in str(request.name)
    decided = Decided(split, *_method(training))
    if decided.values.pop("why", None):
        decided.why["method"] = decided.values.pop("because")
        for name in IGNORED[decided.method]:
            if training.gave(name) and not is_auto(getattr(training, name)):
                refuse(name, training, f"with {decided.method}, which auto came to ({decided.why['method']})")
    exact = decided.method is Method.CLOSED_FORM
    open_fields = [name for name in ("rank", "learning_rate", "ridge") if _is_open(request, name, exact)]
    if fleet and open_fields:
        raise InvalidCombination(
            f"{open_fields[0]} cannot be auto for a fleet: each group would need another",
            field=open_fields[0] if open_fields[0] == "rank" else f"training.{open_fields[0]}",
            given="auto",
            expected="a value for all of its groups",
        )
    groups = len(rows.fleet.values) if fleet and rows.fleet is not None else 1
    count = rows.count if rows.weights_N is None else int(np.count_nonzero(rows.weights_N))
    # A fleet's groups train each by itself: what counts is how many rows one of them has.
    some = _Some(max(1, count // groups), is_fleet=fleet)
    few = not holds_out and _are_few(training, rows, some.rows, exact)
    if open_fields and not holds_out and not few:
        _hold_out(decided, rows, open_fields)
    in_turn = few and exact and some.rows >= _FEWEST_ROWS
    by_rows = in_turn or decided.split is not None or (holds_out and bool(open_fields))
    by = f"by the loss of each tenth of the {some}, held out in turn" if in_turn else "by held-out loss"
    _rank(decided, request, by if by_rows else None, most_rank, some)
    if not exact:
        _gradient(decided, training, some, by_rows=by_rows, few=few)
    elif is_auto(training.ridge):
        decided.values |= {"try_ridges": True} if by_rows else {"ridge": 1.0}
        decided.why["ridge"] = by if by_rows else f"fewer than {_FEWEST_ROWS} rows: 1"
    return decided


def _method(training: TrainingBody) -> tuple[Method, dict[str, Any]]:
    if not is_auto(training.method):
        return Method(training.method), {}
    given = [name for name in OF_GRADIENTS if training.gave(name) and not is_auto(getattr(training, name))]
    if Loss(training.loss) is not Loss.MSE:
        return Method.ADAMW, {"why": True, "because": f"{training.loss} has no exact solution"}
    if given:
        return Method.ADAMW, {"why": True, "because": f"{given[0]} was given, which closed_form has no use for"}
    return Method.CLOSED_FORM, {"why": True, "because": "squared loss has an exact solution: nothing to tune"}


def _is_open(request: TrainRequest, name: str, exact: bool) -> bool:
    if name == "rank":
        return is_auto(request.rank)
    return is_auto(getattr(request.training, name)) and (name == "ridge") == exact


def _are_few(training: TrainingBody, rows: Rows, count: int, exact: bool) -> bool:
    """Whether all of the rows are better trained on than some held out to decide by."""
    if rows.groups is not None or training.early_stopping is not None:
        return False
    return count < _FEW_ROWS and (exact or Loss(training.loss) in _OF_ANY_SCALE)


def _hold_out(decided: Decided, rows: Rows, open_fields: list[str]) -> None:
    """Rows to decide by, where the request says nothing of them."""
    if rows.count < _FEWEST_ROWS:
        return
    by = By.ROWS if rows.groups is None else By.GROUP
    decided.split = Split(by=by)
    decided.why["split"] = (
        f"{' and '.join(open_fields)} by held-out loss: a fifth of the {'groups' if by is By.GROUP else 'rows'}"
    )


def _rank(decided: Decided, request: TrainRequest, by: str | None, most: int, some: _Some) -> None:
    if not is_auto(request.rank):
        return
    most = min(most, _RANKS[-1])
    if by is not None:
        # The layer's own rank too: that is where nothing is lost.
        ranks = (*(rank for rank in _RANKS if rank < most), most)
        decided.values |= {"rank": most, "try_ranks": ranks}
        decided.why["rank"] = f"the smallest of {', '.join(map(str, ranks))} that is about as good as the best, {by}"
    elif decided.method is not Method.CLOSED_FORM and Loss(request.training.loss) in _OF_ANY_SCALE:
        decided.values["rank"] = min(most, _FEW_ROWS_RANK)
        decided.why["rank"] = f"{some}, too few to choose by: {decided.values['rank']}"
    else:
        decided.values["rank"] = 1
        decided.why["rank"] = f"fewer than {_FEWEST_ROWS} rows: 1"


def _gradient(decided: Decided, training: TrainingBody, some: _Some, *, by_rows: bool, few: bool) -> None:
    values, why, rows = decided.values, decided.why, some.rows
    if is_auto(training.batch_size):
        full = rows <= _FULL_BATCH_ROWS
        negatives = Loss(training.loss) is Loss.MULTIPLE_NEGATIVES
        values["batch_size"] = min(rows, _FULL_BATCH_ROWS) if negatives else None if full else 64
        why["batch_size"] = f"{some}: " + ("all of them in each step" if full else str(values["batch_size"]))
    batch = values.get("batch_size", training.batch_size) or rows
    if is_auto(training.epochs):
        steps, steps_an_epoch = _FEW_ROWS_STEPS if few else _STEPS, -(-rows // min(batch, rows))
        values["epochs"] = max(5, -(-steps // steps_an_epoch))
        why["epochs"] = f"about {steps} steps, at least 5 epochs"
        if few:
            why["epochs"] += f": {some} are too few to hold some out and stop by them"
        elif by_rows and training.early_stopping is None:
            values["patience"] = 20
            why["epochs"] += "; fewer where 20 evaluations of the held-out loss brought nothing"
    if is_auto(training.learning_rate):
        values["learning_rate"] = _RATE
        if by_rows:
            values["try_rates"] = _RATES
            rates = ", ".join(f"{rate:g}" for rate in _RATES)
            why["learning_rate"] = f"the smallest of {rates} that is about as good as the best, in short trials"
        else:
            why["learning_rate"] = f"{some}, too few to choose by: {_RATE:g}"
