"""`GET /healthz` and `GET /readyz`."""

import asyncio

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError

from app.http.dependencies import ServiceOf
from app.http.errors import NotReady

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="check_alive", summary="Check that the process answers")
async def healthz() -> dict[str, str]:
    """Alive: the process answers. Touches nothing else."""
    return {"status": "alive"}


@router.get("/readyz", operation_id="check_ready", summary="Check that the service can answer")
async def readyz(service: ServiceOf) -> dict[str, str]:
    """Able to serve: the base is loaded, the catalogue can be read, and the service is not stopping."""
    if service.draining:
        raise NotReady("the service is stopping")
    try:
        await asyncio.to_thread(service.catalog.revision)
    except (SQLAlchemyError, OSError) as error:
        raise NotReady("the catalogue cannot be read") from error
    return {"status": "ready"}
