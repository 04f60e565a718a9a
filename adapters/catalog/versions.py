"""The values of the catalogue: versions, summaries of adapters, and publications."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.errors import BaseMismatch, FeatureSpaceMismatch
from adapters.lora.adapter import Adapter, scaling_of
from adapters.lora.base_layer import BaseLayer


class Source(StrEnum):
    """Where a version came from."""

    UPLOAD = "upload"
    """A client sent the factors."""
    JOB = "job"
    """A training job made them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable version of an adapter."""

    adapter: str
    version: int
    digest: str
    rank: int
    alpha: float
    rslora: bool
    base: str
    """Fingerprint of the base layer that it was made for."""
    feature_space: str | None
    created_at: str
    source: Source
    job: str | None
    module: str | None
    """Path of the module in the PEFT files that it was uploaded as."""
    metrics: Mapping[str, object] | None = field(hash=False)
    relative_norm: float | None
    file: str
    """The blob that holds its canonical bytes, from `offset` on, `bytes` long."""
    offset: int
    bytes: int
    labels: Sequence[str | int] | None = field(default=None, hash=False)
    """Labels of the first outputs, in order."""
    lineage: Mapping[str, object] | None = field(default=None, hash=False)
    """What it was trained from and how."""
    statistics: str | None = None
    """Name of the blob with the sums that its closed form came from; None if they were not kept."""
    loss: str | None = None
    """The loss that it was trained with, which its lineage has too."""

    def __str__(self) -> str:
        return f"{self.adapter}@{self.version}"

    @property
    def scaling(self) -> float:
        """s, the factor in front of the low-rank term."""
        return scaling_of(self.alpha, self.rank, rslora=self.rslora)

    def check_servable(self, base: BaseLayer, feature_space: str | None) -> None:
        """Raise `BaseMismatch` or `FeatureSpaceMismatch` if it cannot be served with this base and feature space.

        A version without a feature space may come from any encoder, and passes.
        """
        if self.base != base.fingerprint:
            detail = f"{self} was made for the base layer {self.base}, this service has {base.fingerprint}"
            raise BaseMismatch(detail, field="adapter", given=self.base, expected=base.fingerprint)
        space = self.feature_space
        if space is not None and space != feature_space:
            detail = f"{self} is for the feature space {space!r}, this service has {feature_space!r}"
            raise FeatureSpaceMismatch(detail, field="adapter", given=space, expected=feature_space)

    def serving_problem(self, base: BaseLayer, feature_space: str | None) -> str | None:
        """Return the code of what `check_servable` raises, or None."""
        try:
            self.check_servable(base, feature_space)
        except (BaseMismatch, FeatureSpaceMismatch) as error:
            return error.code
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSummary:
    """A name, its aliases and how many versions it has."""

    name: str
    created_at: str
    aliases: Mapping[str, int]
    live: Version | None
    versions: int

    def serving_problem(self, base: BaseLayer, feature_space: str | None) -> str | None:
        """Return the code of the error that keeps its live version from being served here, or None."""
        return None if self.live is None else self.live.serving_problem(base, feature_space)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One adapter to be published."""

    name: str
    adapter: Adapter
    base: BaseLayer
    source: Source
    module: str | None = None
    job: str | None = None
    metrics: Mapping[str, object] | None = None
    position: int | None = None
    """Its position among the adapters of its job."""
    moves_live: bool = True
    checks_live: bool = False
    """Whether live moves only if it still points at `expected_live`, which the adapter was compared with."""
    expected_live: int | None = None
    """Version number; None if no version is live."""
    lineage: Mapping[str, object] | None = None
    statistics: bytes | None = None
    """Sums of a closed form, as `adapters.training.closed_form.statistics` writes them, kept with the version."""
    evidence: bytes | None = None
    """Out-of-sample errors of its training rows, as `RowEvidence.to_bytes` writes them, kept with the version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Result of a publication."""

    position: int | None
    version: Version
    moved_live: bool
    replaced: int | None
    """Number of the version that was live before; None if none was."""
