"""Values of a request's `auto` settings, and the reasons for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.errors import InvalidCombination
from adapters.training.planning.request import TrainingRequest
from adapters.training.planning.rows import Rows
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import AUTO, GRADIENT_METHODS, SETTINGS, Loss, Method, RequestedSettings

RANKS = (1, 2, 4, 8, 16, 32, 64)
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Learning rate if no rows are held out to choose one by.
FALLBACK_RATE = 0.01
# Rows below which held-out rows decide nothing, not even in turn.
MIN_ROWS = 10
# Rows below which none are held out to decide by: a fifth of them says little, and training misses them.
FEW_ROWS = 100
FEW_ROWS_RANK = 16
FULL_BATCH_ROWS = 256
STEPS = 1000
# Steps on few rows: beyond them the held-out loss seldom falls, and the adapter becomes overconfident.
FEW_ROWS_STEPS = 200
_PATIENCE = 20
_BATCH_SIZE = 64
# Losses for which the size of the targets does not say how far the factors have to go.
_SCALE_FREE_LOSSES = (Loss.CROSS_ENTROPY, Loss.BINARY_CROSS_ENTROPY, Loss.COSINE, Loss.MULTIPLE_NEGATIVES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Method and split of a training, and the values of its `auto` settings."""

    method: Method
    split: Split | None
    values: Mapping[str, Any]
    """Fields of the specification."""
    reasons: Mapping[str, str]
    """By the name of the setting in the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evidence:
    """Rows that one adapter is trained on, and whether held-out rows can decide."""

    rows: int
    is_fleet: bool
    is_exact: bool
    has_few_rows: bool
    """Whether all rows are trained on, because too few would be left otherwise."""
    decides_by: str | None
    """Phrase for the held-out loss that decides; None if none does."""

    def __str__(self) -> str:
        return f"about {self.rows} rows a group" if self.is_fleet else f"{self.rows} rows"


def decide(request: TrainingRequest, rows: Rows, split: Split | None, *, holds_out: bool, max_rank: int) -> Decisions:
    """Decide everything that the request leaves to the data.

    holds_out: whether the request holds rows out. max_rank: the largest rank that the layer can use and the service
    accepts. Raises `IgnoredField` or `InvalidCombination`.
    """
    settings = request.settings
    reasons: dict[str, str] = {}
    method = settings.method
    if method == AUTO:
        method, reasons["method"] = _choose_method(settings)
        context = f"with {method}, which auto came to ({reasons['method']})"
        settings.check_used_by(method, context, unless_auto=True)
    is_exact, is_fleet = method is Method.CLOSED_FORM, rows.fleet is not None and request.is_fleet
    open_names = _open_settings(request, is_exact=is_exact)
    if is_fleet and open_names:
        raise InvalidCombination(
            f"{open_names[0]} cannot be auto for a fleet: each group would need another",
            field=open_names[0] if open_names[0] == "rank" else f"training.{open_names[0]}",
            given=AUTO,
            expected="a value for all of its groups",
        )
    count = _rows_per_adapter(rows, is_fleet=is_fleet)
    has_few_rows = not holds_out and _has_few_rows(settings, rows, count, is_exact=is_exact)
    if open_names and not holds_out and not has_few_rows and rows.count >= MIN_ROWS:
        split = Split(by=SplitBy.ROWS if rows.groups is None else SplitBy.GROUP)
        unit = "groups" if split.by is SplitBy.GROUP else "rows"
        reasons["split"] = f"{' and '.join(open_names)} by held-out loss: a fifth of the {unit}"
    decides_by = None
    if has_few_rows and is_exact and count >= MIN_ROWS:
        decides_by = f"by the loss of each tenth of the {count} rows, held out in turn"
    elif split is not None or (holds_out and open_names):
        decides_by = "by held-out loss"
    evidence = _Evidence(
        rows=count, is_fleet=is_fleet, is_exact=is_exact, has_few_rows=has_few_rows, decides_by=decides_by
    )
    values: dict[str, Any] = {}
    choices = [_rank(request, evidence, max_rank)]
    choices += [_ridge(settings, evidence)] if is_exact else _gradient_settings(settings, evidence)
    for name, value, reason in filter(None, choices):
        values |= value
        reasons[name] = reason
    return Decisions(method=method, split=split, values=values, reasons=reasons)


# A setting's name, the fields of the specification that it becomes, and the reason; None if it is not `auto`.
_Choice = tuple[str, dict[str, Any], str] | None


def _choose_method(settings: RequestedSettings) -> tuple[Method, str]:
    if settings.loss is not Loss.MSE:
        return Method.ADAMW, f"{settings.loss} has no exact solution"
    of_gradients = [name for name, setting in SETTINGS.items() if set(setting.methods) <= set(GRADIENT_METHODS)]
    given = [name for name in of_gradients if name in settings.given and getattr(settings, name) != AUTO]
    if given:
        return Method.ADAMW, f"{given[0]} was given, which closed_form has no use for"
    return Method.CLOSED_FORM, "squared loss has an exact solution: nothing to tune"


def _open_settings(request: TrainingRequest, *, is_exact: bool) -> list[str]:
    """Return the settings that held-out rows would choose."""
    name = "ridge" if is_exact else "learning_rate"
    values = {"rank": request.rank, name: getattr(request.settings, name)}
    return [name for name, value in values.items() if value == AUTO]


def _rows_per_adapter(rows: Rows, *, is_fleet: bool) -> int:
    """Return the rows that count; of a fleet, whose groups train each by themselves, those of one group."""
    groups = len(rows.fleet.values) if is_fleet and rows.fleet is not None else 1
    count = rows.count if rows.weights_N is None else int(np.count_nonzero(rows.weights_N))
    return max(1, count // groups)


def _has_few_rows(settings: RequestedSettings, rows: Rows, count: int, *, is_exact: bool) -> bool:
    if rows.groups is not None or settings.early_stopping is not None:
        return False
    return count < FEW_ROWS and (is_exact or settings.loss in _SCALE_FREE_LOSSES)


def _rank(request: TrainingRequest, evidence: _Evidence, max_rank: int) -> _Choice:
    if request.rank != AUTO:
        return None
    max_rank = min(max_rank, RANKS[-1])
    if evidence.decides_by is not None:
        # The layer's own rank too: it loses nothing.
        ranks = (*(rank for rank in RANKS if rank < max_rank), max_rank)
        listed = ", ".join(map(str, ranks))
        reason = f"the smallest of {listed} that is about as good as the best, {evidence.decides_by}"
        return "rank", {"rank": max_rank, "try_ranks": ranks}, reason
    if not evidence.is_exact and request.settings.loss in _SCALE_FREE_LOSSES:
        rank = min(max_rank, FEW_ROWS_RANK)
        return "rank", {"rank": rank}, f"{evidence}, too few to choose by: {rank}"
    return "rank", {"rank": 1}, f"fewer than {MIN_ROWS} rows: 1"


def _ridge(settings: RequestedSettings, evidence: _Evidence) -> _Choice:
    if settings.ridge != AUTO:
        return None
    if evidence.decides_by is not None:
        return "ridge", {"try_ridges": True}, evidence.decides_by
    return "ridge", {"ridge": 1.0}, f"fewer than {MIN_ROWS} rows: 1"


def _gradient_settings(settings: RequestedSettings, evidence: _Evidence) -> Sequence[_Choice]:
    batch_size = _batch_size(settings, evidence)
    resolved: Any = settings.batch_size if batch_size is None else batch_size[1]["batch_size"]
    return batch_size, _epochs(settings, evidence, resolved or evidence.rows), _learning_rate(settings, evidence)


def _batch_size(settings: RequestedSettings, evidence: _Evidence) -> _Choice:
    if settings.batch_size != AUTO:
        return None
    is_full = evidence.rows <= FULL_BATCH_ROWS
    if settings.loss is Loss.MULTIPLE_NEGATIVES:
        size: int | None = min(evidence.rows, FULL_BATCH_ROWS)
    else:
        size = None if is_full else _BATCH_SIZE
    return "batch_size", {"batch_size": size}, f"{evidence}: {'all of them in each step' if is_full else size}"


def _epochs(settings: RequestedSettings, evidence: _Evidence, batch_size: int) -> _Choice:
    if settings.epochs != AUTO:
        return None
    steps = FEW_ROWS_STEPS if evidence.has_few_rows else STEPS
    steps_per_epoch = -(-evidence.rows // min(batch_size, evidence.rows))
    values: dict[str, Any] = {"epochs": max(5, -(-steps // steps_per_epoch))}
    reason = f"about {steps} steps, at least 5 epochs"
    if evidence.has_few_rows:
        reason += f": {evidence} are too few to hold some out and stop by them"
    elif evidence.decides_by is not None and settings.early_stopping is None:
        values["patience"] = _PATIENCE
        reason += f"; fewer where {_PATIENCE} evaluations of the held-out loss brought nothing"
    return "epochs", values, reason


def _learning_rate(settings: RequestedSettings, evidence: _Evidence) -> _Choice:
    if settings.learning_rate != AUTO:
        return None
    if evidence.decides_by is None:
        reason = f"{evidence}, too few to choose by: {FALLBACK_RATE:g}"
        return "learning_rate", {"learning_rate": FALLBACK_RATE}, reason
    listed = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    reason = f"the smallest of {listed} that is about as good as the best, in short trials"
    return "learning_rate", {"learning_rate": FALLBACK_RATE, "try_rates": LEARNING_RATES}, reason
