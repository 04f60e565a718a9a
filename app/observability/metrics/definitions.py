"""Every metric: its name, its labels, and what it means. No label names an adapter, a tenant, a job or a data set."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

_REQUEST_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_SECONDS = (0.00005, 0.0001, *_REQUEST_SECONDS[:-2])
_PUBLISH_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TRAINING_SECONDS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0)
_ADAPTERS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


# Before the name of every metric.
_PREFIX = "loraplex_"


class Kind(StrEnum):
    """Kind of a metric."""

    COUNTER = "counter"
    """Only increases; the sum over all processes, also those that have ended."""
    GAUGE = "gauge"
    """Current value; the sum over live processes, unless a label names the process."""
    HISTOGRAM = "histogram"
    """Observations in buckets; summed as counters are."""


@dataclass(frozen=True, slots=True, eq=False)
class Definition:
    """One metric. Definitions are compared by identity, because they are keys of every value."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Largest values of a histogram's buckets. A bucket without a bound follows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a value: a number, or for a histogram a number for each bucket and one for the sum."""
        return (len(self.bounds) + 2,) if self.kind is Kind.HISTOGRAM else ()


def _counter(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(_PREFIX + name, Kind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Definition:
    return Definition(_PREFIX + name, Kind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str, bounds: tuple[float, ...], *labels: str) -> Definition:
    return Definition(_PREFIX + name, Kind.HISTOGRAM, meaning, labels, bounds)


REQUESTS = _counter("requests_total", "Answered requests, by the template of the route.", "route", "method", "status")
REQUEST_SECONDS = _histogram(
    "request_seconds", "Time from the end of a request's head to its answer.", _REQUEST_SECONDS, "route"
)
FAST_PATH_FALLBACKS = _counter(
    "fast_path_fallbacks_total",
    "Small predict and infer requests that the fast path left to ASGI, by reason.",
    "reason",
)
LIMITED = _counter(
    "limited_requests_total",
    "Requests that a limit of their tenant refused, by error: rate_limited or quota_exceeded.",
    "code",
)
QUEUE_SECONDS = _histogram(
    "queue_seconds", "Time that a predict request waited for its batch to start.", _BATCH_SECONDS
)
FORWARD_SECONDS = _histogram("forward_seconds", "Time to compute one batch.", _BATCH_SECONDS)
BATCH_ROWS = _histogram("batch_rows", "Rows in one batch.", _ROWS)
BATCH_ADAPTERS = _histogram("batch_adapters", "Different adapters in one batch, without the base layer.", _ADAPTERS)
QUEUE_ROWS = _gauge("queue_rows", "Rows of predict requests that are not answered yet.")
QUEUE_ROWS_LIMIT = _gauge(
    "queue_rows_limit", "Maximum number of waiting rows, in all workers; beyond it, requests are 429."
)
RESIDENCY_HITS = _counter("residency_hits_total", "Requested adapters that were in the cache.")
RESIDENCY_MISSES = _counter("residency_misses_total", "Requested adapters that were not in the cache.")
RESIDENCY_LOADS = _counter("residency_loads_total", "Adapters loaded from disk into the cache.")
RESIDENCY_EVICTIONS = _counter("residency_evictions_total", "Adapters evicted from the cache.")
RESIDENCY_COUNTERS = (RESIDENCY_HITS, RESIDENCY_MISSES, RESIDENCY_LOADS, RESIDENCY_EVICTIONS)
RESIDENT_BYTES = _gauge("resident_bytes", "Bytes of cached adapters, in all workers.")
RESIDENT_ADAPTERS = _gauge("resident_adapters", "Cached adapters, in all workers.")
TRAINING_SECONDS = _histogram(
    "training_seconds",
    "Time of a job on one trainer, from its claim to its end there.",
    _TRAINING_SECONDS,
    "method",
    "status",
)
PUBLISH_SECONDS = _histogram(
    "publish_seconds", "Time from the bytes of adapters to their durable versions.", _PUBLISH_SECONDS, "source"
)
PUBLISHED = _counter("adapters_published_total", "Published adapters.", "source")
FITS_DIED = _counter("fits_died_total", "Fit processes that died during a job.")
RESUMED = _counter("checkpoints_resumed_total", "Trainings that continued from a checkpoint.")
STARTS = _counter("process_starts_total", "Starts of this process: one more than its restarts.", "process")
RESIDENT_MEMORY = _gauge("process_resident_memory_bytes", "Resident memory of the process.", "process")
CPU_SECONDS = _counter("process_cpu_seconds_total", "CPU time since the process started.", "process")
OPEN_FDS = _gauge("process_open_fds", "Open file descriptors.", "process")
START_TIME = _gauge("process_start_time_seconds", "Start time of the process, in seconds since the epoch.", "process")

PROCESSES = _gauge("processes", "Running processes, by role.", "role")
BUILD_INFO = _gauge("build_info", "1, with the version that runs.", "version")
BASE_INFO = _gauge(
    "base_info",
    "1, with the shape, type and device of the base layer.",
    "in_features",
    "out_features",
    "dtype",
    "device",
)
CATALOG_UP = _gauge("catalog_up", "1 if the catalogue can be read, otherwise 0; its counts are then absent.")
JOBS = _gauge("jobs", "Jobs in the catalogue, by status.", "status")
OLDEST_QUEUED = _gauge("oldest_queued_job_seconds", "Wait of the oldest queued job for this base layer; 0 for none.")
QUEUED_JOBS_LIMIT = _gauge("queued_jobs_limit", "Maximum number of queued jobs; beyond it, requests are 429.")
ADAPTERS = _gauge("adapters", "Adapters in the catalogue.")
VERSIONS = _gauge("versions", "Versions of all adapters.")
VERSION_BYTES = _gauge("version_bytes", "Bytes of all versions, on disk.")
TRASHED_BYTES = _gauge("trashed_bytes", "Bytes of deleted adapters that can be restored, on disk.")
DATASETS = _gauge("datasets", "Data sets in the catalogue.")
DATASET_BYTES = _gauge("dataset_bytes", "Bytes of all data sets' versions, on disk.")
DISK_FREE = _gauge("disk_free_bytes", "Free bytes on the file system of DATA_DIR.")
DISK_SIZE = _gauge("disk_size_bytes", "Size of the file system of DATA_DIR.")

SCRUB_DAMAGED = _gauge("scrub_damaged_blobs", "Blobs that were missing or damaged when the scrub last read them.")
SCRUB_FINISHED = _gauge(
    "scrub_finished_timestamp_seconds",
    "End of the last complete scrub, in seconds since the epoch; 0 before the first.",
)

# All of them by name, in the order in which `/metrics` shows them.
DEFINITIONS: Mapping[str, Definition] = MappingProxyType(
    {value.name: value for value in list(globals().values()) if isinstance(value, Definition)}
)
