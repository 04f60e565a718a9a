"""Page `/`: the state of the service, its base layer and its newest jobs."""

import asyncio
import time
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.access.keys import Scope
from app.http.authentication import CallerOf
from app.http.endpoints import ENDPOINTS
from app.http.errors import RouteNotFound
from app.observability.metrics import definitions as d
from app.observability.metrics.metric_values import sum_values
from app.service import Service, ServiceOf
from app.web.pages.rendering import PageRouter, render

_NEWEST_JOBS = 6
_PREDICTIONS = {(endpoint.path,) for endpoint in ENDPOINTS if endpoint.asgi is not None}
router = PageRouter()


@router.page("/")
def show_overview(request: Request, service: ServiceOf, caller: CallerOf) -> Response:
    """Show the overview; a refresh renders only its figures."""
    census = service.catalog_figures.census(caller.tenant)
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
        jobs=service.queue.list(tenant=caller.tenant, limit=_NEWEST_JOBS),
        trainers=service.settings.trainers,
        shows_traffic=caller.may(Scope.METRICS),
    )


@router.get("/ui/throughput", response_model=None)
async def show_throughput(service: ServiceOf, caller: CallerOf) -> Response:
    """Return the counters of predictions of all tenants in all workers. The page shows how they change."""
    caller.require(Scope.METRICS)
    service.metrics.collect()
    return JSONResponse(await asyncio.to_thread(_predictions, service), headers={"Cache-Control": "no-store"})


@router.page("/ui/{path:path}")
def show_missing(path: str) -> None:
    """Answer a path without a page with a page, for people who follow a link."""
    raise RouteNotFound(f"there is nothing at /ui/{path[:100]}")


def _predictions(service: Service) -> dict[str, Any]:
    values = sum_values(process.values for process in service.metrics.all_processes())
    rows, counts_B = 0.0, np.zeros(len(d.REQUEST_SECONDS.bounds) + 1)
    for (metric, labels), value in values.items():
        if metric is d.BATCH_ROWS:
            rows += np.asarray(value)[-1]
        elif metric is d.REQUEST_SECONDS and labels in _PREDICTIONS:
            counts_B += np.asarray(value)[:-1]
    return {"at": time.monotonic(), "rows": rows, "bounds": d.REQUEST_SECONDS.bounds, "counts": counts_B.tolist()}
