"""`GET /healthz` and `GET /readyz`."""

import asyncio

from sqlalchemy.exc import SQLAlchemyError

from app.http.dependencies import ServiceOf
from app.http.errors import NotReady


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
