"""JSON in the catalogue: without NaN from now on, and still read with it."""

import json
import math
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from adapters.catalog.catalog import Catalog
from adapters.names import Reference
from tests.support.catalog_factories import migrate, publication

NAN = float("nan")
_COLUMNS = (
    "tenant, adapter, version, digest, rank, alpha, rslora, base, created_at, source, metrics, file, offset, bytes,"
    " lineage"
)


def test_numbers_that_are_not_finite_are_stored_as_null(catalog: Catalog, folder: Path) -> None:
    metrics = {"loss": NAN, "curve": [1.5, math.inf, (-math.inf, "NaN")], "rows": 3}
    catalog.publish([publication("acme", metrics=metrics, lineage={"loss": "mse", "best": NAN})], tenant="default")
    with closing(sqlite3.connect(folder / "catalog.sqlite3")) as connection:
        ((stored, lineage),) = connection.execute("SELECT metrics, lineage FROM versions").fetchall()
    expected = {"loss": None, "curve": [1.5, None, [None, "NaN"]], "rows": 3}
    assert json.loads(stored, parse_constant=_refuse) == expected
    assert json.loads(lineage, parse_constant=_refuse) == {"loss": "mse", "best": None}
    assert catalog.find(Reference("acme"), tenant="default").metrics == expected


def test_rows_of_older_releases_with_nan_are_read_and_get_their_loss(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    migrate(path, "0003")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "f").touch()
    lineages = {f"a-{number:04}": None if number % 3 == 0 else {"loss": "mse", "best": NAN} for number in range(1100)}
    common = (1, "sha256:0", 1, 1.0, 0, "", "", "job", '{"error": NaN}', "f", 0, 1)
    rows = [
        ("default", name, *common, None if lineage is None else json.dumps(lineage))
        for name, lineage in lineages.items()
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(f"INSERT INTO versions ({_COLUMNS}) VALUES ({','.join('?' * 15)})", rows)
        connection.executemany("INSERT INTO aliases VALUES ('default', ?, 'live', 1)", [(name,) for name in lineages])
        connection.executemany(
            "INSERT INTO adapters VALUES ('default', ?, '', 2, 0, 0)", [(name,) for name in lineages]
        )
    catalog = Catalog(tmp_path, now=time.time)
    with closing(catalog):
        served = catalog.find_all([Reference(name) for name in lineages], tenant="default")
        assert {name: served[Reference(name)].loss for name in lineages} == {
            name: None if lineage is None else "mse" for name, lineage in lineages.items()
        }
        version = catalog.find(Reference("a-0001"), tenant="default")
    assert version.metrics is not None
    assert version.lineage is not None
    assert math.isnan(version.metrics["error"])  # type: ignore[arg-type]
    assert math.isnan(version.lineage["best"])  # type: ignore[arg-type]


def _refuse(constant: str) -> None:
    raise ValueError(constant)
