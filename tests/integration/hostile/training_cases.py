"""Requests to train that cannot be, as cases."""

from typing import Any

from tests.integration.hostile.bodies import JSON, LEFT_OUT, NOT_NUMBERS, OUT, ROW, to_json
from tests.integration.hostile.case import Case

ROWS = 12
NUMBERS: dict[str, Any] = {"inputs": [ROW] * ROWS, "targets": [[1.0] * OUT] * ROWS}
CLASSES: dict[str, Any] = {"inputs": [ROW] * ROWS, "targets": [0, 1] * (ROWS // 2)}
SHARES: dict[str, Any] = {"inputs": [ROW] * ROWS, "targets": [[0, 1]] * ROWS}
HALF = {"by": "rows", "fraction": 0.5}
CROSS, BINARY = {"loss": "cross_entropy"}, {"loss": "binary_cross_entropy"}
NEGATIVES: dict[str, Any] = {"loss": "multiple_negatives", "batch_size": 4}
NOT_WHOLE: dict[str, Any] = {"a fraction": 1.5, "2.0": 2.0, "a string of digits": "2"} | NOT_NUMBERS
_METHOD = {"momentum": "sgd"}
_LOSS = {"huber_delta": "huber", "label_smoothing": "cross_entropy", "temperature": "multiple_negatives"}


def by_adamw(training: Any) -> Any:
    """The settings, by adamw if they name no method."""
    if training is LEFT_OUT:
        return {"method": "adamw"}
    return training | {"method": training.get("method", "adamw")} if isinstance(training, dict) else training


def case(
    title: str,
    code: str,
    /,
    *says: str,
    field: str | None = None,
    row: int | None = None,
    query: str = "",
    training: Any = LEFT_OUT,
    **body: Any,
) -> Case:
    """A request of which everything but `body` and `training` is good; by adamw if it names no method."""
    content = {"name": "fresh", "rank": 2, "data": NUMBERS, "training": by_adamw(training)} | body
    return Case(
        name=title,
        method="POST",
        path=f"/adapters{query}",
        code=code,
        says=says,
        field=field,
        row=row,
        body=to_json(content),
        headers={"Content-Type": JSON},
    )


def setting(title: str, code: str, /, *says: str, data: Any = NUMBERS, split: Any = LEFT_OUT, **training: Any) -> Case:
    """One whose first setting is the culprit."""
    field = f"training.{next(iter(training))}"
    return case(title, code, *says, field=field, training=training, data=data, split=split)


def beside(name: str, value: Any) -> dict[str, Any]:
    """A setting beside the method or loss that it goes with."""
    also = {"method": _METHOD[name]} if name in _METHOD else {"loss": _LOSS[name]} if name in _LOSS else {}
    return {name: value} | also | ({"batch_size": 4} if name == "temperature" else {})


def rows(
    title: str, code: str, /, *says: str, field: str, row: int | None = None, training: Any = LEFT_OUT, **data: Any
) -> Case:
    """Three rows of which all but these fields are good."""
    content = {"inputs": [ROW] * 3, "targets": [[1.0] * OUT] * 3} | data
    return case(title, code, *says, field=field, row=row, data=content, training=training)
