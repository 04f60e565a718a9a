"""Fixtures that all tests may use, and the groups in which tests run on one worker."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import httpx._transports.default as httpx_transports
import pytest
import torch
from _pytest.nodeid import NodeId

from app.service import Service
from app.settings import Settings
from tests.support.service import serving

_TESTS = Path(__file__).parent

# Containers often switch bytecode files off. Then each worker rewrites all tests again, and each process that a test
# starts compiles the packages again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

torch.set_num_threads(1)

# httpx reads the certificates of the authorities for each client anew, which takes 20 ms of a core.
httpx_transports.create_ssl_context = cache(httpx.create_ssl_context)  # type: ignore[attr-defined]

_KINDS = ("acceptance", "integration", "unit")
"""In the order in which they run: the longest groups first, so that no worker is left with one at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the group whose tests run on one worker, because they share fixtures.

    That is the folder of the package fixture that it uses, and otherwise its file. A slow test that shares nothing is a
    group of its own. A test file may set another group by `pytest.mark.xdist_group`.
    """
    items.sort(key=lambda item: _KINDS.index(item.path.relative_to(_TESTS).parts[0]))
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        group = marker.args[0] if marker else _group_of(item)
        if hasattr(item.config, "workerinput"):
            # pytest-xdist 3.8 appends the group to an attribute that pytest 9.2 does not read.
            item._id = NodeId.parse(f"{item.nodeid}@{group}")


def _group_of(item: pytest.Item) -> str:
    # pytest has no public call that tells a fixture's scope.
    definitions = [definition[-1] for definition in item._fixtureinfo.name2fixturedefs.values()]  # type: ignore[attr-defined]
    packages = sorted(definition.baseid for definition in definitions if definition.scope == "package")
    if packages:
        return str(packages[0])
    shares = any(definition.scope in ("module", "class") for definition in definitions)
    if item.get_closest_marker("slow") is not None and not shares:
        return item.nodeid
    return item.path.relative_to(_TESTS).as_posix()


Serve = Callable[..., tuple[httpx.Client, Service]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start one worker with these settings, in this process; `trainer=True` trains too."""
    with ExitStack() as stack:

        def start(*, trainer: bool = False, own_fitter: bool = False, **settings: Any) -> tuple[httpx.Client, Service]:
            chosen: dict[str, Any] = {"data_dir": tmp_path / "data", "base": "random:10,2,42"} | settings
            return stack.enter_context(serving(Settings(**chosen), trainer=trainer, own_fitter=own_fitter))

        yield start


@pytest.fixture
def client(serve: Serve) -> httpx.Client:
    """A client of one worker with a random 10 → 2 base layer, without a trainer."""
    return serve()[0]
