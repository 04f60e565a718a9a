"""The exceptions of the domain, as one tree.

    LoraplexError
    ├── InvalidInput
    │   ├── NotJson · DuplicateKey · MissingField · UnknownField · IgnoredField
    │   ├── WrongType · OutOfRange · WrongShape · NotFinite · RankTooLarge
    │   ├── InvalidName · InvalidReference · InvalidCursor · InvalidCombination
    │   ├── InvalidUpload
    │   │   └── InvalidSafetensors · InvalidArchive · PeftUnsupported · InvalidDataset
    │   ├── BadRows
    │   ├── EstimateTooLarge
    │   └── OutputNotFinite
    ├── NotFound
    │   ├── AdapterNotFound · VersionNotFound · AliasNotFound · AdapterNotLive
    │   └── DatasetNotFound · JobNotFound · TenantNotFound · KeyNotFound
    ├── Conflict
    │   ├── BaseMismatch · FeatureSpaceMismatch
    │   ├── JobEnded · JobNotEnded · NoStatistics · NoSuspects · DataGone
    │   └── NameTaken · KeysDisabled
    ├── Unauthenticated · Forbidden
    ├── RateLimited · QuotaExceeded
    ├── PreconditionFailed · QueueFull · RequestTimeout
    ├── CatalogBusy · CatalogUnavailable
    ├── StorageFull · StorageFailed · TooManyOpenFiles
    ├── BlobCorrupt
    ├── TrainingFailed
    │   ├── Diverged · WorkerDied · AdapterDeleted · BaseChanged · OutOfMemory · FitFailed
    │   └── IllConditioned · FleetFailed
    ├── ClaimLost
    └── BaseNotLoadable · CatalogNotLoadable · BackupFailed · MigrationFailed

The first line of a class's docstring, without its period, is the title of the error in every answer. The class's name
in snake case is its code, which never changes: `NotJson` is `not_json`. `app.http.errors` maps codes to HTTP statuses.
"""

import copyreg
import json
import re
from collections.abc import Sequence
from enum import Enum
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Self

_MAX_VALUE_CHARACTERS = 100
_MAX_DETAIL_CHARACTERS = 1500
# Most rows of a data set that an error or a report lists.
MAX_BAD_ROWS = 20


class _Given(Enum):
    """Default of `given`, the same object after pickling. It is not None, which is a null that a client sent."""

    NOTHING = "nothing"


class BadRow(NamedTuple):
    """One row of a data set that cannot be used, with the reason."""

    row: int
    """Counted from 0, without the header line."""
    column: str | None
    reason: str

    def members(self) -> dict[str, object]:
        """Return the row as JSON."""
        return {"row": self.row, "column": None if self.column is None else shorten(self.column), "reason": self.reason}


class LoraplexError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "error"

    def __init_subclass__(cls) -> None:
        if "code" not in cls.__dict__:
            cls.code = re.sub(r"(?<!^)[A-Z]", r"_\g<0>", cls.__name__).lower()

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        row: int | None = None,
        given: object = _Given.NOTHING,
        expected: str | None = None,
        outcome_unknown: bool = False,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.row = row
        self.given = given
        self.expected = expected
        # Whether the change may have been stored despite this error.
        self.outcome_unknown = outcome_unknown

    def __str__(self) -> str:
        return self.detail

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling does not call `__init__`, whose parameters differ from class to class.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    @classmethod
    def title(cls) -> str:
        """Return the short description that every error of this class has in common."""
        return (cls.__doc__ or "").partition("\n")[0].removesuffix(".")

    def at(
        self, *, field: str, row: int | None = None, given: object = _Given.NOTHING, expected: str | None = None
    ) -> Self:
        """Set the position in the request of a value whose check made this error; return the error."""
        self.field = field
        self.row = self.row if row is None else row
        self.given = self.given if given is _Given.NOTHING else given
        self.expected = expected or self.expected
        return self

    def explain(self, *, before: str = "", after: str = "") -> Self:
        """Add text before and after the detail; return the error."""
        self.detail = f"{before}{self.detail}{after}"
        return self

    def members(self) -> dict[str, object]:
        """Return the members of the problem (RFC 9457) as JSON, without the status."""
        members: dict[str, object] = {
            "type": f"urn:loraplex:{self.code}",
            "title": self.title(),
            "detail": _cut(self.detail, _MAX_DETAIL_CHARACTERS),
            "code": self.code,
            "field": None if self.field is None else shorten(self.field),
            "row": self.row,
            "given": None if self.given is _Given.NOTHING else shorten(self.given),
            "expected": self.expected,
            "outcome": "unknown" if self.outcome_unknown else None,
        }
        return {name: value for name, value in members.items() if value is not None}


