"""Routes whose errors are pages too."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from adapters.errors import LoraplexError
from app.http.errors import STATUS, first_of
from app.web.pages.rendering import render

Handler = TypeVar("Handler", bound=Callable[..., Response | None])


class PageRoute(APIRoute):
    """A route that shows an error of ours as a page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with errors shown."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except RequestValidationError as error:
                return _show(request, first_of(error))
            except LoraplexError as error:
                return _show(request, error)

        return handler


def _show(request: Request, error: LoraplexError) -> Response:
    status = STATUS[error.code]
    return render(request, "problem.html", status=status, code=status, problem=error.members())


def pages() -> APIRouter:
    """A router for pages: none of them is part of the API."""
    return APIRouter(route_class=PageRoute, include_in_schema=False)


def page(router: APIRouter, path: str) -> Callable[[Handler], Handler]:
    """Answer GET and HEAD of `path`."""

    def register(handler: Handler) -> Handler:
        router.add_api_route(path, handler, methods=["GET", "HEAD"], response_model=None)
        return handler

    return register
