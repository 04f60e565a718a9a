"""`/base`, `/healthz`, `/readyz` and `/metrics`: the state of the service."""

import asyncio
from typing import Annotated

from fastapi import Header
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from app.http.dependencies import ServiceOf
from app.http.errors import NotReady
from app.http.schemas.adapters import BaseBody


def show_base(service: ServiceOf) -> BaseBody:
    """The frozen layer that every adapter adds to: its shape, fingerprint and feature space."""
    return BaseBody.of(service.base, service.settings.feature_space)


async def healthz() -> dict[str, str]:
    """Alive: the process answers. Touches nothing else."""
    return {"status": "alive"}


async def readyz(service: ServiceOf) -> dict[str, str]:
    """Able to serve: the base is loaded, the catalogue can be read, and the service is not stopping."""
    if service.draining:
        raise NotReady("the service is stopping")
    try:
        await asyncio.to_thread(service.catalog.revision)
    except (SQLAlchemyError, OSError) as error:
        raise NotReady("the catalogue cannot be read") from error
    return {"status": "ready"}


async def metrics(service: ServiceOf, accept: Annotated[str, Header()] = "") -> Response:
    """What the service counts and measures, all of its processes together, as Prometheus reads it.

    In Prometheus' text format, or in OpenMetrics where `Accept` asks for that. docs/metrics-reference.md lists every
    metric.
    """
    service.metrics.collect()
    body, content_type = await asyncio.to_thread(service.scrape.answer, accept)
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
