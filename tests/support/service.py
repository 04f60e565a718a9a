"""The service as the tests run it: in this process behind a real socket, or as its users start it."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from adapters.training.execution.trainer import Trainer
from app.bootstrap import open_checkpoints
from app.http.application import create_app
from app.processes.tls import tls_context
from app.service import Service
from app.serving.uvicorn_protocol import answer_headers, protocol_factory
from app.settings import LogRequests, Settings
from tests.support.certificates import trusting
from tests.support.databases import database_settings
from tests.support.deadlines import scaled
from tests.support.fitters import new_fitter, reused_fitter
from tests.support.fork_server import ForkedPopen

DEADLINE_SECONDS = 60.0
LORAPLEX = Path(sys.executable).with_name("loraplex")
"""The console script."""


def eventually(condition: Callable[[], Any], *, seconds: float = DEADLINE_SECONDS, what: str = "it") -> Any:
    """Return the first true value of `condition`; fail if there is none within `scaled(seconds)`."""
    give_up = time.monotonic() + scaled(seconds)
    pause = 0.01
    while time.monotonic() < give_up:
        value = condition()
        if value:
            return value
        # What takes long is looked at less often: a look costs the cores that it waits for.
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)
    raise AssertionError(f"{what} did not happen in {scaled(seconds):.3g} s")


def wait_for_job(client: httpx.Client, job_id: str, *, seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
    """The job once it has ended."""

    def ended() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}").raise_for_status().json()
        return job if job["status"] not in ("queued", "running") else None

    result: dict[str, Any] = eventually(ended, seconds=seconds, what=f"the end of job {job_id}")
    return result


def train(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """Train, by adamw if the request names no method, and return the job once it has ended."""
    body["training"] = {"method": "adamw"} | body.get("training", {})
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    return wait_for_job(client, answer.json()["id"])


@contextmanager
def serving(
    settings: Settings, *, trainer: bool = False, own_fitter: bool = False, keep_alive_seconds: int = 60, port: int = 0
) -> Iterator[tuple[httpx.Client, Service]]:
    """Run one worker in a thread, on a real socket; with `trainer`, one that trains too.

    Its fits run in a process that later tests reuse, or with `own_fitter` in a new one.

    Requests are logged where the settings ask for it by name: thousands of lines would drown what a test says.
    """
    # The data folder may name another database and a bucket.
    settings = settings.model_copy(update=database_settings(settings.data_dir))
    if "log_requests" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_requests": LogRequests.NONE})
    tls = tls_context(settings)
    service = Service(settings)
    config = uvicorn.Config(
        create_app(service),
        http=protocol_factory(service),
        headers=answer_headers(settings),
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_keep_alive=keep_alive_seconds,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", port))
    threads = [threading.Thread(target=server.run, kwargs={"sockets": [listener]})]
    stop, fitters = threading.Event(), ExitStack()
    if trainer:
        loop = Trainer(
            service.catalog,
            service.queue,
            service.base,
            fitters.enter_context(new_fitter(settings) if own_fitter else reused_fitter(settings)),
            stop=stop,
            lease_seconds=settings.lease_seconds,
            checkpoints=open_checkpoints(service.catalog, settings),
        )
        threads.append(threading.Thread(target=loop.run))
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: server.started, what="the start of the server")
        scheme, verify = ("http", True) if tls is None else ("https", trusting(settings.tls_cert))
        address = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=scaled(60), verify=verify) as client:
            yield client, service
    finally:
        server.should_exit = True
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
        fitters.close()
        service.close()


def environment(**settings: Any) -> dict[str, str]:
    """This process's environment with these settings, and with no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    return inherited | {f"LORAPLEX_{name.upper()}": str(value) for name, value in settings.items()}


class ServiceProcess:
    """`loraplex serve` as its users start it, in a process group of its own."""

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        cwd: Path | None = None,
        preload: Mapping[str, str] | None = None,
        most_files: int = 0,
        forks: bool = True,
        **settings: Any,
    ) -> None:
        """Start it. With `most_files`, its processes may open no more than that.

        The data folder may name another database and a bucket (see `databases`). The process is forked (see
        `fork_server`), unless it depends on its start or `forks` is false.
        """
        self.data_dir = data_dir
        self.port = port or free_port()
        self.log = data_dir.parent / f"{data_dir.name}.log"
        limited = ["sh", "-c", f'ulimit -n {most_files} && exec "$@"', "sh"] if most_files else []
        popen = subprocess.Popen if preload or most_files or cwd or not forks else ForkedPopen
        with self.log.open("ab") as log:
            self.process = popen(
                [*limited, LORAPLEX, "serve", "--port", str(self.port), "--data-dir", data_dir],
                env=environment(**database_settings(data_dir) | settings) | dict(preload or {}),
                cwd=cwd,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=scaled(60))

    def wait_until_ready(self) -> "ServiceProcess":
        """Returns once `/readyz` says so; fails with the log where the process ends instead."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        eventually(ready, what="readiness")
        return self

    def connect(self) -> httpx.Client:
        """Another client, with a connection of its own."""
        return httpx.Client(base_url=self.client.base_url, timeout=scaled(60))

    def kill_group(self) -> None:
        """`kill -9` of the supervisor and all its children at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End it however it is doing, and leave nothing behind."""
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill_group()

    def __enter__(self) -> "ServiceProcess":
        try:
            return self.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    """A port that nobody listens on now, and that no connection gets by itself: the system gives those above 32,767."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
