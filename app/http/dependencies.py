"""What routes ask FastAPI for."""

from typing import Annotated

from fastapi import Depends, Request

from adapters.errors import InvalidCombination, shorten
from app.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]


async def check_feature_space(request: Request, service: ServiceOf) -> None:
    """Refuse a request whose `X-Feature-Space` names another encoder than the one that feeds this layer."""
    # Header values arrive as latin-1; a client that names its encoder in UTF-8 means UTF-8.
    given = request.headers.getlist("x-feature-space")
    service.check_feature_space([value.encode("latin-1").decode("utf-8", "replace") for value in given])


async def check_query_fields(request: Request) -> None:
    """Refuse a query that has a field twice: which of the two was meant is not ours to say."""
    query = request.query_params
    # A call that takes no query looks at none.
    for field in query if request.scope["route"].dependant.query_params else ():
        if len(values := query.getlist(field)) > 1:
            raise InvalidCombination(
                f"{shorten(field)} is in the query {len(values)} times", field=field, given=values, expected="it once"
            )
