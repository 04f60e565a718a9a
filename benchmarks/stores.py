"""Data folders with published adapters, made without the service: thousands of names in a few transactions."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.access.tenants import DEFAULT_TENANT
from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Publication, Source
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.storage.database import Database
from benchmarks.requests import Shape
from benchmarks.servers.layer import SEED
from benchmarks.tenants import Factors, factors

_AT_ONCE = 1_000
_MAKE_STORE = (
    "import sys; from pathlib import Path;"
    "from benchmarks.requests import Shape; from benchmarks.stores import make_store;"
    "folder, *numbers = sys.argv[1:]; width, height, tenants, rank = map(int, numbers);"
    "make_store(Path(folder), Shape(width, height), tenants=tenants, rank=rank)"
)


def base_name(shape: Shape) -> str:
    """Return the base layer that the service loads, which the peers create too."""
    return f"random:{shape.in_features},{shape.out_features},{SEED}"


def load_base(shape: Shape) -> BaseLayer:
    """Return the layer as the service loads it."""
    return load_base_layer(base_name(shape), device="cpu")


def as_adapter(tenant: Factors) -> Adapter:
    """Return a tenant's factors as the service stores them."""
    return Adapter(torch.from_numpy(tenant.a_OR), torch.from_numpy(tenant.b_RI), None, alpha=float(tenant.rank))


def make_store(
    folder: Path,
    shape: Shape,
    *,
    tenants: int,
    rank: int,
    owners: Sequence[str] = (DEFAULT_TENANT,),
    database: Database | None = None,
) -> Path:
    """Create and return a data folder in which each of the owners has that many published adapters.

    The catalogue is in the folder too, unless `database` says where it is. The database is closed at the end.
    """
    folder.mkdir(parents=True)
    base = load_base(shape)
    catalog = Catalog(folder, now=time.time, database=database)
    for first in range(0, tenants, _AT_ONCE):
        publications = []
        for number in range(first, min(first + _AT_ONCE, tenants)):
            tenant = factors(number, shape.in_features, shape.out_features, rank)
            adapter = as_adapter(tenant)
            publications.append(Publication(name=tenant.name, adapter=adapter, base=base, source=Source.UPLOAD))
        for owner in owners:
            catalog.publish(publications, tenant=owner)
    catalog.database.close()
    return folder


def make_store_of(root: Path, folder: Path, shape: Shape, *, tenants: int, rank: int) -> Path:
    """Do the same with the code of the checkout in `root`: an older one cannot open what a newer one has migrated."""
    numbers = map(str, (shape.in_features, shape.out_features, tenants, rank))
    subprocess.run([sys.executable, "-c", _MAKE_STORE, str(folder), *numbers], cwd=root, check=True)
    return folder


def memory_bytes(shape: Shape, rank: int) -> int:
    """Return the bytes that the service counts for one of these adapters."""
    return as_adapter(factors(0, shape.in_features, shape.out_features, rank)).memory_bytes
