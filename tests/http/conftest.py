"""Services that the modules share which need no more than that: one that trains, and one that serves."""

from collections.abc import Iterator

import httpx
import pytest
from safetensors.torch import save_file

from adapters.versions import Publication, Source
from app.service import Service
from app.settings import Settings
from tests.adapters.dense import random_adapter
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


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A client and the service behind it: a 10 → 2 base layer, `acme` with versions 1 and 2, `globex` with another
    rank, scaling and a bias, and `draft`, of which no version is live."""
    settings = Settings(base="random:10,2,42", data_dir=tmp_path_factory.mktemp("models") / "data", max_rows=64)
    made = {
        "acme": [random_adapter(2, 10, 1, seed=1), random_adapter(2, 10, 3, seed=2)],
        "globex": [random_adapter(2, 10, 4, alpha=-2.0, bias=True, seed=3)],
        "draft": [random_adapter(2, 10, 1, seed=4)],
    }
    with serving(settings) as (client, service):
        for name, adapters in made.items():
            for adapter in adapters:
                publication = Publication(
                    name=name, adapter=adapter, base=service.base, source=Source.UPLOAD, moves_live=name != "draft"
                )
                service.catalog.publish([publication])
        yield client, service
