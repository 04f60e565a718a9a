"""Start of API workers and trainers: what both open from the settings, and the warnings that they log."""

import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from adapters.catalog.catalog import Catalog
from adapters.catalog.counts import count_live_by_base, count_queued_by_base
from adapters.errors import LoraplexError
from adapters.jobs.queue import JobQueue
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.storage.database import Database
from adapters.storage.store_identity import CHECKPOINTS
from adapters.training.execution.fit_client import ChildFitter, Fitter
from adapters.training.gradient.checkpoint import CheckpointFolder
from app.settings import LOCAL, RAY_CLIENT, Settings

if TYPE_CHECKING:
    from adapters.storage.postgres_database import PostgresDatabase
    from app.observability.tracing import Tracing

_MAX_LISTED = 5
_SECONDS_BEFORE_SWEEP = 2.0

log = logging.getLogger(__name__)


def load_base(settings: Settings) -> BaseLayer:
    """Load the base layer that the settings name; raise `BaseNotLoadable`."""
    return load_base_layer(**base_arguments(settings))


def base_arguments(settings: Settings) -> dict[str, str]:
    """Return the arguments of `load_base_layer`, which the fit process calls too."""
    arguments = {
        "source": settings.base,
        "weight_key": settings.base_weight_key,
        "bias_key": settings.base_bias_key,
        "labels": settings.base_labels,
        "device": settings.device,
        "dtype": settings.dtype,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def open_fitter(settings: Settings) -> Fitter:
    """Return what runs the fits: a child process, or tasks of a Ray cluster. Nothing is started yet."""
    if settings.executor == LOCAL:
        return open_child_fitter(settings)
    # A cluster of this machine reports nothing to Ray's authors, and takes no request without a token that only its
    # processes have. A cluster elsewhere has settings of its own.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    is_client = settings.executor.startswith(RAY_CLIENT)
    if is_client:
        # A call blocks for as long as Ray Client tries to connect again, and a trainer has a lease to keep.
        os.environ.setdefault("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "5")
    else:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    record_factory = logging.getLogRecordFactory()
    # The extra `ray` installs what this needs.
    from adapters.training.execution.fit_task import FitProcess
    from adapters.training.execution.ray_fitter import RayFitter

    # The import of ray adds a member to the records of every logger.
    logging.setLogRecordFactory(record_factory)
    process = FitProcess(
        base=base_arguments(settings),
        blobs=settings.blob_location,
        threads=settings.trainer_threads,
        memory_bytes=settings.trainer_memory_bytes,
        stopped_seconds=settings.lease_seconds,
    )
    return RayFitter(process, address=settings.executor if is_client else None, gpus=settings.ray_gpus)


def open_child_fitter(settings: Settings) -> ChildFitter:
    """Return the client of a fit process, which is not started yet."""
    return ChildFitter(
        base_arguments(settings),
        blobs=settings.blob_location,
        threads=settings.trainer_threads,
        memory_bytes=settings.trainer_memory_bytes,
        stopped_seconds=settings.lease_seconds,
    )


def open_catalog(settings: Settings, *, migrates: bool = True) -> Catalog:
    """Open the catalogue of the data folder, or that of `DATABASE_URL`, whose tables are not upgraded on request.

    Raises `CatalogNotLoadable` and `CatalogUnavailable`.
    """
    return Catalog(
        settings.data_dir,
        now=time.time,
        blobs=settings.blob_location,
        trash_days=settings.trash_days,
        database=open_database(settings, migrates=migrates),
    )


def open_checkpoints(catalog: Catalog, settings: Settings) -> CheckpointFolder:
    """Return the checkpoints of fits, with copies in the bucket if there is one."""
    folder = settings.data_dir / CHECKPOINTS
    if settings.blob_url is None:
        return CheckpointFolder(folder)
    from adapters.storage.object_blobs import ObjectBlobs
    from adapters.training.execution.checkpoint_objects import CheckpointObjects

    assert isinstance(catalog.blobs, ObjectBlobs)
    return CheckpointObjects(folder, catalog.blobs)


def open_database(settings: Settings, *, migrates: bool = True) -> "PostgresDatabase | None":
    """Open the database of `DATABASE_URL`; None if the catalogue is in the data folder."""
    if settings.database_url is None:
        return None
    # The driver is an optional dependency.
    from adapters.storage.postgres_database import PostgresDatabase

    return PostgresDatabase(settings.database_url, max_stale_seconds=settings.max_stale_seconds, migrates=migrates)


def open_queue(catalog: Catalog, settings: Settings) -> JobQueue:
    """Return the job queue in the catalogue's database."""
    return JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=settings.lease_seconds)


def sweep_in_background(catalog: Catalog) -> None:
    """Sweep what an earlier run has left in a thread, because it takes seconds if there are many blobs."""

    def sweep() -> None:
        # The processes of a service start one after the other. The sweep begins after all have opened the catalogue,
        # so that one is enough.
        time.sleep(_SECONDS_BEFORE_SWEEP)
        try:
            catalog.sweep_once()
        except (LoraplexError, OSError) as error:
            log.warning("files that an earlier run left are not removed now: %s", error)

    threading.Thread(target=sweep, name="sweep", daemon=True).start()


def warn_in_background(*warnings: Callable[[], None]) -> None:
    """Log warnings from a thread, because reading a million adapters takes seconds."""

    def warn() -> None:
        try:
            for warning in warnings:
                warning()
        except Exception as error:
            log.warning("whether the data folder was made for this base layer could not be checked: %s", error)

    threading.Thread(target=warn, name="start-warnings", daemon=True).start()


def warn_about_adapters(database: Database, base: BaseLayer, feature_space: str | None) -> None:
    """Log how many live versions were made for another base layer or feature space; raise `CatalogBusy`."""
    by_base: Counter[str] = Counter()
    by_space: Counter[str] = Counter()
    for (fingerprint, space), adapters in count_live_by_base(database).items():
        if fingerprint != base.fingerprint:
            by_base[fingerprint] += adapters
        elif space is not None and space != feature_space:
            by_space[repr(space)] += adapters
    advice = "Such adapters answer 409 %s: start the service with the one they were made for (%s), or make them again"
    _warn(
        *("live adapter was", "live adapters were", "made for another base layer", base.fingerprint, by_base),
        advice % ("base_mismatch", "LORAPLEX_BASE"),
    )
    _warn(
        *("live adapter was", "live adapters were", "made for another feature space", repr(feature_space), by_space),
        advice % ("feature_space_mismatch", "LORAPLEX_FEATURE_SPACE"),
    )


def warn_about_jobs(database: Database, base: BaseLayer) -> None:
    """Log how many queued jobs are for another base layer; raise `CatalogBusy`."""
    by_base = Counter(count_queued_by_base(database))
    del by_base[base.fingerprint]
    advice = "Such jobs wait for a trainer that has it, or until they are cancelled"
    _warn("queued job is", "queued jobs are", "for another base layer", base.fingerprint, by_base, advice)


def _warn(one: str, many: str, purpose: str, ours: str, counts: "Counter[str]", advice: str) -> None:
    """Log the sum of counts, the largest of them with their names, and the sum of the others.

    `one` and `many` are the subject with its verb, in the singular and in the plural.
    """
    if not counts:
        return
    largest = counts.most_common(_MAX_LISTED)
    listed = ", ".join(f"{total} for {name}" for name, total in largest)
    rest = counts.total() - sum(total for _, total in largest)
    others = f" and {rest} for others" if rest else ""
    subject = f"{counts.total()} {one if counts.total() == 1 else many} {purpose}"
    log.warning("%s than this service's, %s: %s%s. %s", subject, ours, listed, others, advice)


def open_tracing(settings: Settings, *, process: str) -> "Tracing | None":
    """Return what records this process's spans if the setting TRACES is on, otherwise None.

    `process` names the process among those of the service.
    """
    if not settings.traces:
        return None
    # OpenTelemetry's SDK takes long to import, and most services do not use it.
    from app.observability.tracing import Tracing

    return Tracing(process)
