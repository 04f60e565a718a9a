"""Everything that can go wrong: the service's own tree, by the same names and codes, and what only a client meets.

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
    │   └── DatasetNotFound · JobNotFound
    ├── Conflict
    │   ├── BaseMismatch · FeatureSpaceMismatch
    │   └── JobEnded · JobNotEnded · NoStatistics
    ├── PreconditionFailed
    ├── QueueFull · RequestTimeout
    ├── CatalogBusy
    ├── StorageFull · StorageFailed · TooManyOpenFiles
    ├── BlobCorrupt
    ├── TrainingFailed
    │   ├── Diverged · WorkerDied · AdapterDeleted · BaseChanged · OutOfMemory · FitFailed
    │   └── IllConditioned · FleetFailed
    ├── ClaimLost
    ├── BaseNotLoadable · CatalogNotLoadable
    ├── HostNotAllowed · CrossSite
    ├── BodyTooLarge · HeadTooLarge · NotHttp · UnsupportedMediaType · RouteNotFound · MethodNotAllowed
    ├── NotReady · TooManyBytes · TooManyOpenFiles · InternalError
    └── of the client alone
        ├── Unreachable · TimedOut · BadAnswer
        └── JobFailed · JobCancelled

`code` is an error's stable name: match on it, or on the class.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class BadRow(NamedTuple):
    """One row of a data set that cannot be used, and why."""

    row: int
    """From 0, the header line not counted."""
    column: str | None
    reason: str


class LoraplexError(Exception):
    """Something went wrong"""

    code: str = "error"
    """The class's own; of a newer service's error that this client does not know, the one that the service gave."""

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
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        """What was wrong, in a sentence."""
        self.field = field
        """What in the request it is about, such as `training.epochs`."""
        self.row = row
        """Of the inputs or the data set, from 0."""
        self.given = given
        self.expected = expected
        """What would be right."""
        self.status = status
        """Of the answer; None where no answer said so: found here, or told in a job's `error`."""
        self.request_id = request_id
        """By which the service's log knows the request."""
        self.members: Mapping[str, Any] = members or {}
        """All members of the problem as the service sent them (RFC 9457)."""

    @property
    def title(self) -> str:
        """What happened, the same words for all errors of the class."""
        return str(self.members.get("title") or (type(self).__doc__ or "").partition("\n")[0])

    @property
    def outcome_unknown(self) -> bool:
        """Whether the change may have been stored in spite of the error: look before you repeat it."""
        return self.members.get("outcome") == "unknown"


class InvalidInput(LoraplexError):
    """The request has a value that cannot be used"""

    code = "invalid_input"


class NotJson(InvalidInput):
    """The text is not JSON"""

    code = "not_json"


class DuplicateKey(InvalidInput):
    """A JSON object has the same key twice"""

    code = "duplicate_key"


class MissingField(InvalidInput):
    """A field that is needed was left out"""

    code = "missing_field"


class UnknownField(InvalidInput):
    """A field is not one that is known here"""

    code = "unknown_field"


class IgnoredField(InvalidInput):
    """A field was given that the chosen method would ignore"""

    code = "ignored_field"


class WrongType(InvalidInput):
    """A value is of the wrong type"""

    code = "wrong_type"


class OutOfRange(InvalidInput):
    """A value is outside its bounds"""

    code = "out_of_range"


class WrongShape(InvalidInput):
    """An array has the wrong shape"""

    code = "wrong_shape"


class NotFinite(InvalidInput):
    """A number is not finite as float32"""

    code = "not_finite"


class RankTooLarge(InvalidInput):
    """The rank is above what this service accepts"""

    code = "rank_too_large"


class InvalidName(InvalidInput):
    """A name does not follow the rule for names"""

    code = "invalid_name"


class InvalidReference(InvalidInput):
    """A reference to an adapter is malformed"""

    code = "invalid_reference"


class InvalidCursor(InvalidInput):
    """A cursor was not issued by this service for this list"""

    code = "invalid_cursor"


class InvalidCombination(InvalidInput):
    """Two values are fine alone and cannot be used together"""

    code = "invalid_combination"


class InvalidUpload(InvalidInput):
    """An uploaded adapter cannot be read"""

    code = "invalid_upload"


class InvalidSafetensors(InvalidUpload):
    """A safetensors file is malformed or outside its limits"""

    code = "invalid_safetensors"


class InvalidArchive(InvalidUpload):
    """A zip archive is malformed, unsafe or outside its limits"""

    code = "invalid_archive"


class PeftUnsupported(InvalidUpload):
    """A PEFT adapter uses a feature that cannot be served exactly"""

    code = "peft_unsupported"


class InvalidDataset(InvalidUpload):
    """An uploaded data set cannot be read"""

    code = "invalid_dataset"


class BadRows(InvalidInput):
    """Rows have values that cannot be trained on"""

    code = "bad_rows"

    @property
    def rows(self) -> Sequence[BadRow]:
        """Up to 20 of them."""
        return [BadRow(bad["row"], bad["column"], bad["reason"]) for bad in self.members.get("rows", ())]


class EstimateTooLarge(InvalidInput):
    """The training would need more memory than a trainer has"""

    code = "estimate_too_large"


class OutputNotFinite(InvalidInput):
    """The layer's answer to a row is not finite"""

    code = "output_not_finite"


class NotFound(LoraplexError):
    """Nothing has that name"""

    code = "not_found"


class AdapterNotFound(NotFound):
    """There is no adapter of that name"""

    code = "adapter_not_found"


class VersionNotFound(NotFound):
    """There is no such version"""

    code = "version_not_found"


class AliasNotFound(NotFound):
    """There is no such alias"""

    code = "alias_not_found"


