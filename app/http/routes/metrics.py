"""`GET /metrics`."""

import asyncio
from typing import Annotated

from fastapi import Header
from starlette.responses import Response

from app.http.dependencies import ServiceOf


async def metrics(service: ServiceOf, accept: Annotated[str, Header()] = "") -> Response:
    """What the service counts and measures, all of its processes together, as Prometheus reads it.

    In Prometheus' text format, or in OpenMetrics where `Accept` asks for that. docs/metrics-reference.md lists every
    metric.
    """
    service.metrics.gather()
    body, content_type = await asyncio.to_thread(service.scrape.answer, accept)
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
