"""Predict and infer requests and their answers, as clients see them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.http.schemas.adapters import NOT_NULL, Matrix, RequestBody
from app.openapi.field_schemas import ShownAs
from app.serving.options import MEMBERS

Parameters = Annotated[dict[str, str | int | float | bool] | None, Field(description="By the protocol's extensions.")]
Datatype = Literal["FP32", "FP64", "FP16", "BF16"]


class PredictRequest(RequestBody):
    """Rows, and the adapter for all of them or one for each."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["adapter"]}, {"required": ["adapters"]}]})

    adapter: Annotated[Any, ShownAs(str | None)] = Field(
        None, description="Reference (`acme`, `acme@3`), or null for the bare base layer."
    )
    adapters: Annotated[Any, ShownAs(list[str | None])] = Field(
        None, description="In place of `adapter`: one reference or null a row."
    )
    inputs: Matrix = Field(description="Rows of `in_features` numbers.")
    wanted: Annotated[
        Any,
        NOT_NULL,
        Field(json_schema_extra={"type": "array", "items": {"enum": [*MEMBERS]}}),
    ] = Field(["outputs"], alias="return", description="What to answer with; each at most once.")
    top_k: Annotated[int | None, NOT_NULL] = Field(
        None, ge=1, description="So many of the most probable classes a row: with labels or probabilities."
    )


class AdapterRef(BaseModel):
    """The version that answered."""

    name: str
    version: int
    digest: str


class PredictAnswer(BaseModel):
    """One answer a row: what `return` asked for, and which version it came from."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["adapter"]}, {"required": ["adapters", "row_adapters"]}]}
    )

    outputs: Matrix = Field(None, description="Rows of `out_features` numbers.")
    probabilities: Matrix = Field(None, description="A probability a class; with `top_k` those of the most probable.")
    labels: list[Any] = Field(
        default=[], description="The most probable class of each row, or with `top_k` a list of them."
    )
    adapter: AdapterRef | None = Field(None, description="Null: the bare base layer.")
    adapters: list[AdapterRef] = Field(default=[], description="Where `adapters` was asked for: the distinct versions.")
    row_adapters: list[int | None] = Field(default=[], description="For each row its place in `adapters`.")


class InputTensor(BaseModel):
    """The rows."""

    name: Literal["inputs"]
    shape: Annotated[list[int], Field(description="[rows, in_features]")]
    datatype: Datatype
    parameters: Parameters = Field(None, description="`binary_data_size`, where the numbers follow the JSON.")
    data: Annotated[Any, ShownAs(list[float] | list[list[float]])] = Field(None, description="Flat or nested.")


class WantedTensor(BaseModel):
    """How the answer is wanted."""

    name: Literal["outputs"]
    parameters: Parameters = Field(None, description="`binary_data`; `classification`: so many classes a row.")


class InferRequest(BaseModel):
    """Rows for a model."""

    id: str | None = Field(None, description="Comes back in the answer.")
    model_name: str | None = None
    parameters: Parameters = Field(None, description="`timeout` in µs; `binary_data_output`.")
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[WantedTensor], Field(max_length=1)] = []


class OutputTensor(BaseModel):
    """The layer's answer to the rows, or its classes."""

    name: Literal["outputs"]
    shape: list[int]
    datatype: Literal["FP32", "BYTES"]
    parameters: Parameters = None
    data: Annotated[Any, ShownAs(list[float] | list[str])] = None


class InferAnswer(BaseModel):
    """What a model answered."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
