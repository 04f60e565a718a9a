"""How it talks: to nobody at all, to machines, to shells, and to people at a terminal."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli.command_reference import PAGE, page_from_the_code
from tests.integration.cli.conftest import DIGITS, Ended, Run, invoke
from tests.support.service import LORAPLEX, environment, free_port

Ask = Callable[..., Any]
_SECONDS = 60


def at_a_terminal(
    *arguments: object, typed: str = "", columns: int = 100, ended_after: str | None = None, **settings: str
) -> tuple[str, int]:
    """All that a terminal is sent, and the exit status; `typed` goes in once something was said, and SIGTERM is sent
    once `ended_after` was.
    """
    colors = {"NO_COLOR": settings.pop("no_color")} if "no_color" in settings else {}
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [LORAPLEX, *map(str, arguments)],
        env=environment(**settings) | {"TERM": "xterm"} | colors,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    give_up = time.monotonic() + _SECONDS
    while time.monotonic() < give_up:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            said += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if ended_after is not None and ended_after.encode() in said:
            process.terminate()
            ended_after = None
        if typed:
            os.write(terminal, typed.encode())
            typed = ""
    os.close(terminal)
    return said.decode(), process.wait(_SECONDS)


def test_a_training_is_a_bar_at_a_terminal(url: str, trained: Ended) -> None:
    data = ("--dataset", "turned-digits", "--name", "watched", "--target", "digit")
    how = ("--method", "adamw", "--loss", "cross_entropy", "--epochs", 4000, "--split", "rows")
    said, status = at_a_terminal("train", *data, *how, url=url)
    assert status == 0
    assert "━" in said
    assert re.search(r"watched .*━.* [1-9]\d*%.* loss \d", said)
    assert "held-out rows" in said
    assert "watched@1 is live" in said


@pytest.mark.slow
def test_no_color_is_no_color(url: str, trained: Ended) -> None:
    colored, _ = at_a_terminal("adapters", url=url)
    plain, status = at_a_terminal("adapters", url=url, no_color="1")
    assert status == 0
    assert "\x1b[1m" in colored
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain)
    assert "acme" in plain


def test_deleting_asks_at_a_terminal(run: Run, ask: Ask, url: str, trained: Ended) -> None:
    how = ("--rank", 2, "--method", "adamw", "--loss", "cross_entropy", "--epochs", 1)
    run("train", "--dataset", "turned-digits", "--name", "asked-for", "--target", "digit", *how)
    said, status = at_a_terminal("delete", "asked-for", url=url, typed="n\r")
    assert status == 1
    assert "Delete the adapter asked-for with all its versions? [y/N]" in said
    assert len(ask("adapters", "asked-for")) == 1
    _, status = at_a_terminal("delete", "asked-for", url=url, typed="y\r")
    assert status == 0
    assert ask("adapters", "asked-for") == []


def test_a_service_that_is_not_there_is_said_not_to_be() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ended = subprocess.run(
        [LORAPLEX, "status"], env=environment(url=url), capture_output=True, text=True, timeout=_SECONDS
    )
    assert ended.returncode == 3
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 2
    assert (
        f"Is the service running at {url}? Start it with `loraplex serve`, or say where it is by --url." in ended.stderr
    )
    machine = invoke("adapters", "--json", url=url)
    assert machine.returncode == 3
    assert json.loads(machine.stderr)["code"] == "unreachable"


def test_the_address_may_stand_before_the_command_or_after_it(url: str) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for arguments in (("--url", url, "--json", "base"), ("base", "--url", url, "--json")):
        ended = invoke(*arguments, url=nowhere)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["in_features"] == 64


def test_the_service_and_its_base_are_described(run: Run, ask: Ask, url: str, trained: Ended) -> None:
    found = ask("status")
    assert (found["url"], found["ready"], found["base"]["source"]) == (url, True, "digits")
    assert found["adapters"] >= 1
    assert "ready" in run("status").stdout
    assert ask("base")["out_features"] == 10
    assert "64" in run("base").stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("loraplex adapter ac", "acme"),
        ("loraplex predict ac", "acme"),
        ("loraplex dataset show turned", "turned-digits"),
        ("loraplex rollb", "rollback"),
        ("loraplex serve --wor", "--workers"),
        ("loraplex train --meth", "--method"),
    ],
)
def test_a_shell_completes_commands_options_and_names(url: str, trained: Ended, line: str, expected: str) -> None:
    words = len(line.split()) - 1
    asked = {"_LORAPLEX_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(words)}
    assert expected in invoke(url=url, variables=asked).stdout.split()


def test_a_reader_that_goes_away_is_no_error_to_speak_of(url: str, trained: Ended) -> None:
    ended = subprocess.run(
        ["bash", "-c", f"{LORAPLEX} dataset show turned-digits | head -1"],
        env=environment(url=url),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert ended.stdout.startswith("data set")
    assert ended.stderr == ""


def test_the_page_has_every_command_and_option_as_the_code_has_it() -> None:
    page = PAGE.read_text()
    assert page == page_from_the_code(page), "write it anew: python -m tests.integration.cli.command_reference"


@pytest.mark.slow
def test_the_page_s_quick_start_runs_as_written(url: str, trained: Ended, tmp_path: Path) -> None:
    found = re.search(r"<!-- session:.*?-->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "examples").symlink_to(DIGITS.parent)
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", found[1]],
        cwd=tmp_path,
        env=environment(url=url) | {"PATH": f"{LORAPLEX.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    assert "is live" in ended.stdout
    assert "digit is right in" in ended.stdout
