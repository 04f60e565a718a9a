"""Client and command line of loraplex.

from loraplex import Client

with Client("http://127.0.0.1:8000") as client:
    client.train("acme", rank=4, inputs=x, targets=y).wait(progress=True)
    client.predict("acme", x).outputs
"""

# ruff: noqa: F403, F405  # `__all__` has the names of both modules that are public

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraplex.errors import *
from loraplex.progress import Display
from loraplex.results import *

if TYPE_CHECKING:
    from loraplex._async.client import AsyncClient
    from loraplex._async.jobs import AsyncJob
    from loraplex._sync.client import Client
    from loraplex._sync.jobs import Job

__all__ = [
    "Adapter",
    "AdapterDeleted",
    "AdapterNotFound",
    "AdapterNotLive",
    "AdapterRef",
    "AliasNotFound",
    "AsyncClient",
    "AsyncJob",
    "Back",
    "BadAnswer",
    "BadRow",
    "BadRows",
    "Base",
    "BaseChanged",
    "BaseMismatch",
    "BaseNotLoadable",
    "BlobCorrupt",
    "BodyTooLarge",
    "CatalogBusy",
    "CatalogNotLoadable",
    "ClaimLost",
    "Client",
    "Column",
    "Conflict",
    "Dataset",
    "DatasetNotFound",
    "DatasetVersion",
    "Display",
    "Diverged",
    "DuplicateKey",
    "Estimate",
    "EstimateTooLarge",
    "Event",
    "FeatureSpaceMismatch",
    "FitFailed",
    "FleetFailed",
    "IgnoredField",
    "IllConditioned",
    "InternalError",
    "InvalidArchive",
    "InvalidCombination",
    "InvalidCursor",
    "InvalidDataset",
    "InvalidInput",
    "InvalidName",
    "InvalidReference",
    "InvalidSafetensors",
    "InvalidUpload",
    "Job",
    "JobAdapter",
    "JobCancelled",
    "JobEnded",
    "JobFailed",
    "JobFields",
    "JobNotEnded",
    "JobNotFound",
    "JobStatus",
    "Label",
    "LogLine",
    "LoraplexError",
    "LossPoint",
    "MethodNotAllowed",
    "MissingField",
    "NoStatistics",
    "NotFinite",
    "NotFound",
    "NotJson",
    "NotReady",
    "OutOfMemory",
    "OutOfRange",
    "OutputNotFinite",
    "PeftUnsupported",
    "PreconditionFailed",
    "Prediction",
    "Preview",
    "Progress",
    "QueueFull",
    "RankTooLarge",
    "RequestTimeout",
    "Reverted",
    "RouteNotFound",
    "Skipped",
    "StorageFailed",
    "StorageFull",
    "TimedOut",
    "TooManyBytes",
    "TrainingFailed",
    "UnknownField",
    "Unreachable",
    "UnsupportedMediaType",
    "Version",
    "VersionNotFound",
    "WorkerDied",
    "WrongShape",
    "WrongType",
]

_CLIENTS = {
    "AsyncClient": "loraplex._async.client",
    "AsyncJob": "loraplex._async.jobs",
    "Client": "loraplex._sync.client",
    "Job": "loraplex._sync.jobs",
}

if not TYPE_CHECKING:
    # They bring httpx and numpy, which the command line does without until it asks a service: at each key press of a
    # shell's completion too. Hidden from type checkers, for which any name would be one of this module otherwise.
    def __getattr__(name: str) -> Any:
        if name not in _CLIENTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_CLIENTS[name]), name)
        return value

    def __dir__() -> list[str]:
        return __all__
