"""Values of a request's `auto` settings, and the reasons for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.errors import InvalidCombination
from adapters.training.planning.holdout import Holdout
from adapters.training.planning.request import TrainingRequest
from adapters.training.planning.rows import Rows
from adapters.training.planning.split import FEW_ROWS, Split, SplitBy
from adapters.training.settings import (
    AUTO,
    GRADIENT_LOSS_SETTINGS,
    GRADIENT_METHODS,
    RIDGE_LOSSES,
    SETTINGS,
    Candidate,
    Init,
    Loss,
    Method,
    RequestedSettings,
    field_of,
)

RANKS = (1, 2, 4, 8, 16, 32, 64)
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Learning rate if no rows are held out to choose one by.
FALLBACK_RATE = 0.01
# Rows below which held-out rows decide nothing, not even in turn.
MIN_ROWS = 10
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


def decide(
    request: TrainingRequest, rows: Rows, holdout: Holdout | None, *, full_rank: int, rank_limit: int
) -> Decisions:
    """Decide everything that a complete request leaves to the data.

    holdout: what the request holds out. full_rank: the largest rank that the layer can use. rank_limit: the largest
    that the service accepts. Raises `IgnoredField` or `InvalidCombination`.
    """
    settings = request.settings
    if settings.method == AUTO or (settings.method is Method.CLOSED_FORM and settings.loss is not Loss.MSE):
        return _compare(request, rows, holdout, full_rank=full_rank, rank_limit=rank_limit)
    is_exact, is_fleet = settings.method is Method.CLOSED_FORM, request.is_fleet
    reasons: dict[str, str] = {}
    if holdout is not None and (is_fleet or not holdout.holds_rows_out):
        # A named method is not cross-validated.
        holdout = None if holdout.split is not None and holdout.split.by is SplitBy.HASH else holdout
    # Settings that held-out rows would choose.
    choices = ("rank", "ridge") if is_exact else ("rank", "learning_rate")
    open_names = [name for name in choices if getattr(settings, name) == AUTO]
    if is_fleet and open_names:
        detail = f"{open_names[0]} cannot be auto for a fleet: each group would need another"
        field, expected = field_of(open_names[0]), "a value for all of its groups, or no method"
        raise InvalidCombination(detail, field=field, given=AUTO, expected=expected)
    count = _rows_each(rows, is_fleet=is_fleet)
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
        max_rank=min(full_rank, rank_limit, RANKS[-1]),
        has_few_rows=has_few_rows,
        decides_by=decides_by,
    )
    values: dict[str, Any] = {}
    for name, choose in _CHOICES.items():
        if getattr(settings, name) == AUTO and settings.method in SETTINGS[name].methods:
            chosen, reasons[name] = choose(evidence)
            values |= chosen
    return Decisions(method=Method(settings.method), holdout=holdout, values=values, reasons=reasons)


def _compare(
    request: TrainingRequest, rows: Rows, holdout: Holdout | None, *, full_rank: int, rank_limit: int
) -> Decisions:
    """Decide which candidates the fit compares; it chooses among them, and everything about them, by the rows."""
    settings, is_fleet = request.settings, request.is_fleet
    rank_bound = rank_limit if settings.rank == AUTO else settings.rank
    names, reasons = _choose_candidates(settings, rows, is_fleet=is_fleet)
    if Candidate.OWN_HEAD in names and full_rank > rank_bound:
        names.remove(Candidate.OWN_HEAD)
        reasons[Candidate.OWN_HEAD] = f"it needs rank {full_rank}, and at most {rank_bound} is allowed"
    candidates, count = tuple(names), _rows_each(rows, is_fleet=is_fleet)
    is_exact = settings.loss is Loss.MSE and Candidate.RIDGE in candidates
    evidence = _Evidence(
        settings=settings,
        rows=count,
        is_fleet=is_fleet,
        is_exact=is_exact,
        max_rank=min(full_rank, rank_bound),
        has_few_rows=count < FEW_ROWS and settings.loss in _SCALE_FREE_LOSSES,
        decides_by=None,
    )
    values: dict[str, Any] = {
        "candidates": candidates,
        # Factors that are given may have a larger rank than the layer can use.
        "rank": min(full_rank, rank_bound) if isinstance(settings.init, Init) else rank_bound,
        "bias": settings.bias is True,
        "try_bias": settings.bias == AUTO,
        "try_ridges": Candidate.RIDGE in candidates and settings.ridge == AUTO,
    }
    if Candidate.ADAMW in candidates:
        values["try_steps"] = settings.epochs == AUTO and settings.max_steps is None
        values["try_rates"] = LEARNING_RATES if settings.learning_rate == AUTO else ()
        for name, choose in (("batch_size", _batch_size), ("epochs", _epochs)):
            values |= choose(evidence)[0] if getattr(settings, name) == AUTO else {}
    method = Method.CLOSED_FORM if is_exact else Method.ADAMW
    return Decisions(method=method, holdout=holdout, values=values, reasons=reasons)


def _choose_candidates(
    settings: RequestedSettings, rows: Rows, *, is_fleet: bool
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates that the settings and the rows leave, and the reasons against others, by name."""
    if settings.method is Method.CLOSED_FORM:
        return [Candidate.RIDGE], {}
    reason = ""
    if settings.loss not in RIDGE_LOSSES:
        reason = f"{settings.loss} has no exact solution"
    elif names := [name for name in SETTINGS if name in settings.given and _is_of_gradients(settings, name)]:
        reason = f"{names[0]} was given, and only gradient descent uses it"
    if reason:
        settings.check_used_by(Method.ADAMW, f"with adamw, which auto chose ({reason})", unless_auto=True)
        return [Candidate.BASE, Candidate.ADAMW], {"method": reason}
    candidates = [Candidate.BASE, Candidate.RIDGE, Candidate.RIDGE_IN_BASE_METRIC, Candidate.OWN_HEAD]
    if is_fleet:
        candidates += [Candidate.FLEET_MEAN, Candidate.CLUSTER_MEAN]
    most = rows.count if not is_fleet or rows.fleet is None else int(np.bincount(rows.fleet.codes_N).max())
    if settings.ridge != AUTO:
        return candidates, {Candidate.ADAMW: "ridge was given, and adamw does not use it"}
    if most < FEW_ROWS:
        return candidates, {Candidate.ADAMW: f"{most} rows are fewer than {FEW_ROWS}"}
    return [*candidates, Candidate.ADAMW], {}


def _is_of_gradients(settings: RequestedSettings, name: str) -> bool:
    """Return whether the value of a setting makes a difference to gradient descent only."""
    value, setting = getattr(settings, name), SETTINGS[name]
    if name in GRADIENT_LOSS_SETTINGS:
        return bool(value != setting.default)
    return set(setting.methods) <= set(GRADIENT_METHODS) and value != AUTO


def _rows_each(rows: Rows, *, is_fleet: bool) -> int:
    """Return the rows with a weight; of a fleet, whose groups train each by themselves, those of one group."""
    count = rows.count if rows.weights_N is None else int(np.count_nonzero(rows.weights_N))
    return max(1, count // (len(rows.fleet.values) if is_fleet and rows.fleet is not None else 1))


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
