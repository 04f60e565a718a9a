"""The pages' places in the application."""

from fastapi import FastAPI

from app.http.errors import RouteNotFound
from app.web.pages import adapters, datasets, jobs, overview, try_it
from app.web.pages.assets import PREFIX, Assets
from app.web.pages.page_route import page, pages

_elsewhere = pages()


@page(_elsewhere, "/ui/{path:path}")
def show_nothing(path: str) -> None:
    """What is not there is a page too, for those who come by a link."""
    raise RouteNotFound(f"there is nothing at /ui/{path[:100]}")


def add_pages(app: FastAPI) -> None:
    """Answer `/`, `/ui/…` and `/static/…`."""
    for view in (overview, adapters, jobs, datasets, try_it):
        app.include_router(view.router)
    app.include_router(_elsewhere)
    app.mount(PREFIX, Assets())
