"""Exceptions: the tree of the service's errors, with the same names and codes, and those of the client alone.

    LoraplexError
    ├── InvalidInput
    │   ├── NotJson · DuplicateKey · MissingField · UnknownField · IgnoredField
    │   ├── WrongType · OutOfRange · WrongShape · NotFinite · RankTooLarge
    │   ├── InvalidName · InvalidReference · InvalidCursor · InvalidCombination
    │   ├── InvalidUpload
    │   │   └── InvalidSafetensors · InvalidArchive · PeftUnsupported · InvalidDataset
    │   ├── BadRows
    │   ├── EstimateTooLarge · IdempotencyKeyReused
    │   └── OutputNotFinite
    ├── NotFound
    │   ├── AdapterNotFound · VersionNotFound · AliasNotFound · AdapterNotLive
    │   └── DatasetNotFound · JobNotFound · TenantNotFound · KeyNotFound
    ├── Conflict
    │   ├── BaseMismatch · FeatureSpaceMismatch
    │   ├── JobEnded · JobNotEnded · NoStatistics · NoSuspects · DataGone
    │   └── NameTaken · KeysDisabled · IdempotencyInProgress
    ├── Unauthenticated · Forbidden
    ├── RateLimited · QuotaExceeded
    ├── PreconditionFailed
    ├── QueueFull · RequestTimeout
    ├── CatalogBusy · CatalogUnavailable
    ├── StorageFull · StorageFailed · TooManyOpenFiles
    ├── BlobCorrupt
    ├── TrainingFailed
    │   ├── Diverged · WorkerDied · AdapterDeleted · BaseChanged · OutOfMemory · FitFailed
    │   └── IllConditioned · FleetFailed
    ├── ClaimLost
    ├── BaseNotLoadable · CatalogNotLoadable · BackupFailed · MigrationFailed
    ├── HostNotAllowed · CrossSite
    ├── BodyTooLarge · HeadTooLarge · NotHttp · UnsupportedMediaType · RouteNotFound · MethodNotAllowed
    ├── NotReady · TooManyBytes · TooManyOpenFiles · InternalError
    └── client only
        ├── Unreachable · TimedOut · BadAnswer
        └── JobFailed · JobCancelled

`code` is the stable name of an error, and it is the name of the class in snake case.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class BadRow(NamedTuple):
    """Row of a data set that cannot be used, and the reason."""

    row: int
    """From 0, without the header line."""
    column: str | None
    reason: str


class LoraplexError(Exception):
    """Something went wrong."""

    code: str = "error"
    """Name of the class in snake case, or the code of an error of a newer service that this client has no class for."""

    def __init_subclass__(cls) -> None:
        if "code" not in cls.__dict__:
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        row: int | None = None,
        given: object = None,
        expected: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        # What was wrong, in one sentence.
        self.detail = detail
        # The field of the request, such as `training.epochs`.
        self.field = field
        # The row of the inputs or of the data set, from 0.
        self.row = row
        self.given = given
        # What would be valid.
        self.expected = expected
        # HTTP status; None if the client itself raised the error, or if it is the error of a job.
        self.status = status
        # Id of the request in the log of the service.
        self.request_id = request_id
        # Headers of the answer, with names in lower case.
        self.headers: Mapping[str, str] = headers or {}
        # All members of the problem that the service sent (RFC 9457).
        self.members: Mapping[str, Any] = members or {}

    @property
    def title(self) -> str:
        """Return what happened, in words that are the same for all errors of the class."""
        return str(self.members.get("title") or (type(self).__doc__ or "").partition("\n")[0].rstrip("."))

    @property
    def served_by(self) -> str | None:
        """Return the name of the replica that answered, if the service is one of several."""
        return self.headers.get("x-served-by")

    @property
    def outcome_unknown(self) -> bool:
        """Return whether the change may have been stored in spite of the error: check before you repeat it."""
        return self.members.get("outcome") == "unknown"


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


class BadRows(InvalidInput):
    """Rows have values that cannot be trained on."""

    @property
    def rows(self) -> Sequence[BadRow]:
        """Up to 20 of them."""
        return [BadRow(bad["row"], bad["column"], bad["reason"]) for bad in self.members.get("rows", ())]


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


class NoStatistics(Conflict):
    """The version was trained without keep_statistics."""


class NoSuspects(Conflict):
    """The job has found no suspects: it has no classes, or has not ended."""


class DataGone(Conflict):
    """The rows that the job was trained on are no longer stored."""


class NameTaken(Conflict):
    """An adapter of that name exists."""


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


class QuotaExceeded(LoraplexError):
    """The tenant would have more than one of its limits allows."""


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

    @property
    def step(self) -> int | None:
        """In which it happened."""
        return self.members.get("step")


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


class BodyTooLarge(LoraplexError):
    """The body has more bytes than are accepted."""


class HeadTooLarge(LoraplexError):
    """The head of the request has more bytes than are accepted."""


class NotHttp(LoraplexError):
    """The bytes cannot be read as one HTTP/1.1 request."""


class UnsupportedMediaType(LoraplexError):
    """The body's content type is missing or not one that this call takes."""


class HostNotAllowed(LoraplexError):
    """The request is addressed to a host that is not this service's."""


class CrossSite(LoraplexError):
    """A web page of another host may not change or compute anything here."""


class RouteNotFound(LoraplexError):
    """There is nothing at this path."""


class MethodNotAllowed(LoraplexError):
    """This path does not take that method."""


class TooManyBytes(LoraplexError):
    """The request bodies in memory have more bytes than are accepted."""


class NotReady(LoraplexError):
    """The service is starting or stopping."""


class InternalError(LoraplexError):
    """Something went wrong in the service."""


class Unreachable(LoraplexError):
    """The service could not be reached, or the connection broke."""


class TimedOut(LoraplexError):
    """The time that the client had for it is up."""


class BadAnswer(LoraplexError):
    """The answer is not one that loraplex gives: something else answers at this address."""


class _JobEndedBadly(LoraplexError):
    def __init__(self, detail: str, *, job: Any) -> None:
        super().__init__(detail)
        # The job: a `Job` or an `AsyncJob`.
        self.job = job


class JobFailed(_JobEndedBadly):
    """The job failed: its `job.error`, which is this error's cause too, says why."""


class JobCancelled(_JobEndedBadly):
    """The job was cancelled."""


CLIENT_ONLY = (Unreachable, TimedOut, BadAnswer, _JobEndedBadly)
"""Errors that no answer of the service means."""
