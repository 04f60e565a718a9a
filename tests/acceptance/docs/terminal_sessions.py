"""What a page's reader has open: a shell and a Python that remember, and the service in a terminal of its own."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from unittest.mock import patch

import httpx
import typer

from app import cli
from app.settings import Settings, load_settings
from tests.acceptance.docs.executable_pages import ADDRESS, ROOT, Block, check_output
from tests.support.fork_server import ForkedPopen
from tests.support.forked_commands import copy_environment, forked_commands
from tests.support.service import environment, eventually, free_port, serving

_SECONDS = 60.0
_END = "-- end of block --"
_PYTHON = f"""
import json, sys
names = {{"__name__": "__main__"}}
for line in sys.stdin:
    exec(compile(json.loads(line), "page", "exec"), names)
    print({_END!r}, flush=True)
"""


class Terminal:
    """A process that takes one block after the other and remembers what they left."""

    def __init__(self, language: str, process: "subprocess.Popen[str]", errors: IO[bytes]) -> None:
        self._language = language
        self._process = process
        self._errors = errors
        if language == "bash":
            self._send("set -euo pipefail\n")

    def run(self, code: str) -> str:
        """What the block prints; fails, with what it says, where it fails."""
        self._send(f"{json.dumps(code)}\n" if self._language == "python" else f"{code}\necho '{_END}'\n")
        assert self._process.stdout is not None
        lines: list[str] = []
        for line in self._process.stdout:
            if line == f"{_END}\n":
                return "".join(lines)
            lines.append(line)
        self._errors.seek(0)
        raise AssertionError(f"{code}\nprinted:\n{''.join(lines)}\n{self._errors.read().decode()}")

    def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()


@contextmanager
def terminal(language: str, folder: Path, env: dict[str, str]) -> Iterator[Terminal]:
    """One that is open in this folder."""
    command = [sys.executable, "-c", _PYTHON] if language == "python" else ["bash", "--norc", "-s"]
    popen: Any = ForkedPopen if language == "python" else subprocess.Popen
    pipe = subprocess.PIPE
    with (
        TemporaryFile() as errors,
        popen(command, cwd=folder, env=env, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        try:
            yield Terminal(language, process, errors)
        except BaseException:
            process.kill()
            raise


class Reader:
    """Somebody who does what a page says, block by block, in a folder like the project's."""

    def __init__(self, folder: Path, stack: ExitStack, *, starts_processes: bool = True) -> None:
        """Without `starts_processes`, the services run in this process, and what the reader calls is forked."""
        self._start = _running if starts_processes else _running_here
        self._folder = folder
        self._stack = stack
        self._services = stack.enter_context(ExitStack())
        self._terminals: dict[str, Terminal] = {}
        self.address = f"127.0.0.1:{free_port()}"
        if starts_processes:
            bin_folder = Path(sys.executable).parent
            (folder / ".venv").symlink_to(bin_folder.parent)
        else:
            bin_folder = stack.enter_context(forked_commands(copy_environment(folder / ".venv")))
        self._env = environment(url=f"http://{self.address}", port=self.address.rpartition(":")[2])
        self._env |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "COLUMNS": "120"}
        (folder / "examples").symlink_to(ROOT / "examples")

    def follow(self, page_blocks: list[Block]) -> None:
        """Run them all; each prints what the page says."""
        for block in page_blocks:
            if block.is_service:
                self.serve(block.code)
                continue
            printed = self._terminal(block.language).run(block.code.replace(ADDRESS, self.address))
            check_output(printed.replace(self.address, ADDRESS), block.output)

    def serve(self, command: str) -> None:
        """Start the service as this command does, in place of the one that runs, and wait until it is ready."""
        self._services.close()
        self._services.enter_context(self._start(command, self._folder, self._env, f"http://{self.address}"))

    def _terminal(self, language: str) -> Terminal:
        if language not in self._terminals:
            opened = terminal(language, self._folder, self._env)
            self._terminals[language] = self._stack.enter_context(opened)
        return self._terminals[language]


@contextmanager
def _running(command: str, folder: Path, env: dict[str, str], url: str) -> Iterator[None]:
    with TemporaryFile() as log:
        process = subprocess.Popen(["bash", "-c", f"exec env {command}"], cwd=folder, env=env, stdout=log, stderr=log)

        def ready() -> bool:
            log.seek(0)
            assert process.poll() is None, log.read().decode()
            try:
                return httpx.get(f"{url}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        try:
            eventually(ready, what="readiness")
            yield
        finally:
            process.terminate()
            process.wait(_SECONDS)


@contextmanager
def _running_here(command: str, folder: Path, env: dict[str, str], _: str) -> Iterator[None]:
    """Run the service with the settings that this command gives it, and without seconds of imports for each process."""
    settings = _settings(command, folder, env)
    with serving(settings, trainer=settings.trainers > 0, port=settings.port):
        yield


def _settings(command: str, folder: Path, env: dict[str, str]) -> Settings:
    """Return the settings of `NAME=value loraplex serve --option value`, in this folder and environment."""
    words = shlex.split(command)
    place = words.index("serve")
    assigned = dict(word.split("=", 1) for word in words[: place - 1])
    parser = typer.Typer()
    parser.command()(cli.serve)
    options = typer.main.get_command(parser).make_context("serve", words[place + 1 :]).params
    assert not options.pop("accept_catalog")
    with patch.dict(os.environ, env | assigned, clear=True), chdir(folder):
        return load_settings(options)
