"""Results as JSON values, in the shapes of the HTTP API."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from loraplex.errors import LoraplexError
from loraplex.results import Back, Estimate, JobFields, LossPoint

# Fields that a list leaves out. The client sets them to empty values.
_NOT_IN_LISTS = ("history", "log", "columns", "bad_rows", "lineage")


def plain(value: Any, *, listed: bool = False) -> Any:
    """Return a result of the client, or a container of results, as a JSON value.

    `listed` omits the fields that a list leaves out.
    """
    if isinstance(value, LoraplexError):
        return problem(value)
    if isinstance(value, LossPoint):
        return [value.step, value.loss]
    if isinstance(value, Back):
        return {"name": value.name, "from": value.version, "to": value.to}
    if isinstance(value, Estimate):
        takes = {"memory_bytes": value.memory_bytes, "seconds": value.seconds}
        return {"spec": plain(value.spec), "estimate": takes, "adapters": value.adapters}
    if is_dataclass(value):
        # A job with methods also has a client, which is not part of the value.
        names = [field.name for field in fields(JobFields if isinstance(value, JobFields) else value)]
        shown = [name for name in names if not (listed and name in _NOT_IN_LISTS)]
        return {name: plain(getattr(value, name), listed=listed) for name in shown}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each, listed=True) for each in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # as text, which is what the service's problems give too
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def problem(error: LoraplexError) -> dict[str, Any]:
    """Return an error in the form of a problem (RFC 9457), also if the client raised it."""
    known = {
        "type": f"urn:loraplex:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "field": error.field,
        "row": error.row,
        "given": error.given,
        "expected": error.expected,
        "request_id": error.request_id,
    }
    # The client may have more precise values, such as the row among all rows that were sent in parts.
    whole = {**error.members, **{name: value for name, value in known.items() if value is not None}}
    return {name: plain(each) for name, each in whole.items() if each is not None}
