"""One service for all of the command line's tests, on the bundled digits base, and the command line to talk to it.

Most tests run a command inside their own process (`run`, `invoke`). Tests of terminals, signals, locales, shells and
closed file descriptors start the console script.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from loraplex.cli.root import cli
from typer.testing import CliRunner

from tests.support.log_lines import logging_restored
from tests.support.service import ServiceProcess, environment

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


def invoke(
    *arguments: object,
    url: str,
    stdin: str | bytes = "",
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Run a command in this process, as the console script would without a terminal.

    Its environment is that of the tests without settings of the service, and with these `variables`.
    """
    command = list(map(str, arguments))
    env: dict[str, str | None] = {**dict.fromkeys(os.environ), **environment(url=url), **(variables or {})}
    with chdir(cwd or Path.cwd()), logging_restored():
        result = CliRunner().invoke(cli, command, stdin, env, catch_exceptions=False, prog_name="loraplex")
    return Ended(command, result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="package")
def run(url: str) -> Run:
    """Run a command with these arguments, without a terminal; it has to end with `status`."""

    def runs(*arguments: object, status: int = 0, stdin: str | bytes = "", cwd: Path | None = None) -> Ended:
        ended = invoke(*arguments, url=url, stdin=stdin, cwd=cwd)
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
