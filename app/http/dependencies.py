"""FastAPI dependencies of the handlers."""

from typing import Annotated

from fastapi import Depends, Request

from adapters.errors import InvalidCombination, shorten
from app.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


async def check_feature_space(request: Request, service: ServiceOf) -> None:
    """Raise `FeatureSpaceMismatch` if `X-Feature-Space` names another encoder than the one that feeds this layer."""
    # Header values arrive as latin-1, but a client that names its encoder in UTF-8 means UTF-8.
    values = request.headers.getlist("x-feature-space")
    service.check_feature_space([value.encode("latin-1").decode("utf-8", "replace") for value in values])


async def check_query_fields(request: Request) -> None:
    """Raise `InvalidCombination` if a query field is repeated, because either value could be meant."""
    # A call without query parameters ignores its query.
    if not request.scope["route"].dependant.query_params:
        return
    for field in request.query_params:
        values = request.query_params.getlist(field)
        if len(values) > 1:
            raise InvalidCombination(
                f"{shorten(field)} is in the query {len(values)} times", field=field, given=values, expected="it once"
            )
