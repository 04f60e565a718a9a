"""Adapters, their versions and uploads as clients see them.

Arrays are `Any` here, and `adapters.arrays` checks them: it is as strict as pydantic and much faster.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from adapters.catalog import versions as domain
from adapters.catalog.versions import Source
from adapters.lora.base_layer import BaseLayer
from app.openapi.field_schemas import NotNull, ShownAs

Matrix = Annotated[
    Any, Field(json_schema_extra={"type": "array", "items": {"type": "array", "items": {"type": "number"}}})
]


def not_null(value: object) -> object:
    """Return the value of a field that may be omitted, but not be null."""
    if value is None:
        raise ValueError("it may be left out, but not be null")
    return value


NOT_NULL = NotNull(not_null)
Alpha = Annotated[float | None, NOT_NULL]
File = Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})]
_LABEL = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
Labels = Annotated[Any, NOT_NULL, Field(json_schema_extra={"type": "array", "items": _LABEL})]


class RequestBody(BaseModel):
    """Base of request bodies: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def gave(self, name: str) -> bool:
        """Return whether the client sent this field."""
        return name in self.model_fields_set


class FactorsUpload(RequestBody):
    """Factors of an adapter."""

    A: Matrix = Field(description="(out, r)")
    B: Matrix = Field(description="(r, in)")
    alpha: Alpha = Field(None, ge=-1e6, le=1e6, description="Defaults to the rank, so that s = 1.")
    bias: Annotated[Any, NOT_NULL, ShownAs(list[float])] = Field(None, description="(out)")
    labels: Labels = Field(None, description="Class labels of the first outputs.")


class PeftUpload(RequestBody):
    """Factors of an adapter under PEFT's names, which are swapped."""

    lora_A: Matrix = Field(description="(r, in)")
    lora_B: Matrix = Field(description="(out, r)")
    lora_alpha: Alpha = Field(None, ge=-1e6, le=1e6, description="Defaults to the rank, so that s = 1.")
    labels: Labels = Field(None, description="Class labels of the first outputs.")


class PeftFiles(BaseModel):
    """The two files of PEFT's `save_pretrained`, recognised by their file names. Field names are ignored."""

    adapter_model: File = Field(description="`adapter_model.safetensors`")
    adapter_config: File = Field(description="`adapter_config.json`")


class LiveRequest(RequestBody):
    """Version to make live."""

    version: int = Field(ge=1)


class VersionEntryBody(BaseModel):
    """Version in a list, without the lists in its metrics and lineage, whose size grows with the layer."""

    adapter: str
    version: int
    digest: str
    rank: int
    alpha: float
    rslora: bool
    scaling: float
    bytes: int
    base: str
    feature_space: str | None
    labels: list[str | int] | None
    created_at: str
    source: Annotated[str, ShownAs(Source)]
    job: str | None
    metrics: dict[str, Any] | None
    effect: dict[str, float | None]
    lineage: dict[str, Any] | None

    @classmethod
    def of(cls, version: domain.Version) -> "VersionEntryBody":
        """Return a version as clients see it in a list."""
        own = {name: getattr(version, name) for name in VersionEntryBody.model_fields if name != "effect"}
        own["metrics"] = None if version.metrics is None else _without_lists(version.metrics)
        own["lineage"] = None if version.lineage is None else _without_lists(version.lineage)
        return cls(**own, effect={"relative_norm": version.relative_norm})


class VersionBody(VersionEntryBody):
    """Immutable version of an adapter."""

    @classmethod
    def of(cls, version: domain.Version) -> "VersionBody":
        """Return a version as clients see it by itself."""
        entry = dict(VersionEntryBody.of(version))
        return cls(**entry | {"metrics": version.metrics, "lineage": version.lineage})


class AdapterEntryBody(BaseModel):
    """Adapter in a list."""

    name: str
    created_at: str
    aliases: dict[str, int]
    live: VersionEntryBody | None
    versions: int
    problem: Annotated[str | None, ShownAs(Literal["base_mismatch", "feature_space_mismatch"] | None)] = Field(
        description="Code of the error of `/predict` for the live version on this service; null if there is none."
    )

    @classmethod
    def of(cls, adapter: domain.AdapterSummary, base: BaseLayer, feature_space: str | None) -> "AdapterEntryBody":
        """Return an adapter as clients of a service with this base layer and feature space see it in a list."""
        return cls(
            name=adapter.name,
            created_at=adapter.created_at,
            aliases=dict(adapter.aliases),
            live=None if adapter.live is None else VersionEntryBody.of(adapter.live),
            versions=adapter.versions,
            problem=adapter.serving_problem(base, feature_space),
        )


class AdapterBody(AdapterEntryBody):
    """Adapter with its live version."""

    live: VersionBody | None

    @classmethod
    def of(cls, adapter: domain.AdapterSummary, base: BaseLayer, feature_space: str | None) -> "AdapterBody":
        """Return an adapter as clients of a service with this base layer and feature space see it by itself."""
        entry = dict(AdapterEntryBody.of(adapter, base, feature_space))
        return cls(**entry | {"live": None if adapter.live is None else VersionBody.of(adapter.live)})


def _without_lists(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return members without lists, which have an entry for each output, class or column; intervals are kept."""
    return {
        name: _without_lists(value) if isinstance(value, Mapping) else value
        for name, value in members.items()
        if not isinstance(value, list) or name.endswith("_interval")
    }


class BaseBody(BaseModel):
    """The frozen base layer."""

    in_features: int
    out_features: int
    bias: bool
    dtype: str
    device: str
    fingerprint: str
    feature_space: str | None
    source: str

    @classmethod
    def of(cls, base: BaseLayer, feature_space: str | None) -> "BaseBody":
        """Return the base layer as clients see it."""
        return cls(
            in_features=base.in_features,
            out_features=base.out_features,
            bias=base.bias_O is not None,
            dtype=base.dtype,
            device=str(base.device),
            fingerprint=base.fingerprint,
            feature_space=feature_space,
            source=base.source,
        )


class AdapterPage(BaseModel):
    """Page of the list of adapters."""

    data: list[AdapterEntryBody]
    next_cursor: str | None


class VersionPage(BaseModel):
    """Page of an adapter's list of versions."""

    data: list[VersionEntryBody]
    next_cursor: str | None
