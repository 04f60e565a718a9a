"""One process that answers requests, on a socket that the supervisor listens on."""

import asyncio
import gc
import socket
import sys
import tempfile
from threading import Timer
from types import FrameType

import torch
import uvicorn

from adapters.errors import BaseNotLoadable, CatalogNotLoadable
from adapters.lora import kernel  # noqa: F401 - compiled with all other imports, while the collector is off
from app.bootstrap import warn_in_background
from app.http.application import create_app
from app.observability import logs
from app.processes.signals import EXIT_CONFIG, FIRST, when_parent_ends
from app.service import Service, open_service
from app.serving.connections import raise_file_limit
from app.serving.uvicorn_protocol import protocol_factory
from app.settings import load_settings

_DRAIN_SECONDS = 0.5
_OBJECTS_BETWEEN_COLLECTIONS = 10_000


class _Server(uvicorn.Server):
    """uvicorn, which says that it is not ready from the moment it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        # uvicorn closes the listener at once. Answer for a moment longer, so that a load balancer sees it coming.
        self._service.draining = True
        Timer(_DRAIN_SECONDS, super().handle_exit, (sig, frame)).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does; what was observed is passed on here, because uvicorn ends by raising the signal again."""
        await super().shutdown(sockets)
        # Requests that were given up end in this turn.
        await asyncio.sleep(0)
        self._service.observer.close()

    def stop(self) -> None:
        """Stop at once: there is nobody left to see a drain, but for the streams that end with it."""
        self._service.draining = True
        self.should_exit = True


def main() -> None:
    """Serve until SIGTERM on the socket whose descriptor is the first argument; settings in the environment.

    The second argument is `first` for one worker of a service: it alone logs the warnings about the data folder.
    """
    settings = load_settings()
    logs.configure(settings.log_format, process="worker")
    torch.set_num_threads(1)
    raise_file_limit()
    # Large multipart files are spooled: into the data folder, the only place that need be writable.
    temporary = settings.data_dir / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(temporary)
    try:
        service = open_service(settings)
    except (BaseNotLoadable, CatalogNotLoadable) as error:
        print(f"loraplex: {error.detail}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    except (IsADirectoryError, NotADirectoryError) as error:
        print(f"loraplex: the data folder {settings.data_dir} cannot be used: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    logs.configure(settings.log_format, process=service.metrics.process)
    if FIRST in sys.argv[2:]:
        warn_in_background(service.catalog.database, service.base, settings.feature_space)
    config = uvicorn.Config(
        create_app(service),
        http=protocol_factory(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        # Longer than clients keep idle connections: else one may close just as they send on it.
        timeout_keep_alive=75,
        # Done before the supervisor's patience is.
        timeout_graceful_shutdown=int(max(settings.shutdown_grace_seconds - 2, settings.shutdown_grace_seconds / 2)),
    )
    server = _Server(config, service)
    # What stands now stands for good. To walk over all of it takes the collector 0.2 s, in which nothing is answered.
    gc.collect()
    gc.freeze()
    # A batch makes more objects than the collector's default, and all of them go without its help.
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    when_parent_ends(server.stop)
    server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
    service.close()
