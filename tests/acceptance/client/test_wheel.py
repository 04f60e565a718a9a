"""The client's wheel works where there is nothing of the service, beside its user's own `app` and `adapters`."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import Serve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
USERS = """
import importlib, json, os, sys
import numpy as np
import app, adapters, loraplex

def is_there(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True

with loraplex.Client(os.environ["SERVICE"]) as client:
    x = np.random.default_rng(0).normal(size=(20, 10))
    y = x[:, :2] * 3
    job = client.train("acme", rank=2, inputs=x, targets=y, training={"method": "closed_form"}).wait(timeout=60)
    error = float(abs(client.predict("acme", x).outputs - y).max())
print(json.dumps({
    "app": app.MARKER, "adapters": adapters.MARKER, "loraplex": loraplex.__file__, "adapter": str(job.result),
    "error": error, "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
    "there": [name for name in ("torch", "fastapi", "sqlalchemy", "peft", "pyarrow") if is_there(name)],
}))
"""


def needed(name: str, seen: set[str]) -> set[str]:
    """The distributions that one needs, and all that these need, by name."""
    for text in requires(name) or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        below = canonicalize_name(requirement.name)
        if wanted and below not in seen:
            seen.add(below)
            needed(below, seen)
    return seen


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "client", folder / "client", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    )
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "client")
    (built,) = folder.glob("loraplex-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed and what it needs beside it, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    for name in needed("loraplex", set()):
        for top in tops(name):
            (folder / top.name).symlink_to(top)
    return folder


def tops(name: str) -> Iterator[Path]:
    """What a distribution has at the top of the folder that it is installed in."""
    found = distribution(name)
    parts = {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}
    return (Path(str(found.locate_file(part))) for part in parts)


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def isolated(site: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with `site` and the folder it runs in, and with nothing of this environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAPLEX_"))}
    return subprocess.run(
        [sys.executable, "-S", "-W", "error", *arguments],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(site)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_trains_and_predicts_beside_its_users_own_packages(serve: Serve, site: Path, tmp_path: Path) -> None:
    users = tmp_path / "users"
    for package in ("app", "adapters"):
        (users / package).mkdir(parents=True)
        (users / package / "__init__.py").write_text(f'MARKER = "the user\'s {package}"\n')
    (users / "script.py").write_text(USERS)
    http, _ = serve(trainer=True)
    done = isolated(site, users, "script.py", SERVICE=str(http.base_url))
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert (said["app"], said["adapters"]) == ("the user's app", "the user's adapters")
    assert Path(said["loraplex"]).is_relative_to(site)
    assert (said["adapter"], said["there"]) == ("acme@1", [])
    assert said["error"] < 1e-3
    assert not set(said["loaded"]) & {"pydantic", "typer", "starlette", "safetensors", "torch", "fastapi"}


def test_the_command_says_its_help_there(site: Path, tmp_path: Path) -> None:
    done = isolated(site, tmp_path, "-m", "loraplex", "--help")
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_the_wheel_has_the_client_and_its_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"loraplex"}
    source = {path.relative_to(ROOT / "client").as_posix() for path in (ROOT / "client" / "loraplex").rglob("*.py")}
    assert source | {"loraplex/py.typed"} <= set(names)


def test_an_installation_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "client"
    ignored = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT / "client", source, ignore=ignored)
    before = sorted(source.rglob("*"))
    pip("install", "--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site", source)
    assert sorted(source.rglob("*")) == before
    assert (tmp_path / "site" / "loraplex" / "py.typed").is_file()


def test_nothing_of_the_service_is_imported_anywhere_in_the_client() -> None:
    code = "import sys, pkgutil, importlib, loraplex\n"
    code += (
        "names = [m.name for m in pkgutil.walk_packages(loraplex.__path__, 'loraplex.') if '__main__' not in m.name]\n"
    )
    code += "[importlib.import_module(name) for name in names if not name.startswith('loraplex.cli')]\n"
    code += "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    refused = {"app", "adapters", "torch", "fastapi", "sqlalchemy", "pydantic", "pyarrow", "peft"}
    assert not refused & set(json.loads(done.stdout.replace("'", '"')))
