"""Page `/`: the state of the service, its base layer and its newest jobs."""

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from app.http.endpoints import ENDPOINTS
from app.http.errors import RouteNotFound
from app.observability.metrics import definitions as d
from app.observability.metrics.values import sum_values
from app.service import Service, ServiceOf
from app.web.pages.rendering import page, page_router, render

_NEWEST_JOBS = 6
_PREDICTIONS = {(endpoint.path,) for endpoint in ENDPOINTS if endpoint.asgi is not None}
router = page_router()


@page(router, "/")
def show_overview(request: Request, service: ServiceOf) -> Response:
    """Show the overview; a refresh renders only its figures."""
    census = service.catalog_figures.census()
    return render(
        request,
        "overview.html",
        part="fragments/figures.html",
        base=service.base,
        feature_space=service.settings.feature_space,
        # Rendering the page has already read the catalogue.
        not_ready="It is stopping." if service.draining else None,
        census=census,
        first_steps=census is not None and not census.adapters,
        jobs=service.queue.list(limit=_NEWEST_JOBS),
        trainers=service.settings.trainers,
    )


@router.get("/ui/throughput", response_model=None)
async def show_throughput(service: ServiceOf) -> Response:
    """Return the counters of predictions in all workers. The page shows the difference between two calls."""
    service.metrics.collect()
    return JSONResponse(await asyncio.to_thread(_predictions, service), headers={"Cache-Control": "no-store"})


@page(router, "/ui/{path:path}")
def show_missing(path: str) -> None:
    """Answer a path without a page with a page, for people who follow a link."""
    raise RouteNotFound(f"there is nothing at /ui/{path[:100]}")


def _predictions(service: Service) -> dict[str, Any]:
    figures = sum_values(each.figures for each in service.metrics.all_processes())
    rows, counts = 0.0, [0] * (len(d.REQUEST_SECONDS.bounds) + 1)
    for metric, labels, tally in figures.tallies():
        if metric is d.BATCH_ROWS:
            rows += tally.total
        elif metric is d.REQUEST_SECONDS and labels in _PREDICTIONS:
            counts = [count + more for count, more in zip(counts, tally.counts.tolist(), strict=True)]
    return {"at": time.monotonic(), "rows": rows, "bounds": d.REQUEST_SECONDS.bounds, "counts": counts}