class AdapterNotLive(NotFound):
    """The adapter has versions, and none of them is live"""

    code = "adapter_not_live"


class DatasetNotFound(NotFound):
    """There is no data set of that name"""

    code = "dataset_not_found"


class JobNotFound(NotFound):
    """There is no job of that id"""

    code = "job_not_found"


class Conflict(LoraplexError):
    """The request does not fit the state of what it names"""

    code = "conflict"


class BaseMismatch(Conflict):
    """The adapter was made for another base layer"""

    code = "base_mismatch"


class FeatureSpaceMismatch(Conflict):
    """The inputs come from another encoder than the one that is served"""

    code = "feature_space_mismatch"


class JobEnded(Conflict):
    """The job has ended already"""

    code = "job_ended"


class JobNotEnded(Conflict):
    """The job has not ended yet"""

    code = "job_not_ended"


class NoStatistics(Conflict):
    """The version was trained without keep_statistics"""

    code = "no_statistics"


class PreconditionFailed(LoraplexError):
    """A condition in the request's headers does not hold"""

    code = "precondition_failed"


class QueueFull(LoraplexError):
    """The queue is full"""

    code = "queue_full"


class RequestTimeout(LoraplexError):
    """The request's time was up before it was answered"""

    code = "request_timeout"


class CatalogBusy(LoraplexError):
    """The catalogue is locked by another process"""

    code = "catalog_busy"


class StorageFull(LoraplexError):
    """The disk is full"""

    code = "storage_full"


class StorageFailed(LoraplexError):
    """The disk failed, or the catalogue on it is damaged"""

    code = "storage_failed"


class TooManyOpenFiles(LoraplexError):
    """The process has no file descriptors left for now"""

    code = "too_many_open_files"


class BlobCorrupt(LoraplexError):
    """A stored file is missing or no longer has the bytes that were stored"""

    code = "blob_corrupt"


class TrainingFailed(LoraplexError):
    """The training did not end in an adapter"""

    code = "training_failed"


class Diverged(TrainingFailed):
    """The loss or the factors stopped being finite"""

    code = "diverged"

    @property
    def step(self) -> int | None:
        """In which it happened."""
        return self.members.get("step")


class WorkerDied(TrainingFailed):
    """The process that trained died on three attempts"""

    code = "worker_died"


class AdapterDeleted(TrainingFailed):
    """The adapter was deleted after the job was queued"""

    code = "adapter_deleted"


class BaseChanged(TrainingFailed):
    """The base layer is no longer the one that the job was queued for"""

    code = "base_changed"


class OutOfMemory(TrainingFailed):
    """The training needs more memory than there is"""

    code = "out_of_memory"


class FitFailed(TrainingFailed):
    """The training stopped on an error of its own"""

    code = "fit_failed"


class IllConditioned(TrainingFailed):
    """What would be left after forgetting is lost in rounding"""

    code = "ill_conditioned"


class FleetFailed(TrainingFailed):
    """No group of the fleet could be trained"""

    code = "fleet_failed"


class ClaimLost(LoraplexError):
    """The job is no longer this trainer's: it was cancelled, or its lease ran out"""

    code = "claim_lost"


class BaseNotLoadable(LoraplexError):
    """The base layer cannot be loaded"""

    code = "base_not_loadable"


class CatalogNotLoadable(LoraplexError):
    """The catalogue cannot be opened"""

    code = "catalog_not_loadable"


class BodyTooLarge(LoraplexError):
    """The body has more bytes than are accepted"""

    code = "body_too_large"


class HeadTooLarge(LoraplexError):
    """The head of the request has more bytes than are accepted"""

    code = "head_too_large"


class NotHttp(LoraplexError):
    """The bytes cannot be read as one HTTP/1.1 request"""

    code = "not_http"


class UnsupportedMediaType(LoraplexError):
    """The body's content type is missing or not one that this call takes"""

    code = "unsupported_media_type"


class HostNotAllowed(LoraplexError):
    """The request is addressed to a host that is not this service's"""

    code = "host_not_allowed"


class CrossSite(LoraplexError):
    """A web page of another host may not change or compute anything here"""

    code = "cross_site"


class RouteNotFound(LoraplexError):
    """There is nothing at this path"""

    code = "route_not_found"


class MethodNotAllowed(LoraplexError):
    """This path does not take that method"""

    code = "method_not_allowed"


class TooManyBytes(LoraplexError):
    """The request bodies in memory have more bytes than are accepted"""

    code = "too_many_bytes"


class NotReady(LoraplexError):
    """The service is starting or stopping"""

    code = "not_ready"


class InternalError(LoraplexError):
    """Something went wrong in the service"""

    code = "internal_error"


class Unreachable(LoraplexError):
    """The service could not be reached, or the connection broke"""

    code = "unreachable"


class TimedOut(LoraplexError):
    """The time that the client had for it is up"""

    code = "timed_out"


class BadAnswer(LoraplexError):
    """The answer is not one that loraplex gives: something else answers at this address"""

    code = "bad_answer"


class _JobEndedBadly(LoraplexError):
    def __init__(self, detail: str, *, job: Any) -> None:
        super().__init__(detail)
        self.job = job
        """The job as it ended: a `Job`, or an `AsyncJob`."""


class JobFailed(_JobEndedBadly):
    """The job failed: its `job.error`, which is this error's cause too, says why"""

    code = "job_failed"


class JobCancelled(_JobEndedBadly):
    """The job was cancelled"""

    code = "job_cancelled"


OF_THE_CLIENT = (Unreachable, TimedOut, BadAnswer, _JobEndedBadly)
"""What no answer can say."""
