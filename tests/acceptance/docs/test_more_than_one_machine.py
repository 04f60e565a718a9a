"""The page about more than one machine: its commands copy a data folder, and start replicas that answer from it."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.acceptance.docs.executable_pages import ROOT, blocks, check_output
from tests.support.external_programs import program
from tests.support.forked_commands import forked_commands
from tests.support.object_server import new_url, object_server
from tests.support.postgres_server import PostgresServer
from tests.support.process_tree import session_of
from tests.support.service import LORAPLEX, ServiceProcess, environment, eventually, free_port

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "how-to" / "more-than-one-machine.md").read_text()
MIGRATE, NEW_KEY, SERVE, TRAIN, BALANCE, ASK, LIST = blocks(PAGE)


class _Machines:
    """The machines of the page, all of them here, with other paths, names and ports."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self._folder = folder
        self._names = {
            "/etc/": f"{folder}/",
            "/var/lib/": f"{folder}/",
            "haproxy -f deploy": f"{program('haproxy')} -db -f {ROOT}/deploy",
        } | names
        (settings,) = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)
        (folder / "loraplex.env").write_text(self._here(settings))
        self._started = ExitStack()
        programs = folder / "bin"
        programs.mkdir()
        self._started.enter_context(forked_commands(programs))
        self.variables = environment() | {"PATH": f"{programs}:{LORAPLEX.parent}:{os.environ['PATH']}"}

    def run(self, code: str) -> str:
        """Run a block, and return what it prints."""
        command = ["bash", "-ec", self._here(code)]
        done = subprocess.run(command, cwd=self._folder, env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, code: str, log: Path) -> None:
        """Start a block that ends with a process which stays."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-ec", self._here(code)],
                cwd=self._folder,
                env=self.variables,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started.callback(_end, process)

    def close(self) -> None:
        """End what was started."""
        self._started.close()

    def _here(self, code: str) -> str:
        for name, ours in self._names.items():
            code = code.replace(name, ours)
        return code


def _end(process: "subprocess.Popen[bytes]") -> None:
    for member in session_of(process.pid):
        with suppress(ProcessLookupError):
            member.kill()
    process.wait()


@pytest.fixture
def machines(tmp_path: Path, postgres_server: PostgresServer) -> Iterator[tuple[_Machines, list[int]]]:
    """The machines, and the ports of the two replicas and of HAProxy."""
    ports = [free_port() for _ in range(3)]
    with object_server(tmp_path / "s3") as objects, ExitStack() as stack:
        variables = objects.environment
        names = {
            "postgresql+psycopg://loraplex:secret@db.internal/loraplex": postgres_server.new_database(),
            "s3://bucket/loraplex": new_url(),
            "access-key": variables["AWS_ACCESS_KEY_ID"],
            "secret-key": variables["AWS_SECRET_ACCESS_KEY"],
            "http://s3.internal": variables["AWS_ENDPOINT_URL"],
            **{f"10.0.0.1{number}:8000": f"127.0.0.1:{port}" for number, port in zip((1, 2, 0), ports, strict=True)},
            "loraplex.internal:8000": f"127.0.0.1:{ports[2]}",
        }
        started = _Machines(tmp_path, names)
        stack.callback(started.close)
        yield started, ports


def test_the_page_moves_a_service_to_replicas(machines: tuple[_Machines, list[int]], tmp_path: Path) -> None:
    here, ports = machines
    with ServiceProcess(tmp_path / "data") as service:
        upload = {"A": [[1.0]] * 10, "B": [[0.5] * 64]}
        assert service.client.put("/adapters/acme", json=upload).status_code == 201
        predict = {"adapter": "acme", "inputs": [[1.0] * 64]}
        before = service.client.post("/predict", json=predict).json()
    here.run(MIGRATE.code)
    here.variables["LORAPLEX_KEY"] = json.loads(here.run(NEW_KEY.code))["key"]
    for number, port in enumerate(ports[:2]):
        code = SERVE.code.replace("lib/loraplex/api", f"lib/loraplex/api-{number}").strip()
        here.start(f"{code} --port {port}", tmp_path / f"api-{number}.log")
    here.start(TRAIN.code, tmp_path / "trainer.log")
    here.start(BALANCE.code, tmp_path / "haproxy.log")
    with httpx.Client(headers={"Authorization": f"Bearer {here.variables['LORAPLEX_KEY']}"}, timeout=60) as client:
        for port in ports:
            eventually(lambda: _is_ready(client, port), what=f"an answer on port {port}")  # noqa: B023 - called here
        for port in ports:
            assert client.post(f"http://127.0.0.1:{port}/predict", json=predict).json() == before
    check_output(here.run(ASK.code), ASK.output)
    assert "acme" in here.run(LIST.code)


def _is_ready(client: httpx.Client, port: int) -> bool:
    with suppress(httpx.TransportError):
        return client.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    return False
