"""Adapters, their versions and uploads as clients see them."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from adapters.catalog.versions import AdapterSummary, Source
from adapters.lora.base_layer import BaseLayer
from app.http.schemas.fields import NOT_NULL, AnswerBody, Labels, Matrix, PageBody, RequestBody, ShownAs

Alpha = Annotated[float | None, NOT_NULL]
File = Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})]


class FactorsUpload(RequestBody):
    """Factors of an adapter."""

    A: Matrix = Field(description="(out, r)")
    B: Matrix = Field(description="(r, in)")
    alpha: Alpha = Field(None, ge=-1e6, le=1e6, description="Defaults to the rank, so that s = 1.")
    bias: Annotated[Any, NOT_NULL, ShownAs(list[float])] = Field(None, description="(out)")
    labels: Labels = Field(None, description="Class labels of the first outputs.")


class PeftUpload(RequestBody):
    """Factors of an adapter under PEFT's names, which are swapped."""

    B: Matrix = Field(alias="lora_A", description="(r, in)")
    A: Matrix = Field(alias="lora_B", description="(out, r)")
    alpha: Alpha = Field(None, alias="lora_alpha", ge=-1e6, le=1e6, description="Defaults to the rank, so that s = 1.")
    bias: ClassVar[None] = None
    labels: Labels = Field(None, description="Class labels of the first outputs.")


class PeftFiles(BaseModel):
    """The two files of PEFT's `save_pretrained`, recognised by their file names. Field names are ignored."""

    adapter_model: File = Field(description="`adapter_model.safetensors`")
    adapter_config: File = Field(description="`adapter_config.json`")


class LiveRequest(RequestBody):
    """Version to make live."""

    version: int = Field(ge=1)


def without_lists(members: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return members without lists, which have an entry for each output, class or column; intervals are kept."""
    if members is None:
        return None
    return {
        name: without_lists(value) if isinstance(value, Mapping) else value
        for name, value in members.items()
        if not isinstance(value, list) or name.endswith("_interval")
    }


WithoutLists = Annotated[dict[str, Any] | None, BeforeValidator(without_lists)]


class VersionEntryBody(AnswerBody):
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
    metrics: WithoutLists
    effect: Annotated[dict[str, float | None], BeforeValidator(lambda norm: {"relative_norm": norm})] = Field(
        validation_alias="relative_norm"
    )
    lineage: WithoutLists


class VersionBody(VersionEntryBody):
    """Immutable version of an adapter."""

    metrics: dict[str, Any] | None
    lineage: dict[str, Any] | None


class AdapterEntryBody(AnswerBody):
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
    def served_by(cls, base: BaseLayer, feature_space: str | None, adapter: AdapterSummary) -> Self:
        """Return an adapter as clients of a service with this base layer and feature space see it."""
        own = {name: getattr(adapter, name) for name in cls.model_fields if name != "problem"}
        return cls(**own, problem=adapter.serving_problem(base, feature_space))


class AdapterBody(AdapterEntryBody):
    """Adapter with its live version."""

    live: VersionBody | None


class BaseBody(BaseModel):
    """The frozen base layer."""

    in_features: int
    out_features: int
    bias: bool
    dtype: str
    device: str
    fingerprint: str
    feature_space: str | None
    labels: list[str | int] | None = Field(description="Labels of the first outputs; null if there are none.")
    source: str


class AdapterPage(PageBody[AdapterEntryBody]):
    """Page of the list of adapters."""


class VersionPage(PageBody[VersionEntryBody]):
    """Page of an adapter's list of versions."""
