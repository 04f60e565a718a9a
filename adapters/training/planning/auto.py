"""Values of a request's `auto` settings, and the reasons for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.errors import InvalidCombination
from adapters.training.planning.holdout import Holdout
from adapters.training.planning.request import TrainingRequest
from adapters.training.planning.rows import Rows
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import AUTO, GRADIENT_METHODS, SETTINGS, Loss, Method, RequestedSettings, field_of

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
    holdout: Holdout | None
    values: Mapping[str, Any]
    """Fields of the specification."""
    reasons: Mapping[str, str]
    """By the name of the setting in the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evidence:
    """Rows that one adapter is trained on, and whether held-out rows can decide."""

    settings: RequestedSettings
    rows: int
    is_fleet: bool
    is_exact: bool
    max_rank: int
    has_few_rows: bool
    """Whether all rows are trained on, because too few would be left otherwise."""
    decides_by: str | None
    """Phrase for the held-out loss that decides; None if none does."""

    def __str__(self) -> str:
        return f"about {self.rows} rows a group" if self.is_fleet else f"{self.rows} rows"


def decide(request: TrainingRequest, rows: Rows, holdout: Holdout | None, *, max_rank: int) -> Decisions:
    """Decide everything that the request leaves to the data.

    holdout: what the request holds out. max_rank: the largest rank that the layer can use and the service accepts.
    Raises `IgnoredField` or `InvalidCombination`.
    """
    settings, reasons = request.settings, {}
    method = settings.method
    if method == AUTO:
        method, reasons["method"] = _choose_method(settings)
        context = f"with {method}, which auto chose ({reasons['method']})"
        settings.check_used_by(method, context, unless_auto=True)
    is_exact, is_fleet = method is Method.CLOSED_FORM, request.is_fleet
    # Settings that held-out rows would choose.
    candidates = ("rank", "ridge") if is_exact else ("rank", "learning_rate")
    open_names = [name for name in candidates if getattr(settings, name) == AUTO]
    if is_fleet and open_names:
        detail = f"{open_names[0]} cannot be auto for a fleet: each group would need another"
        field, expected = field_of(open_names[0]), "a value for all of its groups"
        raise InvalidCombination(detail, field=field, given=AUTO, expected=expected)
    # Rows that count; of a fleet, whose groups train each by themselves, those of one group.
    count = rows.count if rows.weights_N is None else int(np.count_nonzero(rows.weights_N))
    count = max(1, count // (len(rows.fleet.values) if is_fleet and rows.fleet is not None else 1))
    has_few_rows = holdout is None and count < FEW_ROWS and rows.groups is None and settings.early_stopping is None
    has_few_rows &= is_exact or settings.loss in _SCALE_FREE_LOSSES
    if open_names and holdout is None and not has_few_rows and rows.count >= MIN_ROWS:
        # Groups are kept together, if there are any.
        by, unit = (SplitBy.ROWS, "rows") if rows.groups is None else (SplitBy.GROUP, "groups")
        holdout = Holdout(split=Split(by=by), key_N=None if rows.groups is None else rows.groups.codes_N)
        reasons["split"] = f"{' and '.join(open_names)} by held-out loss: a fifth of the {unit}"
    decides_by = None
    if has_few_rows and is_exact and count >= MIN_ROWS:
        decides_by = f"by the loss of each tenth of the {count} rows, held out in turn"
    elif holdout is not None and (holdout.split is not None or open_names):
        decides_by = "by held-out loss"
    evidence = _Evidence(
        settings=settings,
        rows=count,
        is_fleet=is_fleet,
        is_exact=is_exact,
        max_rank=min(max_rank, RANKS[-1]),
        has_few_rows=has_few_rows,
        decides_by=decides_by,
    )
    values: dict[str, Any] = {}
    for name, choose in _CHOICES.items():
        if getattr(settings, name) == AUTO and method in SETTINGS[name].methods:
            chosen, reasons[name] = choose(evidence)
            values |= chosen
    return Decisions(method=method, holdout=holdout, values=values, reasons=reasons)


def _choose_method(settings: RequestedSettings) -> tuple[Method, str]:
    if settings.loss is not Loss.MSE:
        return Method.ADAMW, f"{settings.loss} has no exact solution"
    for name, setting in SETTINGS.items():
        is_of_gradients = set(setting.methods) <= set(GRADIENT_METHODS)
        if is_of_gradients and name in settings.given and getattr(settings, name) != AUTO:
            return Method.ADAMW, f"{name} was given, and closed_form does not use it"
    return Method.CLOSED_FORM, "squared loss has an exact solution: nothing to tune"


# Fields of the specification that a setting becomes, and the reason.
_Choice = tuple[dict[str, Any], str]


def _rank(evidence: _Evidence) -> _Choice:
    max_rank = evidence.max_rank
    if evidence.decides_by is not None:
        # The layer's own rank too: it loses nothing.
        ranks = (*(rank for rank in RANKS if rank < max_rank), max_rank)
        listed = ", ".join(map(str, ranks))
        reason = f"the smallest of {listed} that is about as good as the best, {evidence.decides_by}"
        return {"rank": max_rank, "try_ranks": ranks}, reason
    if not evidence.is_exact and evidence.settings.loss in _SCALE_FREE_LOSSES:
        rank = min(max_rank, FEW_ROWS_RANK)
        return {"rank": rank}, f"{evidence}, too few to choose by: {rank}"
    return {"rank": 1}, f"fewer than {MIN_ROWS} rows: 1"


def _ridge(evidence: _Evidence) -> _Choice:
    if evidence.decides_by is not None:
        return {"try_ridges": True}, evidence.decides_by
    return {"ridge": 1.0}, f"fewer than {MIN_ROWS} rows: 1"


def _batch_size(evidence: _Evidence) -> _Choice:
    is_full = evidence.rows <= FULL_BATCH_ROWS
    size = None if is_full else _BATCH_SIZE
    if evidence.settings.loss is Loss.MULTIPLE_NEGATIVES:
        size = min(evidence.rows, FULL_BATCH_ROWS)
    return {"batch_size": size}, f"{evidence}: {'all of them in each step' if is_full else size}"


def _epochs(evidence: _Evidence) -> _Choice:
    settings = evidence.settings
    size: Any = _batch_size(evidence)[0]["batch_size"] if settings.batch_size == AUTO else settings.batch_size
    steps = FEW_ROWS_STEPS if evidence.has_few_rows else STEPS
    steps_per_epoch = -(-evidence.rows // min(size or evidence.rows, evidence.rows))
    values: dict[str, Any] = {"epochs": max(5, -(-steps // steps_per_epoch))}
    reason = f"about {steps} steps, at least 5 epochs"
    if evidence.has_few_rows:
        reason += f": {evidence} are too few to hold some out and stop by them"
    elif evidence.decides_by is not None and settings.early_stopping is None:
        values["patience"] = _PATIENCE
        reason += f"; fewer if the held-out loss does not improve in {_PATIENCE} evaluations"
    return values, reason


def _learning_rate(evidence: _Evidence) -> _Choice:
    if evidence.decides_by is None:
        reason = f"{evidence}, too few to choose by: {FALLBACK_RATE:g}"
        return {"learning_rate": FALLBACK_RATE}, reason
    listed = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    reason = f"the smallest of {listed} that is about as good as the best, in short trials"
    return {"learning_rate": FALLBACK_RATE, "try_rates": LEARNING_RATES}, reason


# How to choose each setting that may be `auto`, in the order of the reasons.
_CHOICES = {
    "rank": _rank,
    "ridge": _ridge,
    "batch_size": _batch_size,
    "epochs": _epochs,
    "learning_rate": _learning_rate,
}
