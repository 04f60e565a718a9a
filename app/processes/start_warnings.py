"""Warnings at start: adapters that this service cannot answer with, and queued jobs that its trainers do not take."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping

from adapters.catalog.counts import count_live_by_base, count_queued_by_base
from adapters.lora.base_layer import BaseLayer
from adapters.storage.database import SqliteDatabase

_MOST_LISTED = 5

log = logging.getLogger(__name__)


def warn_in_background(database: SqliteDatabase, base: BaseLayer, feature_space: str | None) -> None:
    """Log both warnings from a thread: to read a million adapters takes seconds, in which requests are answered."""

    def warn() -> None:
        try:
            warn_about_adapters(database, base, feature_space)
            warn_about_jobs(database, base)
        except Exception as error:
            log.warning("whether the data folder was made for this base layer could not be checked: %s", error)

    threading.Thread(target=warn, name="start-warnings", daemon=True).start()


def warn_about_adapters(database: SqliteDatabase, base: BaseLayer, feature_space: str | None) -> None:
    """Log how many live versions were made for another base layer or feature space. Raises `CatalogBusy`."""
    by_base: Counter[str] = Counter()
    by_space: Counter[str] = Counter()
    for (fingerprint, space), adapters in count_live_by_base(database).items():
        if fingerprint != base.fingerprint:
            by_base[fingerprint] += adapters
        elif space is not None and space != feature_space:
            by_space[repr(space)] += adapters
    if by_base:
        log.warning(
            "%s made for another base layer than this service's, %s, and answer 409 base_mismatch: %s. Start the "
            "service with the base layer that they were made for (LORAPLEX_BASE), or make them again",
            _count(by_base, "live adapter was", "live adapters were"),
            base.fingerprint,
            _listed(by_base),
        )
    if by_space:
        log.warning(
            "%s made for another feature space than this service's, %r, and answer 409 feature_space_mismatch: %s. "
            "Start the service with the feature space that they were made for (LORAPLEX_FEATURE_SPACE), or make them "
            "again",
            _count(by_space, "live adapter was", "live adapters were"),
            feature_space,
            _listed(by_space),
        )


def warn_about_jobs(database: SqliteDatabase, base: BaseLayer) -> None:
    """Log how many queued jobs are for another base layer. Raises `CatalogBusy`."""
    by_base = Counter(
        {other: jobs for other, jobs in count_queued_by_base(database).items() if other != base.fingerprint}
    )
    if by_base:
        log.warning(
            "%s for another base layer than this service's, %s: %s. They wait for a trainer that has it, or until "
            "they are cancelled",
            _count(by_base, "queued job is", "queued jobs are"),
            base.fingerprint,
            _listed(by_base),
        )


def _count(counts: Mapping[str, int], one: str, many: str) -> str:
    total = sum(counts.values())
    return f"{total} {one if total == 1 else many}"


def _listed(counts: "Counter[str]") -> str:
    """The largest counts, each with what it is of."""
    parts = [f"{total} for {name}" for name, total in counts.most_common(_MOST_LISTED)]
    rest = sum(counts.values()) - sum(total for _, total in counts.most_common(_MOST_LISTED))
    return ", ".join(parts) + (f" and {rest} for others" if rest else "")
