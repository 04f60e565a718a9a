"""`GET /metrics`."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from app.http.dependencies import ServiceOf

router = APIRouter(tags=["health"])


_FORMATS = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}


@router.get(
    "/metrics",
    operation_id="show_metrics",
    summary="Show the metrics",
    response_class=Response,
    responses={200: {"description": "All metrics", "content": _FORMATS}},
)
async def metrics(service: ServiceOf, accept: Annotated[str, Header()] = "") -> Response:
    """What the service counts and measures, all of its processes together, as Prometheus reads it.

    In Prometheus' text format, or in OpenMetrics where `Accept` asks for that. docs/metrics-reference.md lists every
    metric.
    """
    service.metrics.gather()
    body, content_type = await asyncio.to_thread(service.scrape.answer, accept)
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
