"""A client of the service under test: once the one that blocks, once the other."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from loraplex import AsyncClient, Client

from tests.conftest import Serve
from tests.integration.client.blocking_client import Blocking
from tests.integration.client.scripted_server import Scripted

Connect = Callable[..., Any]
Start = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """A client of a url, with the arguments of `Client`."""
    with ExitStack() as stack:
        # As `asyncio.run` does, it closes generators that a test leaves before their end.
        loop = stack.enter_context(asyncio.Runner()).get_loop()

        def open_client(url: str, **arguments: Any) -> Any:
            if request.param == "sync":
                return stack.enter_context(Client(url, **arguments))
            client = Blocking(AsyncClient(url, **arguments), loop)
            stack.callback(client.close)
            return client

        yield open_client


@pytest.fixture
def start(serve: Serve, connect: Connect) -> Start:
    """Start a service with these settings, and connect to it."""

    def started(*, trainer: bool = False, client: dict[str, Any] | None = None, **settings: Any) -> Any:
        return connect(str(serve(trainer=trainer, **settings)[0].base_url), **(client or {}))

    return started


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A server that answers what it is told to."""
    with Scripted() as server:
        yield server
