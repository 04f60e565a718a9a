"""The examples do what their pages say: every block runs as it stands, and prints what stands below it."""

import contextlib
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.md"))
ADDRESS = "http://127.0.0.1:8000"
_NUMBER = r"-?\d+\.\d+"
NEAR = 0.03
"""How far a number with a fraction may be from the page's, relatively or, below 1, absolutely: another processor rounds
otherwise. Whole numbers and words may not."""


def _blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language, code, and what it is said to print."""
    found = re.findall(r"```(\w+)\n(.*?)```\n", page.read_text(), re.DOTALL)
    assert [language for language, _ in found[1::2]] == ["text"] * (len(found) // 2), "a block without its output"
    for (language, code), (_, printed) in zip(found[::2], found[1::2], strict=True):
        yield language, code, printed


def _run(language: str, code: str, folder: Path, names: dict[str, Any]) -> str:
    if language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", code]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True).stdout
    assert language == "python"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def _check(printed: str, said: str) -> None:
    assert re.sub(_NUMBER, "#", printed) == re.sub(_NUMBER, "#", said), printed
    for one, other in zip(re.findall(_NUMBER, printed), re.findall(_NUMBER, said), strict=True):
        assert float(one) == pytest.approx(float(other), rel=NEAR, abs=NEAR), printed


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a page does not close the files that it reads through once
def test_an_example_runs_as_written_and_prints_what_it_says(
    page: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = re.search(r"^    \.venv/bin/loraplex serve --base (\S+) ", page.read_text(), re.MULTILINE)
    assert base is not None
    client, _ = serve(base=base[1], trainer=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        for language, code, said in _blocks(page):
            here = code.replace(ADDRESS, str(client.base_url).rstrip("/"))
            _check(_run(language, here, tmp_path, names), said)
    finally:
        if "client" in names:
            names["client"].close()


def test_there_is_an_example_for_each_task() -> None:
    assert [page.stem for page in EXAMPLES] == ["classification", "fleet", "regression", "retrieval"]
