"""One service for all of the command line's tests, on the bundled digits base, and the console script to talk to it."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import LORAPLEX, ServiceProcess, environment

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "examples" / "turned-digits.csv"
SECONDS = 60
Ended = subprocess.CompletedProcess[str]
Run = Callable[..., Ended]


def hear_ctrl_c() -> None:
    """For a process before it begins: a shell that runs the tests in the background has SIGINT ignored, which a child
    inherits.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """`loraplex serve`, with a trainer."""
    with ServiceProcess(tmp_path_factory.mktemp("service") / "data") as started:
        yield started


@pytest.fixture(scope="package")
def url(service: ServiceProcess) -> str:
    """Where it answers."""
    return str(service.client.base_url).rstrip("/")


@pytest.fixture(scope="package")
def run(url: str) -> Run:
    """The console script with these arguments, nobody at a terminal; it has to end with `status`."""

    def runs(*arguments: object, status: int = 0, stdin: str = "", cwd: Path | None = None) -> Ended:
        ended = subprocess.run(
            [LORAPLEX, *map(str, arguments)],
            input=stdin,
            env=environment(url=url),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert ended.returncode == status, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        assert "\x1b" not in ended.stdout + ended.stderr
        return ended

    return runs


@pytest.fixture(scope="package")
def ask(run: Run) -> Callable[..., Any]:
    """What a command says with `--json`, which has to be all that it says."""

    def asks(*arguments: object, stdin: str = "") -> Any:
        ended = run(*arguments, "--json", stdin=stdin)
        assert ended.stderr == ""
        return json.loads(ended.stdout)

    return asks


@pytest.fixture(scope="package")
def trained(run: Run) -> Ended:
    """The quick start's first command: an adapter called acme."""
    return run("train", DIGITS, "--name", "acme", "--target", "digit")
