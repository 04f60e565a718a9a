"""Replicas as deploy/compose.scale.yml has them, each program a process on loopback.

PostgreSQL, an S3 server, `loraplex serve` without trainers, `loraplex trainer`, and HAProxy with `deploy/haproxy.cfg`.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.support.deadlines import scaled
from tests.support.delay_proxy import DelayProxy
from tests.support.external_programs import program
from tests.support.fork_server import ForkedPopen
from tests.support.object_server import ObjectServer, new_url, object_server
from tests.support.postgres_server import PostgresServer
from tests.support.process_tree import session_of
from tests.support.service import LORAPLEX, environment, eventually, free_port

HAPROXY_CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
_BASE = "random:10,2,42"


class Replica:
    """One `loraplex serve` or `loraplex trainer`, in a session of its own, that can be started again.

    Its data folder is empty at the first start. `port` is that of a `serve`.
    """

    def __init__(self, name: str, command: str, folder: Path, variables: Mapping[str, str]) -> None:
        self.name = name
        self.folder = folder / name
        self.log = folder / f"{name}.log"
        self.port = free_port() if command == "serve" else 0
        options = ["--port", str(self.port), "--trainers", "0"] if self.port else []
        self._command = [str(LORAPLEX), command, "--data-dir", str(self.folder), *options]
        # A trainer would fork its fit process, in which the threads of the S3 client are missing.
        self._popen = ForkedPopen if self.port else subprocess.Popen
        self._environment = {**variables}
        self._process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=self.url, timeout=scaled(60))

    @property
    def url(self) -> str:
        """The address without the proxy."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The first of its processes, since the last start."""
        assert self._process is not None, f"{self.name} has not been started"
        return self._process

    def start(self) -> None:
        """Start it, and do not wait."""
        with self.log.open("ab") as log:
            self._process = self._popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Wait until `/readyz` says so; fail with the log if it ends instead. A trainer is not waited for."""
        if self.port:
            eventually(self._is_ready, what=f"the readiness of {self.name}")

    def terminate(self) -> None:
        """Send SIGTERM, and do not wait."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.terminate()
        return self.process.wait(scaled(60))

    def kill(self) -> None:
        """`kill -9` of all its processes."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """Let all its processes stand still (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it if it runs."""
        self.client.close()
        if self._process is not None:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        for member in session_of(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(member.pid, number)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


class Cluster:
    """The whole of it. Use it in a `with` statement, which starts it and waits until it is ready."""

    def __init__(
        self,
        folder: Path,
        *,
        apis: int = 2,
        trainers: int = 2,
        delay_seconds: float = 0.0,
        postgres: PostgresServer | None = None,
        database_url: str | None = None,
        objects: ObjectServer | None = None,
        **settings: Any,
    ) -> None:
        """Start PostgreSQL, or use the given server with a database of its own or the given one, and the S3 server.

        `delay_seconds` is added to each round trip between the replicas and PostgreSQL. HAProxy balances the first two
        of `apis`.
        """
        self._closing = ExitStack()
        self._counts = {"api": apis, "trainer": trainers}
        self._folder = folder
        self._delay_seconds = delay_seconds
        self._settings = {
            "base": _BASE,
            "lease_seconds": 5,
            "shutdown_grace_seconds": 20,
            "drain_seconds": 2,
        } | settings
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self.postgres = PostgresServer() if postgres is None else postgres
            if postgres is None:
                opened.callback(self.postgres.close)
            self.objects = opened.enter_context(object_server(folder / "s3")) if objects is None else objects
            self.database_url = database_url or self.postgres.new_database()
            self.blob_url = new_url()
            self._closing = opened.pop_all()
        self.apis: list[Replica] = []
        self.trainers: list[Replica] = []
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=scaled(60))
        """Client of HAProxy."""

    @property
    def replicas(self) -> list[Replica]:
        """All of them."""
        return [*self.apis, *self.trainers]

    def connect(self) -> httpx.Client:
        """Another client of HAProxy, with connections of its own."""
        return httpx.Client(base_url=self.client.base_url, timeout=scaled(60))

    def new_replica(self, name: str, command: str, **settings: Any) -> Replica:
        """Another `serve` or `trainer`, which is not started. It is killed at the end."""
        own = {"database_url": self._url_for_replicas, "blob_url": self.blob_url, "replica_name": name}
        variables = environment(**(self._settings | own | settings)) | self.objects.environment
        replica = Replica(name, command, self._folder, variables)
        self._closing.callback(replica.close)
        return replica

    def wait_until_balanced(self, *apis: Replica) -> None:
        """Wait until HAProxy sends requests to these replicas; to the first two if none is named."""
        missing = {api.name for api in apis or self.apis[:2]}

        def has_seen_all() -> bool:
            with suppress(httpx.TransportError):
                missing.discard(self.client.get("/base").headers.get("x-served-by", ""))
            return not missing

        eventually(has_seen_all, what=f"an answer of {missing} through HAProxy")

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        self._closing.close()

    def _start(self) -> None:
        self._url_for_replicas = self.database_url
        if self._delay_seconds:
            delayed = DelayProxy(self.postgres.port, seconds=self._delay_seconds)
            self._closing.callback(delayed.close)
            self._url_for_replicas = self.database_url.replace(f":{self.postgres.port}/", f":{delayed.port}/")
        for name, command, replicas in (("api", "serve", self.apis), ("trainer", "trainer", self.trainers)):
            replicas += [self.new_replica(f"{name}-{number + 1}", command) for number in range(self._counts[name])]
        for replica in self.replicas:
            replica.start()
        for replica in self.replicas:
            replica.wait_until_ready()
        self._start_proxy(HAPROXY_CONFIG, self._closing)
        self.wait_until_balanced()

    @contextmanager
    def another_proxy(self, config: Path) -> Iterator[None]:
        """Use another HAProxy, with this configuration, in the block."""
        port, client = self.port, self.client
        try:
            with ExitStack() as closing:
                self.port = free_port()
                self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=scaled(60))
                self._start_proxy(config, closing)
                self.wait_until_balanced()
                yield
        finally:
            self.port, self.client = port, client

    def _start_proxy(self, config: Path, closing: ExitStack) -> None:
        addresses = {f"API_{number + 1}": f"127.0.0.1:{api.port}" for number, api in enumerate(self.apis)}
        with (self._folder / "haproxy.log").open("ab") as log:
            proxy = subprocess.Popen(
                [program("haproxy"), "-db", "-f", config],
                env=os.environ | addresses | {"BIND": f"127.0.0.1:{self.port}"},
                stdout=log,
                stderr=log,
            )
        closing.callback(self.client.close)
        closing.callback(proxy.wait)
        closing.callback(proxy.kill)
