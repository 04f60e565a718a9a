"""What routes ask FastAPI for."""

from typing import Annotated

from fastapi import Depends, Request

from app.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


async def same_feature_space(request: Request, service: ServiceOf) -> None:
    """Refuse a request whose `X-Feature-Space` names another encoder than the one that feeds this layer."""
    # Header values arrive as latin-1; a client that names its encoder in UTF-8 means UTF-8.
    given = request.headers.getlist("x-feature-space")
    service.check_feature_space([value.encode("latin-1").decode("utf-8", "replace") for value in given])
