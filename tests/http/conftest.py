"""One service that trains, shared by the modules that need no more than that."""

from collections.abc import Iterator

import httpx
import pytest
from safetensors.torch import save_file

from app.service import Service
from app.settings import Settings
from tests.harness import serving
from tests.http import training_world as world

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A client and the service behind it: `training_world`'s base layer, from a file, and a trainer."""
    folder = tmp_path_factory.mktemp("service")
    save_file({"weight": world.WEIGHT, "bias": world.BIAS}, folder / "base.safetensors")
    settings = Settings(base=str(folder / "base.safetensors"), data_dir=folder / "data")
    with serving(settings, trainer=True) as both:
        yield both


@pytest.fixture
def trained(running: Running) -> httpx.Client:
    """A client of the shared service; every test trains under names of its own."""
    return running[0]
