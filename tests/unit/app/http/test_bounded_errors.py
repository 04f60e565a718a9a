"""An error about a huge value takes no longer than one about a small value."""

from typing import Any

import pytest
from pydantic import BaseModel

from adapters.errors import InvalidInput, UnknownField, shorten
from app.http import errors
from app.http.bodies import read_as
from app.http.schemas.predictions import PredictRequest
from app.http.schemas.trainings import TrainRequest


class _Counted:
    shown = 0

    def __str__(self) -> str:
        _Counted.shown += 1
        return "x"


def test_only_the_beginning_of_a_value_is_shown() -> None:
    assert shorten([_Counted()] * 100_000).startswith('["x", "x"')
    assert shorten({"a" * 1000: [[1] * 1000] * 1000}) == '{"' + "a" * 97 + "…"
    assert _Counted.shown < 1000
    values: list[Any] = [[1, 2.5, None], {"a": [True, "ä"]}, "text", 10**200, [[[[]]]], (1, "b"), float("nan")]
    for value in values:
        assert len(shorten(value)) < 100
    nested: list[Any] = []
    for _ in range(900):
        nested = [nested]
    assert shorten(nested) == "[" * 99 + "…"


def test_of_many_unknown_fields_one_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    validate = BaseModel.model_validate.__func__  # type: ignore[attr-defined]

    def spy(cls: type[BaseModel], value: Any) -> Any:
        seen.append(value)
        return validate(cls, value)

    monkeypatch.setattr(BaseModel, "model_validate", classmethod(spy))
    many: dict[str, Any] = {f"k{number}": 0 for number in range(10_000)}
    with pytest.raises(UnknownField, match="k0 is not"):
        read_as(PredictRequest, many | {"inputs": [[1]], "adapter": None})
    with pytest.raises(UnknownField, match=r"training\.k0 is not"):
        read_as(TrainRequest, {"name": "a", "rank": 1, "data": {}, "training": many})
    assert len(seen[0]) == 3
    assert len(seen[1]["training"]) == 1


def test_a_huge_field_is_not_compared_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(given: str, *_: Any, **__: Any) -> list[str]:
        compared.append(given)
        return []

    monkeypatch.setattr(errors, "get_close_matches", compare)
    with pytest.raises(InvalidInput):
        read_as(PredictRequest, {"inputs": [], "adapter": None, "x" * 1_000_000: 1})
    assert [len(given) for given in compared] == [100]