def shorten(value: object) -> str:
    """Return a value as text for a message: JSON, or a string without quotes, of at most 100 characters."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, int) and abs(value) >= 10**_MAX_VALUE_CHARACTERS:
        text = "an integer of more than 100 digits"
    else:
        try:
            text = json.dumps(_truncate(value), default=str)
        except (ValueError, RecursionError):
            text = type(value).__name__
    return _cut(text, _MAX_VALUE_CHARACTERS)


def _truncate(value: object, levels: int = _MAX_VALUE_CHARACTERS) -> object:
    """Return a value of bounded size whose JSON begins like that of the given value."""
    if isinstance(value, str):
        return value[:_MAX_VALUE_CHARACTERS]
    if not levels:
        return value if isinstance(value, int | float | None) else 0
    if isinstance(value, list | tuple):
        return [_truncate(entry, levels - 1) for entry in value[:_MAX_VALUE_CHARACTERS]]
    if isinstance(value, dict):
        return {
            key[:_MAX_VALUE_CHARACTERS]: _truncate(value[key], levels - 1)
            for key in islice(value, _MAX_VALUE_CHARACTERS)
        }
    return value


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


class InvalidInput(LoraplexError):
    """The request has a value that cannot be used."""


class NotJson(InvalidInput):
    """The text is not JSON."""


class DuplicateKey(InvalidInput):
    """A JSON object has the same key twice."""


class MissingField(InvalidInput):
    """A field that is needed was left out."""


class UnknownField(InvalidInput):
    """A field is not one that is known here."""


class IgnoredField(InvalidInput):
    """A field was given that the chosen method would ignore."""


class WrongType(InvalidInput):
    """A value is of the wrong type."""


class OutOfRange(InvalidInput):
    """A value is outside its bounds."""


class WrongShape(InvalidInput):
    """An array has the wrong shape."""


class NotFinite(InvalidInput):
    """A number is not finite as float32."""


class RankTooLarge(InvalidInput):
    """The rank is above what this service accepts."""


class InvalidName(InvalidInput):
    """A name does not follow the rule for names."""


class InvalidReference(InvalidInput):
    """A reference to an adapter is malformed."""


class InvalidCursor(InvalidInput):
    """A cursor was not issued by this service for this list."""


class InvalidCombination(InvalidInput):
    """Two values are fine alone and cannot be used together."""


class InvalidUpload(InvalidInput):
    """An uploaded adapter cannot be read."""


class InvalidSafetensors(InvalidUpload):
    """A safetensors file is malformed or outside its limits."""


class InvalidArchive(InvalidUpload):
    """A zip archive is malformed, unsafe or outside its limits."""


class PeftUnsupported(InvalidUpload):
    """A PEFT adapter uses a feature that cannot be served exactly."""


class InvalidDataset(InvalidUpload):
    """An uploaded data set cannot be read."""

    def __init__(self, detail: str, *, field: str = "body", **position: Any) -> None:
        super().__init__(detail, field=field, **position)


class BadRows(InvalidInput):
    """Rows have values that cannot be trained on."""

    def __init__(self, detail: str, *, rows: Sequence[BadRow], field: str | None = None) -> None:
        first = rows[0] if rows else None
        super().__init__(detail, field=field, row=first.row if first else None, expected="a usable value in every row")
        self.rows = rows

    def members(self) -> dict[str, object]:
        """Return the members of every error, and up to 20 of the rows."""
        return super().members() | {"rows": [bad.members() for bad in self.rows[:MAX_BAD_ROWS]]}


class EstimateTooLarge(InvalidInput):
    """The training would need more memory than a trainer has."""


class IdempotencyKeyReused(InvalidInput):
    """The idempotency key was sent with another request before."""


class OutputNotFinite(InvalidInput):
    """The layer's answer to a row is not finite."""


class NotFound(LoraplexError):
    """Nothing has that name."""


class AdapterNotFound(NotFound):
    """There is no adapter of that name."""


class VersionNotFound(NotFound):
    """There is no such version."""


class AliasNotFound(NotFound):
    """There is no such alias."""


class AdapterNotLive(NotFound):
    """The adapter has versions, and none of them is live."""


class DatasetNotFound(NotFound):
    """There is no data set of that name."""


class JobNotFound(NotFound):
    """There is no job of that id."""


class TenantNotFound(NotFound):
    """There is no tenant of that name."""


