"""`GET /healthz` and `GET /readyz`."""

from fastapi import APIRouter

from app.dependencies import ServiceOf
from app.problems import NotReady

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Alive: the process answers. Touches nothing else."""
    return {"status": "alive"}


@router.get("/readyz")
def readyz(service: ServiceOf) -> dict[str, str]:
    """Able to serve: the base is loaded, the catalogue can be read, and the service is not stopping."""
    if service.draining:
        raise NotReady("the service is stopping")
    service.catalog.revision()
    return {"status": "ready"}
