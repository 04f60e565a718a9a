"""Training as it passes from the planner through the queue to the fit, the publisher and the version's lineage."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from adapters.training.evaluation.gate import Gate
from adapters.training.settings import TrainingSpec


class JobKind(StrEnum):
    """Kind of a job: it trains, updates, or evaluates."""

    TRAIN = "train"
    """It trains an adapter, or a fleet."""
    UPDATE = "update"
    """It refits the live version from its statistics, with rows added and rows removed."""
    EVALUATION = "evaluation"
    """It compares adapters, and publishes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Data and adapters that a training starts from."""

    data: Mapping[str, Any]
    """Data set, columns, rows and digest; of an update, those of `add` and `forget`."""
    split: Mapping[str, Any] | None = None
    """How rows are held out; None if none are."""
    parent: str | None = None
    """Reference of the adapter that the factors start from, or that an update refits."""
    prior: str | None = None
    """Reference of the adapter that a closed form shrinks towards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A planned training: everything that the queue, the fit and the publisher read of it."""

    spec: TrainingSpec
    gate: Gate
    labels: tuple[str | int, ...] | None
    steps: int
    """Steps of the fit at most; of a fleet, its adapters."""
    adapters: int
    """Adapters that it trains."""
    positions: int = 1
    """Adapters that its data are for: more if it trains only some groups of a fleet."""
    is_fleet: bool
    kind: JobKind = JobKind.TRAIN
    provenance: Provenance
    description: Mapping[str, Any]
    """Resolved settings as clients read them: `spec` of `GET /jobs/{id}`."""
    fleet_prior: str | None = None
    """Name of the adapter with the mean of a fleet; its position is the number of groups."""
    request: Mapping[str, Any] | None = None
    """The request as it was sent, to plan it again; None if rows or factors were in it."""
    compared: tuple[str | None, ...] = ()
    """Versions that an evaluation compares, each as `name@version`; None for the base layer."""
    output_labels: tuple[str | int, ...] | None = None
    """Labels of outputs that have none of their own, in an evaluation."""
    memory_bytes: int | None = None
    """Memory that its fit is estimated to need; None in jobs of earlier releases."""
    scratch_bytes: int = 0
    """Disk space of a fit whose rows do not fit in memory, about; 0 if they do."""

    @property
    def is_update(self) -> bool:
        """Return whether the fit starts from the statistics of the live version."""
        return self.kind is JobKind.UPDATE

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that the queue stores, in the layout of the first release.

        Services of two versions may share a data folder during an update, so both have to read it. Each ignores
        members that it does not read.
        """
        return {
            "shown": dict(self.description),
            "resolved": asdict(self.spec),
            "steps": self.steps,
            "publish": asdict(self.gate),
            "fleet": self.is_fleet,
            "adapters": self.adapters,
            "positions": self.positions,
            "labels": None if self.labels is None else list(self.labels),
            "update": self.is_update,
            "lineage": self.lineage(),
            "kind": self.kind,
            "fleet_prior": self.fleet_prior,
            "request": self.request,
            "compared": list(self.compared),
            "output_labels": None if self.output_labels is None else list(self.output_labels),
            "memory_bytes": self.memory_bytes,
            "scratch_bytes": self.scratch_bytes,
        }

    def lineage(self, spec: TrainingSpec | None = None) -> dict[str, Any]:
        """Return the lineage of a version that it publishes: enough to train it again from the same data.

        spec: the specification with everything that held-out rows have decided, if the fit has.
        """
        return {
            "loss": str(self.spec.loss),
            "seed": self.spec.seed,
            "spec": asdict(self.spec if spec is None else spec),
            **asdict(self.provenance),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingJob":
        """Read what `to_json` returned, here or in an earlier release; members that are missing have defaults."""
        labels, output_labels = (
            None if values.get(name) is None else tuple(values[name]) for name in ("labels", "output_labels")
        )
        lineage = values.get("lineage") or {}
        return cls(
            spec=TrainingSpec.from_json(values.get("resolved") or {"rank": 1, "alpha": 1.0}),
            gate=Gate.from_json(values.get("publish") or {"when": "always"}),
            labels=labels,
            steps=values.get("steps", 1),
            adapters=values.get("adapters", 1),
            positions=values.get("positions", values.get("adapters", 1)),
            is_fleet=values.get("fleet", False),
            kind=JobKind(values.get("kind", JobKind.UPDATE if values.get("update") else JobKind.TRAIN)),
            fleet_prior=values.get("fleet_prior"),
            request=values.get("request"),
            compared=tuple(values.get("compared") or ()),
            output_labels=output_labels,
            memory_bytes=values.get("memory_bytes"),
            scratch_bytes=values.get("scratch_bytes", 0),
            provenance=Provenance(
                data=lineage.get("data") or {}, **{name: lineage.get(name) for name in ("split", "parent", "prior")}
            ),
            description=values.get("shown") or {},
        )