class KeyNotFound(NotFound):
    """There is no key of that id."""


class Conflict(LoraplexError):
    """The request does not fit the state of what it names."""


class BaseMismatch(Conflict):
    """The adapter was made for another base layer."""


class FeatureSpaceMismatch(Conflict):
    """The inputs come from another encoder than the one that is served."""


class JobEnded(Conflict):
    """The job has ended already."""


class JobNotEnded(Conflict):
    """The job has not ended yet."""


class NoSuspects(Conflict):
    """The job has found no suspects: it has no classes, or has not ended."""


class NameTaken(Conflict):
    """An adapter of that name exists."""


class DataGone(Conflict):
    """The rows that the job was trained on are no longer stored."""


class NoStatistics(Conflict):
    """The version was trained without keep_statistics."""


class KeysDisabled(Conflict):
    """This service has no keys."""


class IdempotencyInProgress(Conflict):
    """The first request with this idempotency key is still running."""


class Unauthenticated(LoraplexError):
    """The request has no key, or none that this service accepts."""


class Forbidden(LoraplexError):
    """The key does not have the scope for this."""


class RateLimited(LoraplexError):
    """The tenant sends more than its limits allow for a second."""

    def __init__(self, detail: str, *, policy: str, per_second: float, wait_seconds: float, expected: str) -> None:
        """Create the error. `policy` is what the rate counts, and `wait_seconds` says when to try again."""
        super().__init__(detail, expected=expected)
        self.policy = policy
        self.per_second = per_second
        self.wait_seconds = wait_seconds


class QuotaExceeded(LoraplexError):
    """The tenant would have more than one of its limits allows."""

    def __init__(self, limit: str, *, value: int, used: int, adds: int = 1) -> None:
        """Create the error of a limit, given its value, what the tenant uses of it and what this would add."""
        detail = f"the tenant's limit {limit} is {value}: it uses {used}, and this needs {adds} more"
        super().__init__(detail, expected=f"at most {value}")
        self.limit, self.value, self.used = limit, value, used

    def members(self) -> dict[str, object]:
        """Return the members of every error, and the limit with its value and its use."""
        return super().members() | {"quota": {"limit": self.limit, "value": self.value, "used": self.used}}


class PreconditionFailed(LoraplexError):
    """A condition in the request's headers does not hold."""


class QueueFull(LoraplexError):
    """The queue is full."""


class RequestTimeout(LoraplexError):
    """The request's time was up before it was answered."""


class CatalogBusy(LoraplexError):
    """The catalogue is locked by another process."""


class CatalogUnavailable(LoraplexError):
    """The catalogue's database cannot be reached."""


class StorageFull(LoraplexError):
    """The disk is full."""


class StorageFailed(LoraplexError):
    """The disk failed, or the catalogue on it is damaged."""


class TooManyOpenFiles(LoraplexError):
    """The process has no file descriptors left for now."""


class BlobCorrupt(LoraplexError):
    """A stored file is missing or no longer has the bytes that were stored."""


class TrainingFailed(LoraplexError):
    """The training did not end in an adapter."""


class Diverged(TrainingFailed):
    """The loss or the factors stopped being finite."""

    def __init__(self, detail: str, *, step: int, expected: str = "a finite loss; try a lower learning_rate") -> None:
        super().__init__(detail, expected=expected)
        self.step = step

    def members(self) -> dict[str, object]:
        """Return the members of every error, and the step."""
        return super().members() | {"step": self.step}


class WorkerDied(TrainingFailed):
    """The process that trained died on three attempts."""


class AdapterDeleted(TrainingFailed):
    """The adapter was deleted after the job was queued."""


class BaseChanged(TrainingFailed):
    """The base layer is no longer the one that the job was queued for."""


class OutOfMemory(TrainingFailed):
    """The training needs more memory than there is."""


class FitFailed(TrainingFailed):
    """The training stopped on an error of its own."""


class IllConditioned(TrainingFailed):
    """What would be left after forgetting is lost in rounding."""


class FleetFailed(TrainingFailed):
    """No group of the fleet could be trained."""


class ClaimLost(LoraplexError):
    """The job is no longer this trainer's: it was cancelled, or its lease ran out."""


class BaseNotLoadable(LoraplexError):
    """The base layer cannot be loaded."""


class CatalogNotLoadable(LoraplexError):
    """The catalogue cannot be opened."""


class BackupFailed(LoraplexError):
    """A backup cannot be made or restored."""


class MigrationFailed(LoraplexError):
    """A store cannot be copied to other storage."""
