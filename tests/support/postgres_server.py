"""A PostgreSQL server of the tests' own: a child process in a temporary folder, on loopback."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.support.external_programs import skip_or_fail

_USER = "loraplex"
_TEMPLATE = "migrated"
# Debian's account, for a server that must not run as root.
_ACCOUNT = "postgres"
_START_SECONDS = 30.0


def _programs() -> Path:
    """The folder of `initdb` and `postgres`; Debian's is not on the path."""
    if path := shutil.which("initdb"):
        return Path(path).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return folders[-1].parent if folders else skip_or_fail("PostgreSQL is not installed")


class PostgresServer:
    """A server that `start` starts and `kill` ends as a crash does. It syncs nothing unless it is `durable`."""

    def __init__(self, *, durable: bool = False, standby_of: "PostgresServer | None" = None) -> None:
        """Start an empty server, or a hot standby that is a copy of another."""
        if find_spec("psycopg") is None:
            skip_or_fail("psycopg is not installed")
        self._programs = _programs()
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam(_ACCOUNT)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._account = {"user": _ACCOUNT, "group": account.pw_gid, "extra_groups": []}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "max_connections": 200,
            "shared_buffers": "32MB",
            "autovacuum": "off",
            "fsync": "on" if durable else "off",
        }
        self._process: subprocess.Popen[bytes] | None = None
        if standby_of is None:
            encoding = ("--encoding=UTF8", "--locale=C.UTF-8")
            self._run("initdb", "--auth=trust", *encoding, "--no-sync", f"--username={_USER}")
        else:
            self._copy(standby_of)
        self.start()

    def start(self, **settings: object) -> None:
        """Start the server, and wait until it accepts connections."""
        options = [f"--{name}={value}" for name, value in (self._settings | settings).items()]
        arguments: list[Path | str] = [self._programs / "postgres", "-D", self.folder / "data", *options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, **self._account
            )
        import psycopg

        give_up = time.monotonic() + _START_SECONDS
        while True:
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.dsn("postgres"), connect_timeout=2).close()
                return
            assert time.monotonic() < give_up, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.02)

    def kill(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """End every process of the server without a chance to write anything: by itself, or by SIGKILL to each."""
        assert self._process is not None
        # The children end when they notice that the first process has died; a new server waits for them.
        if number == signal.SIGKILL:
            self.send(number)
        else:
            self._process.send_signal(number)
        self._process.wait(30)

    def follow(self, primary: "PostgresServer") -> None:
        """Begin anew as a hot standby of another server, after a `kill`."""
        shutil.rmtree(self.folder / "data")
        self._copy(primary)
        self.start()

    def promote(self) -> None:
        """Make a standby the primary, and wait until it accepts changes."""
        import psycopg

        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote(true, 30)").fetchone() == (True,)

    def change_setting(self, name: str, value: str) -> None:
        """Set a setting that takes effect without a restart."""
        import psycopg

        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
            connection.execute("SELECT pg_reload_conf()")

    def _copy(self, primary: "PostgresServer") -> None:
        address = ("--host=127.0.0.1", f"--port={primary.port}", f"--username={_USER}")
        self._run("pg_basebackup", *address, "--checkpoint=fast", "--no-sync", "--write-recovery-conf")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every process of the server."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            # A child may have ended meanwhile.
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """End the server, and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def dsn(self, database: str) -> str:
        """The address of a database for psycopg."""
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a new database with the tables of the catalogue, which are copied."""
        import psycopg

        from adapters.storage.postgres_database import PostgresDatabase

        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_TEMPLATE]).fetchone():
                connection.execute(f"CREATE DATABASE {_TEMPLATE}")
                PostgresDatabase(self._url(_TEMPLATE)).close()
            name = f"test_{uuid.uuid4().hex}"
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
        return self._url(name)

    def _url(self, database: str) -> str:
        return self.dsn(database).replace("postgresql:", "postgresql+psycopg:")

    def _run(self, program: str, *arguments: str) -> None:
        command: list[Path | str] = [self._programs / program, "-D", self.folder / "data", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **self._account)
