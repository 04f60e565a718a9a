"""The console script as it is installed: whose it is, what it loads, and that a user's folder is not in its way."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, distribution, entry_points
from pathlib import Path

import pytest

from tests.support.service import LORAPLEX, environment, free_port

_RUN = (sys.executable, "-m", "loraplex")
_SECONDS = 30


def _said(*command: object, cwd: Path, status: int = 0, **more: str) -> str:
    ended = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment() | more, capture_output=True, text=True, timeout=_SECONDS
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout if status == 0 else ended.stderr


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that holds packages of the service's names, which end whoever imports them."""
    for package in ("app", "adapters"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    return tmp_path


def test_the_script_is_the_client_s_and_the_service_s_commands_are_its_own() -> None:
    scripts = {entry.name: entry.value for entry in distribution("loraplex").entry_points}
    assert scripts == {"loraplex": "loraplex.cli:main"}
    found = {entry.name: (entry.value, entry.dist.name if entry.dist else "") for entry in _commands()}
    modules = dict.fromkeys(("keys", "serve", "trainer"), "cli")
    modules["migrate"] = "cli_migrate"
    modules |= dict.fromkeys(("backup", "doctor", "gc", "restore"), "cli_maintenance")
    assert found == {name: (f"app.{module}:{name}", "loraplex-server") for name, module in modules.items()}


def test_it_says_its_version(tmp_path: Path) -> None:
    assert _said(LORAPLEX, "--version", cwd=tmp_path) == f"loraplex {distribution('loraplex').version}\n"


@pytest.mark.parametrize(
    "command", [pytest.param((LORAPLEX,), id="script"), pytest.param(_RUN, id="module", marks=pytest.mark.slow)]
)
def test_a_folder_called_app_is_not_in_the_way(command: tuple[object, ...], elsewhere: Path) -> None:
    text = _said(*command, "--help", cwd=elsewhere)
    for name in ("train", "predict", "serve", "trainer"):
        assert f" {name} " in text
    assert "--trainers" in _said(*command, "serve", "--help", cwd=elsewhere)
    assert "--data-dir" in _said(*command, "trainer", "--help", cwd=elsewhere)


def test_another_package_on_the_path_is_named_where_the_service_is_wanted(elsewhere: Path) -> None:
    assert " serve " in _said(LORAPLEX, "--help", cwd=elsewhere, PYTHONPATH=str(elsewhere))
    said = _said(LORAPLEX, "serve", cwd=elsewhere, status=1, PYTHONPATH=str(elsewhere))
    assert "cannot load app.cli:serve: the wrong package" in said
    assert "PYTHONPATH" in said


def test_without_the_service_its_commands_say_how_to_get_it(tmp_path: Path) -> None:
    # As in an environment of the client alone: no distribution brings commands.
    script = "import importlib.metadata as m; m.entry_points = lambda **_: []; from loraplex.cli import main; main()"
    assert " serve " not in _said(sys.executable, "-c", script, "--help", cwd=tmp_path)
    assert "pip install 'loraplex[server]'" in " ".join(
        _said(sys.executable, "-c", script, "serve", cwd=tmp_path, status=2).replace("│", " ").split()
    )


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--help"], {}),
        ([], {"_LORAPLEX_COMPLETE": "complete_bash", "COMP_WORDS": "loraplex adapter a", "COMP_CWORD": "2"}),
    ],
    ids=["help", "completion"],
)
def test_help_and_completion_import_neither_the_service_nor_the_client(
    arguments: list[str], settings: dict[str, str], tmp_path: Path
) -> None:
    script = (
        "import atexit, json, sys; from loraplex.cli import main; "
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr)); main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env=environment(url=f"http://127.0.0.1:{free_port()}") | settings,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    loaded = set(json.loads(ended.stderr))
    assert not loaded & {"torch", "app", "adapters", "fastapi", "sqlalchemy", "pyarrow", "httpx", "numpy"}


@pytest.mark.parametrize(
    "shell", ["bash", pytest.param("zsh", marks=pytest.mark.slow), pytest.param("fish", marks=pytest.mark.slow)]
)
def test_shells_are_told_how_to_complete(shell: str, tmp_path: Path) -> None:
    found = _said(LORAPLEX, "--show-completion", shell, cwd=tmp_path, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_LORAPLEX_COMPLETE" in found


def _commands() -> list[EntryPoint]:
    return list(entry_points(group="loraplex.commands"))
