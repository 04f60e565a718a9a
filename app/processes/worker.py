"""API worker: a process that answers requests on the supervisor's listening socket."""

import asyncio
import gc
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from functools import partial
from threading import Timer
from types import FrameType

import torch
import uvicorn

from adapters.access.idempotency import remove_expired
from adapters.access.usage import Usage
from adapters.catalog.catalog import Catalog
from adapters.child_process import on_parent_exit
from adapters.errors import LoraplexError
from adapters.lora import kernel  # noqa: F401 - compiled with all other imports, while the collector is off
from adapters.maintenance.backup import remove_abandoned_links
from adapters.maintenance.scrub import ScrubTurn, scrub
from adapters.storage.turns import Task, take_turn
from app import bootstrap
from app.http.application import create_app
from app.observability import logs
from app.processes.supervisor import FIRST_WORKER
from app.processes.tls import tls_context
from app.service import Service
from app.serving.connections import raise_file_limit
from app.serving.uvicorn_protocol import answer_headers, protocol_factory
from app.settings import Settings, exit_if_unusable, load_settings

_SECONDS_BETWEEN_MAINTENANCE = 300.0
# Of that time: a process that has the next turn is a little late, or a little early.
_TURN_SHARE = 0.8
_SECONDS_BETWEEN_SWEEPS = 3600.0
_MAINTENANCE_NICENESS = 10
_OBJECTS_BETWEEN_COLLECTIONS = 10_000

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn's server, which answers requests for a while after SIGTERM, and reports that it is not ready."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, then stop; stop immediately at the second signal."""
        if self._service.draining:
            super().handle_exit(sig, frame)
            return
        # uvicorn closes the listener immediately. A load balancer needs a moment to see that `/readyz` fails.
        self._service.draining = True
        Timer(self._service.settings.drain_seconds, super().handle_exit, (sig, frame)).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down, and close the observer, because uvicorn then raises the signal again and the process ends."""
        await super().shutdown(sockets)
        # Cancelled requests end in this turn of the event loop.
        await asyncio.sleep(0)
        self._service.observer.close()

    def stop(self) -> None:
        """Stop without the pause of a drain, because the supervisor has ended. Streams end when the service drains."""
        self._service.draining = True
        self.should_exit = True


def _maintain(catalog: Catalog, usage: Usage, settings: Settings) -> None:
    """Remove what has expired and read the blobs that are due, every few minutes, for as long as the process runs."""
    if sys.platform == "linux":
        # Of this thread alone: requests come first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _MAINTENANCE_NICENESS)
    database = None if settings.database_url is None else catalog.database
    scrub_turn = ScrubTurn(catalog.database.writer_locks())
    while True:
        time.sleep(_SECONDS_BETWEEN_MAINTENANCE)
        try:
            remove_abandoned_links(settings.data_dir, catalog.blobs)
            if database is None:
                _expire(catalog, usage)
            else:
                _maintain_in_turn(catalog, usage)
            if settings.scrub_days and scrub_turn.take():
                scrub(settings.data_dir, catalog.blobs, database=database, days=settings.scrub_days, now=time.time)
        except (LoraplexError, OSError) as error:
            log.warning("the data folder cannot be maintained now: %s", error)


def _maintain_in_turn(catalog: Catalog, usage: Usage) -> None:
    """Do what no process of the cluster has done for a while: a sweep too, because no machine may start for weeks."""
    seconds = _TURN_SHARE * _SECONDS_BETWEEN_MAINTENANCE
    if take_turn(catalog.database, Task.EXPIRE, seconds=seconds, now=time.time):
        _expire(catalog, usage)
        catalog.blobs.purge()
    catalog.writer.sweep_in_turn(seconds=_SECONDS_BETWEEN_SWEEPS, now=time.time)


def _expire(catalog: Catalog, usage: Usage) -> None:
    catalog.purge_trash()
    remove_expired(catalog.database, now=time.time())
    usage.remove_expired()


def main() -> None:
    """Serve until SIGTERM on the socket whose descriptor is the first argument.

    The second argument is `FIRST_WORKER` for the worker that logs the warnings at the start.
    """
    settings = load_settings()
    logs.configure(settings.log_format, process="worker")
    torch.set_num_threads(1)
    raise_file_limit()
    # Large multipart files are spooled to the data folder, because it is the only folder that must be writable.
    temporary = settings.data_dir / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(temporary)
    with exit_if_unusable():
        tls = tls_context(settings)
        service = Service(settings)
    logs.configure(settings.log_format, process=service.metrics.process)
    bootstrap.sweep_in_background(service.catalog)
    if FIRST_WORKER in sys.argv[2:]:
        database, base = service.catalog.database, service.base
        bootstrap.warn_in_background(
            partial(bootstrap.warn_about_adapters, database, base, settings.feature_space),
            partial(bootstrap.warn_about_jobs, database, base),
        )
        arguments = (service.catalog, service.usage, settings)
        threading.Thread(target=_maintain, args=arguments, name="maintenance", daemon=True).start()
    grace_seconds = settings.shutdown_grace_seconds - settings.drain_seconds
    config = uvicorn.Config(
        create_app(service),
        http=protocol_factory(service),
        headers=answer_headers(settings),
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        # Longer than clients keep idle connections. Otherwise one could be closed while its client sends a request.
        timeout_keep_alive=75,
        # Shorter than the supervisor's grace period, after which it kills the worker.
        timeout_graceful_shutdown=int(max(grace_seconds - 2, grace_seconds / 2)),
    )
    server = _Server(config, service)
    # These objects live as long as the process. A collection of them takes 0.2 s, in which no request is answered.
    gc.collect()
    gc.freeze()
    # A batch makes more objects than the default threshold, and reference counting frees all of them.
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    on_parent_exit(server.stop)
    server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
    service.close()
