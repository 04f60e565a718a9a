"""Publish gate: whether a new version becomes live, always, never, or depending on its evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from adapters.catalog.versions import Version
from adapters.training.evaluation.judgement import Judgement
from adapters.training.evaluation.metrics import HIGHER_IS_BETTER

NOT_EVALUATED = "nothing was evaluated: no rows were held out"


class When(StrEnum):
    """Condition under which live moves to a new version."""

    ALWAYS = "always"
    NEVER = "never"
    IF_NOT_WORSE = "if_not_worse"
    """If it is not worse than what the name answers with now, or if nothing was evaluated."""
    IF_BETTER = "if_better"
    """If a held-out metric is better than that of the base layer and of the live version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Rule of a job for moving live to the version that it trained."""

    when: When = When.ALWAYS
    metric: str = "loss"
    margin: float = 0.0
    """Least difference of the metric, in its own unit."""
    min_rows: int = 50
    """Fewest held-out rows for a decision in favour of the new version."""

    @property
    def compares(self) -> bool:
        """Return whether the live version has to be measured too."""
        return self.when in (When.IF_NOT_WORSE, When.IF_BETTER)

    @property
    def moves(self) -> bool:
        """Return whether live moves if nothing was evaluated."""
        return self.when in (When.ALWAYS, When.IF_NOT_WORSE)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Gate":
        """Return the gate from the JSON of `dataclasses.asdict`."""
        return cls(**{**values, "when": When(values["when"])})

    def decide(
        self,
        held_out: Mapping[str, Any] | None,
        live: Version | None,
        *,
        unmatched: str | None = None,
        judgement: Judgement | None = None,
    ) -> "GateDecision":
        """Return the decision. `held_out` has `rows` and the metrics of `adapter`, `base` and, if there is one, `live`.

        unmatched: why the outputs of `live` could not be matched to the classes, if so. With `if_better`, live then
        does not move, as the two versions were not compared. judgement: None if nothing was evaluated.
        """
        decision = self._decide(held_out, live, unmatched, judgement)
        return replace(decision, judgement=judgement)

    def _decide(
        self,
        held_out: Mapping[str, Any] | None,
        live: Version | None,
        unmatched: str | None,
        judgement: Judgement | None,
    ) -> "GateDecision":
        if self.when is When.IF_NOT_WORSE:
            if judgement is None:
                return GateDecision(True, NOT_EVALUATED, self, {})
            return GateDecision(judgement.moves, judgement.reason, self, {})
        if self.when is not When.IF_BETTER:
            return GateDecision(self.moves, f"publish is {self.when}", self, {})
        if held_out is None:
            return GateDecision(False, NOT_EVALUATED, self, {})
        values = {side: held_out[side].get(self.metric) for side in ("adapter", "base", "live") if side in held_out}
        if unmatched is not None and live is not None:
            reason = f"it cannot be compared with the live version {live.version}: {unmatched}"
            return GateDecision(False, reason, self, values)
        # Effective rows: the number of rows of equal weight with the same information (Kish 1965).
        rows = held_out["adapter"].get("effective_rows", held_out["rows"])
        if rows < self.min_rows:
            return GateDecision(False, f"{rows:.4g} held-out rows are fewer than {self.min_rows}", self, values)
        margin = f" by {self.margin:g} or more" if self.margin > 0 else ""
        names = {"base": "the base layer", "live": f"the live version {live.version}" if live else "the live version"}
        for side, name in names.items():
            if side in values and not self._beats(values["adapter"], values[side]):
                return GateDecision(False, f"its {self.metric} does not beat that of {name}{margin}", self, values)
        return GateDecision(True, f"its {self.metric} beats the others{margin}", self, values)

    def _beats(self, mine: float | None, theirs: float | None) -> bool:
        if mine is None or theirs is None:
            return False
        gain = mine - theirs if HIGHER_IS_BETTER[self.metric] else theirs - mine
        return gain > 0 and gain >= self.margin


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Decision of a gate, with its reason and the metrics that it compared."""

    moves: bool
    reason: str
    gate: Gate
    values: Mapping[str, float | None]
    judgement: Judgement | None = None

    def to_json(self, *, moved: bool) -> dict[str, object]:
        """Return the metrics that it compared as JSON, with whether live has actually moved."""
        return {
            "metric": self.gate.metric,
            "margin": self.gate.margin,
            "min_rows": self.gate.min_rows,
            "compared": dict(self.values),
            "moves_live": moved,
            "reason": self._reason(moved=moved),
        }

    def summarize(self, *, moved: bool) -> dict[str, object]:
        """Return `decision` of a job or an adapter, with whether live has actually moved."""
        judgement = self.judgement
        return {
            "moved": moved,
            "reason": self._reason(moved=moved),
            "outcome": None if judgement is None else judgement.outcome,
            "gain": None if judgement is None else judgement.gain,
        }

    def _reason(self, *, moved: bool) -> str:
        is_overtaken = self.moves and not moved
        return "another version has become live since it was compared" if is_overtaken else self.reason
