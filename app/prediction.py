"""One predict request, from its bytes to its answer; the work of a thread, off the event loop."""

# N rows · I in_features · O out_features
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import orjson
import torch

from adapters.adapter import Adapter
from adapters.errors import (
    BlobCorrupt,
    CatalogBusy,
    InvalidCombination,
    LoraplexError,
    MissingField,
    OutputNotFinite,
    WrongShape,
    WrongType,
)
from adapters.forward import mixed_forward
from adapters.matrices import Float32, matrix
from adapters.names import Reference, parse_reference
from adapters.resolution import View
from adapters.versions import Version
from app.bodies import parse_object, read_as
from app.schemas import PredictRequest
from app.service import Service

_LONGEST_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A response body, and how long its parts took, in seconds."""

    body: bytes
    queue_seconds: float
    forward_seconds: float


@dataclass(frozen=True, slots=True)
class _Question:
    inputs_NI: Float32
    references: Sequence[Reference | None]
    """One for all rows, or one a row."""
    by_row: bool


def predict(service: Service, body: bytes, received: float) -> Answer:
    """Answer a `POST /predict` whose body was complete at `received` (a `time.perf_counter`)."""
    question = _read(service, body)
    choices = list(dict.fromkeys(question.references))
    position = {reference: index for index, reference in enumerate(choices)}
    versions, adapters = _resolve(service, question, choices)
    begin = time.perf_counter()
    x_NI = torch.from_numpy(question.inputs_NI).to(service.base.weight_OI)
    choice_N = [position[reference] for reference in question.references]
    y_NO = mixed_forward(service.base, x_NI, adapters, choice_N).float().cpu().numpy()
    end = time.perf_counter()
    _check_finite(y_NO)
    described = [None if version is None else _describe(version) for version in versions]
    answer: dict[str, object] = {"outputs": y_NO}
    if question.by_row:
        answer |= _by_row(described, choice_N)
    else:
        answer["adapter"] = described[0]
    return Answer(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), begin - received, end - begin)


def _read(service: Service, body: bytes) -> _Question:
    request = read_as(PredictRequest, parse_object(body))
    if request.gave("adapter") and request.gave("adapters"):
        raise InvalidCombination(
            "adapter and adapters cannot both be given",
            field="adapters",
            expected="adapter for all rows, or adapters with one a row",
        )
    if not (request.gave("adapter") or request.gave("adapters")):
        raise MissingField(
            "adapter is missing; null means the bare base layer",
            field="adapter",
            expected="a reference or null",
        )
    inputs_NI = matrix(
        request.inputs, field="inputs", columns=service.base.in_features, max_rows=service.settings.max_rows
    )
    if request.gave("adapter"):
        return _Question(inputs_NI, [_reference(request.adapter, "adapter", None)], by_row=False)
    if not isinstance(request.adapters, list):
        raise WrongType(
            "adapters must be a list",
            field="adapters",
            given=request.adapters,
            expected="one reference or null a row",
        )
    if len(request.adapters) != len(inputs_NI):
        raise WrongShape(
            f"adapters has {len(request.adapters)} entries, inputs has {len(inputs_NI)} rows",
            field="adapters",
            given=f"{len(request.adapters)} entries",
            expected=f"{len(inputs_NI)} entries",
        )
    references = [_reference(given, "adapters", row) for row, given in enumerate(request.adapters)]
    return _Question(inputs_NI, references, by_row=True)


def _reference(given: object, field: str, row: int | None) -> Reference | None:
    return None if given is None else parse_reference(given, field=field, row=row)


def _resolve(
    service: Service, question: _Question, choices: Sequence[Reference | None]
) -> tuple[list[Version | None], list[Adapter | None]]:
    before: list[Version | None] | None = None
    while True:
        view = _look(service)
        versions: list[Version | None] = []
        for reference in choices:
            try:
                version = None if reference is None else view.version(reference)
                if version is not None:
                    version.check_answers_on(service.base, service.settings.feature_space)
            except LoraplexError as error:
                error.field = "adapter"
                if question.by_row:
                    error.field, error.row = "adapters", question.references.index(reference)
                raise
            versions.append(version)
        try:
            return versions, [None if version is None else service.residency.get(version) for version in versions]
        except BlobCorrupt:
            # Deleted between the look and the read, and perhaps made again: only what still stands is corrupt.
            if versions == before:
                raise
            before = versions


def _look(service: Service) -> View:
    give_up = time.monotonic() + _LONGEST_LOCK_SECONDS
    while True:
        try:
            return service.resolver.look()
        except CatalogBusy:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.001)


def _check_finite(y_NO: Float32) -> None:
    finite_N = np.isfinite(y_NO).all(axis=1)
    if not finite_N.all():
        row = int(np.argmin(finite_N))
        raise OutputNotFinite(
            f"the answer to row {row} is past what float32 holds",
            field="inputs",
            row=row,
            expected="inputs and factors whose product is finite",
        )


def _describe(version: Version) -> dict[str, object]:
    return {"name": version.adapter, "version": version.version, "digest": version.digest}


def _by_row(described: list[dict[str, object] | None], choice_N: list[int]) -> dict[str, object]:
    # `acme` and `acme@3` may be the same version: the distinct ones are told apart by their contents.
    keys = [None if entry is None else (entry["name"], entry["version"]) for entry in described]
    distinct = {key: entry for key, entry in zip(keys, described, strict=True) if key is not None}
    place: dict[object, int] = {key: index for index, key in enumerate(distinct)}
    row_adapters = [place.get(keys[choice]) for choice in choice_N]
    return {"adapters": list(distinct.values()), "row_adapters": row_adapters}
