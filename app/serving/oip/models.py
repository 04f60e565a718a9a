"""Models of the Open Inference Protocol: their names, metadata, configuration and index. Each adapter is a model."""

import re
from collections.abc import Sequence
from enum import StrEnum

from pydantic import BaseModel

from adapters.catalog.versions import AdapterSummary
from adapters.errors import InvalidCombination, LoraplexError, VersionNotFound, shorten
from adapters.lora.base_layer import BaseLayer
from adapters.names import Reference, check_name
from app.serving.oip.request import INPUT, OUTPUT, InferHeader

BASE_MODEL, BASE_VERSION = "__base__", "1"
EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository"]
# Platform and backend of every model.
PLATFORM = "loraplex"
_VERSION = re.compile(r"[1-9][0-9]*")
_MAX_DIGITS = 200


class Tensor(BaseModel):
    """A tensor of a model; -1 in its shape is any number of rows."""

    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    """A model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ConfiguredTensor(BaseModel):
    """A tensor of a model, as a configuration has it: `dims` are those of one row."""

    name: str
    data_type: str
    dims: list[int]


class Configuration(BaseModel):
    """A model's configuration, as far as it has a meaning here: rows are what Triton calls a batch."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]


class State(StrEnum):
    """Whether a model answers."""

    READY = "READY"
    """It does."""
    UNAVAILABLE = "UNAVAILABLE"
    """No version is live, or the live one was made for another base or feature space."""


class IndexEntry(BaseModel):
    """A model in the index; `version` is the one that its bare name means, empty where there is none."""

    name: str
    version: str
    state: State = State.READY
    reason: str = ""


def parse_model(name: str, version: str | None = None) -> Reference | None:
    """Return the reference of a path's model and version; None for the bare base layer.

    Raises `InvalidName`, or `VersionNotFound` for a malformed version.
    """
    if name == BASE_MODEL:
        if version not in (None, BASE_VERSION):
            raise _no_version(name, version, f"there is: {BASE_VERSION}")
        return None
    check_name(name)
    if version is None:
        return Reference(name)
    if not _VERSION.fullmatch(version):
        raise _no_version(name, version, "versions are numbers from 1 on")
    # Python refuses to read thousands of digits. A number of 200 digits does not exist either.
    return Reference(name, version=int(version[:_MAX_DIGITS]))


def _no_version(name: str, version: str | None, there: str) -> VersionNotFound:
    return VersionNotFound(
        f"{name!r} has no version {shorten(version)}; {there}", field="version", given=version, expected=there
    )


def metadata(name: str, versions: Sequence[object], base: BaseLayer) -> Metadata:
    """Return the metadata of a model: its tensors, and the versions of its paths."""
    return Metadata(
        name=name,
        versions=[str(version) for version in versions],
        platform=PLATFORM,
        inputs=[Tensor(name=INPUT, datatype="FP32", shape=[-1, base.in_features])],
        outputs=[Tensor(name=OUTPUT, datatype="FP32", shape=[-1, base.out_features])],
    )


def configuration(name: str, base: BaseLayer, *, max_rows: int) -> Configuration:
    """Return the configuration of a model."""
    return Configuration(
        name=name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=max_rows,
        input=[ConfiguredTensor(name=INPUT, data_type="TYPE_FP32", dims=[base.in_features])],
        output=[ConfiguredTensor(name=OUTPUT, data_type="TYPE_FP32", dims=[base.out_features])],
    )


def base_entry() -> IndexEntry:
    """Return the index entry of the bare base layer."""
    return IndexEntry(name=BASE_MODEL, version=BASE_VERSION)


def index_entry(adapter: AdapterSummary, base: BaseLayer, feature_space: str | None) -> IndexEntry:
    """Return the index entry of an adapter: its live version, and the reason if it cannot answer."""
    if adapter.live is None:
        return IndexEntry(name=adapter.name, version="", state=State.UNAVAILABLE, reason="no version is live")
    entry = IndexEntry(name=adapter.name, version=str(adapter.live.version))
    try:
        adapter.live.check_servable(base, feature_space)
    except LoraplexError as error:
        entry.state, entry.reason = State.UNAVAILABLE, error.detail
    return entry


def check_model_name(header: InferHeader, model: str) -> None:
    """Raise `InvalidCombination` if the body has another model than the path."""
    if header.model_name is not None and header.model_name != model:
        raise InvalidCombination(
            f"model_name is {shorten(header.model_name)}, the path says {model}",
            field="model_name",
            given=header.model_name,
            expected=f"{model}, or no model_name",
        )
