"""Predict and infer requests and their answers, as clients see them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from app.http.schemas.fields import NOT_NULL, Matrix, RequestBody, ShownAs

Parameters = Annotated[dict[str, str | int | float | bool] | None, Field(description="Of the protocol's extensions.")]
Datatype = Literal["FP32", "FP64", "FP16", "BF16"]
# Values of `return`, in the order of the answer's members.
OUTPUTS, PROBABILITIES, LABELS = MEMBERS = ("outputs", "probabilities", "labels")


Reference = Annotated[Any, ShownAs(str | None)]
References = Annotated[Any, ShownAs(list[str | None])]


def _one_of(*fields: list[JsonValue]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"oneOf": [{"required": names} for names in fields]})


class PredictRequest(RequestBody):
    """Rows, with one adapter for all of them or one for each row."""

    model_config = _one_of(["adapter"], ["adapters"])

    adapter: Reference = Field(None, description="Reference (`acme`, `acme@3`), or null for the bare base layer.")
    adapters: References = Field(None, description="Instead of `adapter`: a reference or null for each row.")
    inputs: Matrix = Field(description="Rows of `in_features` numbers.")
    members: Annotated[list[Any], NOT_NULL, Field(json_schema_extra={"items": {"enum": [*MEMBERS]}})] = Field(
        [OUTPUTS], alias="return", description="Members of the answer, each at most once."
    )
    top_k: Annotated[int | None, NOT_NULL] = Field(
        None, ge=1, description="Number of most probable classes for each row, with labels or probabilities."
    )


class AdapterRef(BaseModel):
    """Version that computed the answer."""

    name: str
    version: int
    digest: str


class PredictAnswer(BaseModel):
    """One answer for each row, with the members that `return` lists, and the version that computed it."""

    model_config = _one_of(["adapter"], ["adapters", "row_adapters"])

    outputs: Matrix = Field(None, description="Rows of `out_features` numbers.")
    probabilities: Matrix = Field(None, description="Probability of each class; with `top_k`, of the most probable.")
    labels: list[Any] = Field(default=[], description="Most probable class of each row; with `top_k`, a list of them.")
    adapter: AdapterRef | None = Field(None, description="Null for the bare base layer.")
    adapters: list[AdapterRef] = Field(default=[], description="For a request with `adapters`: the distinct versions.")
    row_adapters: list[int | None] = Field(default=[], description="For each row, its index in `adapters`.")


class InputTensor(BaseModel):
    """Tensor of rows."""

    name: Literal["inputs"]
    shape: Annotated[list[int], Field(description="[rows, in_features]")]
    datatype: Datatype
    parameters: Parameters = Field(None, description="`binary_data_size`, if the numbers follow the JSON.")
    data: Annotated[Any, ShownAs(list[float] | list[list[float]])] = Field(None, description="Flat or nested.")


class WantedTensor(BaseModel):
    """Requested form of the output."""

    name: Literal["outputs"]
    parameters: Parameters = Field(None, description="`binary_data`; `classification`, the number of classes.")


class InferRequest(BaseModel):
    """Request to apply a model to rows."""

    id: str | None = Field(None, description="Returned in the answer.")
    model_name: str | None = None
    parameters: Parameters = Field(None, description="`timeout` in µs; `binary_data_output`.")
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[WantedTensor], Field(max_length=1)] = []


class OutputTensor(BaseModel):
    """Tensor of outputs, or of classes."""

    name: Literal["outputs"]
    shape: list[int]
    datatype: Literal["FP32", "BYTES"]
    parameters: Parameters = None
    data: Annotated[Any, ShownAs(list[float] | list[str])] = None


class InferAnswer(BaseModel):
    """Answer of a model."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
