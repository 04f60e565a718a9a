"""One answer of `/metrics`: all processes together, the catalogue, and what runs here."""

from importlib.metadata import PackageNotFoundError, version

from adapters.lora.base_layer import BaseLayer
from app.observability.metrics import definitions as d
from app.observability.metrics.catalog import CatalogFigures
from app.observability.metrics.exposition import exposition
from app.observability.metrics.figures import Figures, sum_of
from app.observability.metrics.recording import Metrics

_ROLES = ("worker", "trainer")


class Scrape:
    """What answers for one worker, and says the same as any other worker would."""

    def __init__(self, metrics: Metrics, catalog: CatalogFigures, base: BaseLayer, *, max_queued_jobs: int) -> None:
        self._metrics, self._catalog = metrics, catalog
        self._fixed = Figures()
        self._fixed.put(d.QUEUED_JOBS_LIMIT, max_queued_jobs)
        self._fixed.put(d.BUILD_INFO, 1, _version())
        dtype = str(base.weight_OI.dtype).removeprefix("torch.")
        self._fixed.put(d.BASE_INFO, 1, str(base.in_features), str(base.out_features), dtype, str(base.device))

    def answer(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type for a request with this `Accept`. Reads files and SQL: for a thread."""
        everyone = self._metrics.everyone()
        here = Figures()
        for role in _ROLES:
            here.put(d.PROCESSES, sum(each.lives and each.name.rpartition("-")[0] == role for each in everyone), role)
        self._catalog.note(here)
        return exposition(sum_of([*(each.figures for each in everyone), here, self._fixed]), accept)


def _version() -> str:
    try:
        return version("loraplex-server")
    except PackageNotFoundError:
        return "unknown"
