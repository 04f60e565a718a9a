"""Results as JSON values."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from loraplex.errors import LoraplexError
from loraplex.results import JobFields


def plain(value: Any) -> Any:
    """A result of the client, or whatever holds some, as what `json` writes."""
    if isinstance(value, LoraplexError):
        return problem(value)
    if isinstance(value, JobFields):
        return {field.name: plain(getattr(value, field.name)) for field in fields(JobFields)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def problem(error: LoraplexError) -> dict[str, Any]:
    """An error as the service's problems are (RFC 9457), also where the client alone met it."""
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
    return {name: plain(each) for name, each in (known | dict(error.members)).items() if each is not None}
