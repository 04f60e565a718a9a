"""Whether a new version becomes live: always, never, or where held-out rows say that it is better."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapters.catalog.versions import Version
from adapters.training.evaluation.metrics import HIGHER_IS_BETTER


class When(StrEnum):
    """When live moves."""

    ALWAYS = "always"
    NEVER = "never"
    IF_BETTER = "if_better"
    """Where a held-out metric beats the base's and the live version's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """When live moves to what a job has trained."""

    when: When = When.ALWAYS
    metric: str = "loss"
    margin: float = 0.0
    """By how much the metric has to be better, in its own unit."""
    min_rows: int = 50
    """Held-out rows without which nothing is believed."""

    @property
    def compares(self) -> bool:
        """Whether the live version is to be measured too."""
        return self.when is When.IF_BETTER

    @property
    def moves(self) -> bool:
        """Whether live moves whatever the metrics say."""
        return self.when is When.ALWAYS

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Gate":
        """The gate that `dataclasses.asdict` and JSON made `values` of."""
        return cls(**{**values, "when": When(values["when"])})

    def decide(
        self, held_out: Mapping[str, Any] | None, live: Version | None, *, unmatched: str | None = None
    ) -> "GateDecision":
        """Compare; `held_out` has the metrics of `adapter`, `base` and, where there is one, `live`, and `rows`.

        unmatched: why the outputs of `live` could not be matched to the classes, if so. Then live stays where it is:
        what was not compared was not beaten.
        """
        if not self.compares:
            return GateDecision(self.moves, "", self, {})
        assert held_out is not None
        values = {who: held_out[who].get(self.metric) for who in ("adapter", "base", "live") if who in held_out}
        if unmatched is not None and live is not None:
            reason = f"it cannot be compared with the live version {live.version}: {unmatched}"
            return GateDecision(False, reason, self, values)
        # Rows that weigh little tell little: as many of equal weight would tell as much (Kish 1965).
        rows = held_out["adapter"].get("effective_rows", held_out["rows"])
        if rows < self.min_rows:
            return GateDecision(False, f"{rows:.4g} held-out rows are fewer than {self.min_rows}", self, values)
        margin = f" by {self.margin:g} or more" if self.margin > 0 else ""
        for who in ("base", "live"):
            if who in values and not self._beats(values["adapter"], values[who]):
                name = "the base layer" if who == "base" else f"the live version {live.version if live else ''}".strip()
                return GateDecision(False, f"its {self.metric} does not beat that of {name}{margin}", self, values)
        return GateDecision(True, f"its {self.metric} beats the others{margin}", self, values)

    def _beats(self, mine: float | None, theirs: float | None) -> bool:
        if mine is None or theirs is None:
            return False
        gain = mine - theirs if HIGHER_IS_BETTER[self.metric] else theirs - mine
        return gain > 0 and gain >= self.margin


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What a gate decided, and on what."""

    moves: bool
    reason: str
    gate: Gate
    values: Mapping[str, float | None]

    def told(self, *, moved: bool) -> dict[str, object]:
        """As a job shows it, with whether live moved in the end."""
        reason = self.reason
        if self.moves and not moved:
            reason = "another version has become live since it was compared"
        return {
            "metric": self.gate.metric,
            "margin": self.gate.margin,
            "min_rows": self.gate.min_rows,
            "compared": dict(self.values),
            "moves_live": moved,
            "reason": reason,
        }
