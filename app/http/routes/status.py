"""`/base`, `/healthz`, `/readyz` and `/metrics`: the state of the service."""

import asyncio
from typing import Annotated

from fastapi import Header
from starlette.responses import Response

from app.http.errors import NotReady
from app.http.schemas.adapters import BaseBody
from app.service import ServiceOf


def show_base(service: ServiceOf) -> BaseBody:
    """Show the frozen layer: its shape, fingerprint, feature space and labels."""
    base = service.base
    shown = ("in_features", "out_features", "dtype", "fingerprint", "labels", "source")
    own = {name: getattr(base, name) for name in shown}
    feature_space = service.settings.feature_space
    return BaseBody(**own, bias=base.bias_O is not None, device=str(base.device), feature_space=feature_space)


async def check_alive() -> dict[str, str]:
    """Answer without using any other part of the service."""
    return {"status": "alive"}


async def check_ready(service: ServiceOf) -> dict[str, str | list[str]]:
    """Check that the base layer is loaded, the catalogue can be read and the service is not draining.

    `warnings` says what may lose acknowledged changes, such as settings of PostgreSQL.
    """
    if service.draining:
        raise NotReady("the service is stopping")
    reading = service.resolver.watch.begin_read()
    if reading is not None:
        # A service that may answer by an older revision is ready.
        await asyncio.shield(reading)
    elif not await asyncio.to_thread(service.catalog.is_readable):
        raise NotReady("the catalogue cannot be read")
    warnings = await asyncio.to_thread(service.durability.warnings)
    return {"status": "ready", **({"warnings": warnings} if warnings else {})}


async def show_metrics(service: ServiceOf, accept: Annotated[str, Header()] = "") -> Response:
    """Show the metrics of all processes together.

    The format is Prometheus' text format, or OpenMetrics if `Accept` prefers it. docs/metrics-reference.md lists every
    metric.
    """
    service.metrics.collect()
    body, content_type = await asyncio.to_thread(service.scrape.answer, accept)
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
