"""Client and command line of loraplex.

from loraplex import Client

with Client("http://127.0.0.1:8000") as client:
    client.train("acme", rank=4, inputs=x, targets=y).wait(progress=True)
    client.predict("acme", x).outputs
"""

# ruff: noqa: F403  # all errors and results are public

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loraplex import errors, results, tenants
from loraplex.errors import *
from loraplex.frames import to_pandas as to_pandas
from loraplex.frames import to_polars as to_polars
from loraplex.progress import Display as Display
from loraplex.results import *
from loraplex.tenants import *

if TYPE_CHECKING:
    from loraplex._async.client import AsyncClient as AsyncClient
    from loraplex._async.jobs import AsyncJob as AsyncJob
    from loraplex._sync.client import Client as Client
    from loraplex._sync.jobs import Job as Job
    from loraplex.base_file import make_base as make_base

_LAZY = {
    "AsyncClient": "loraplex._async.client",
    "AsyncJob": "loraplex._async.jobs",
    "Client": "loraplex._sync.client",
    "Job": "loraplex._sync.jobs",
    "make_base": "loraplex.base_file",
}


def _classes(*modules: ModuleType) -> list[str]:
    """Return the names of the public classes that are defined in these modules."""
    named = ((name, value, module.__name__) for module in modules for name, value in vars(module).items())
    return [
        name
        for name, value, module in named
        if name[0] != "_" and getattr(value, "__module__", "") == module and isinstance(value, type)
    ]


__all__ = ["Display", "to_pandas", "to_polars", *_LAZY, *_classes(errors, results, tenants)]

if not TYPE_CHECKING:
    # They bring httpx and numpy, which the command line does without until it asks a service: at each key press of a
    # shell's completion too. Hidden from type checkers, for which any name would be one of this module otherwise.
    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value

    def __dir__() -> list[str]:
        return __all__
