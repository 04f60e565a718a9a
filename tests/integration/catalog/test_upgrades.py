"""A filled catalogue of every earlier schema is upgraded, and everything in it still answers."""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.clock import rfc3339
from adapters.maintenance.doctor import diagnose
from adapters.storage import migrations
from tests.conftest import Serve
from tests.support.catalog_factories import (
    BASE,
    INPUTS_NI,
    as_upload,
    dense_answer,
    make_adapter,
    migrate,
    training_job,
)
from tests.support.totals_oracle import count_totals, stored_totals

REVISIONS = sorted(path.stem[:4] for path in (Path(migrations.__file__).parent / "versions").glob("[0-9]*.py"))
ROWS_BLOB, PACK = f"{3:012x}-{'d' * 32}", f"{2:012x}-{'a' * 32}"
CREATED_AT = rfc3339(1e9)


def _insert(connection: sqlite3.Connection, table: str, **values: object) -> None:
    """Insert a row, with those of the columns that the table has at this revision; none without the table."""
    columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    row = {name: value for name, value in values.items() if name in columns}
    if row:
        names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))


def _version(name: str, number: int, seed: int, offset: int) -> Mapping[str, object]:
    adapter = make_adapter(seed)
    lineage = {"loss": "mse", "seed": 3}
    return {
        "tenant": "default",
        "adapter": name,
        "version": number,
        "file": PACK,
        "offset": offset,
        "digest": adapter.digest,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "rslora": False,
        "base": BASE.fingerprint,
        "created_at": CREATED_AT,
        "source": "upload",
        "relative_norm": 0.5,
        "bytes": len(adapter.canonical_bytes),
        "metrics": '{"train_loss": 1.5}',
        "lineage": json.dumps(lineage),
        "labels": '["cat", "dog"]',
        "loss": "mse",
    }


def _fill(folder: Path, revision: str) -> None:
    """Make a data folder with the tables of a revision, and rows in each of them."""
    folder.mkdir()
    catalog, blobs = folder / "catalog.sqlite3", folder / "blobs"
    blobs.mkdir()
    migrate(catalog, revision)
    contents = [make_adapter(seed).canonical_bytes for seed in (1, 2, 3)]
    (blobs / PACK).write_bytes(b"".join(contents))
    sizes = [len(content) for content in contents]
    with closing(sqlite3.connect(catalog)) as connection, connection:
        connection.execute("UPDATE catalog SET revision = 5")
        row = connection.execute("SELECT * FROM catalog").fetchone()
        if revision >= "0003":
            for path in (blobs / "store-id", folder / "store-id"):
                path.write_text(row[2])
        common = {"tenant": "default", "created_at": CREATED_AT}
        for name, following, is_deleted in (("acme", 3, False), ("globex", 2, False), ("gone", 4, True)):
            state = {"next_version": following, "deleted": is_deleted, "deletions": int(is_deleted)}
            _insert(connection, "adapters", name=name, **state, **common)
        for name, number, seed, offset in (
            ("acme", 1, 1, 0),
            ("acme", 2, 2, sizes[0]),
            ("globex", 1, 3, sum(sizes[:2])),
        ):
            _insert(connection, "versions", **_version(name, number, seed, offset))
        for name, live in (("acme", 1), ("globex", 1)):
            _insert(connection, "aliases", tenant="default", adapter=name, alias="live", version=live)
        if revision >= "0007":
            _insert(connection, "trashed_versions", **_version("gone", 3, 3, sum(sizes[:2])), deleted_at="9999")
            _insert(connection, "trashed_aliases", tenant="default", adapter="gone", alias="live", version=3)
        entry = {"time": CREATED_AT, "tenant": "default", "action": "adapter.publish", "resource": "adapters/acme"}
        _insert(connection, "audit", sequence=1, key_id="0123456789abcdef", **entry)
        _fill_jobs(connection, common)
        if revision >= "0002":
            (blobs / ROWS_BLOB).write_bytes(b"rows")
            _fill_data_sets(connection, common)
        numbers = {"adapters": 2, "versions": 3, "version_bytes": sum(sizes), "datasets": 1, "dataset_bytes": 4}
        _insert(connection, "totals", tenant="default", trashed_bytes=sizes[2], **numbers)


def _fill_jobs(connection: sqlite3.Connection, common: Mapping[str, Any]) -> None:
    spec = training_job(data={"rows": 7}).to_json()
    # As the first release stored it.
    spec["shown"] = {"data": {"rows": 7}}
    ended = {"attempt": 1, "fence": 1, "deletions": 0, "base": BASE.fingerprint, "spec": json.dumps(spec)}
    for job_id, status, error in (
        ("good", "succeeded", None),
        ("bad", "failed", '{"code": "diverged", "detail": "?"}'),
    ):
        result = {"name": "acme", "version": 2, "digest": make_adapter(2).digest} if error is None else None
        values = {"status": status, "error": error, "history": "[[1, 0.5]]", "result": json.dumps(result)}
        _insert(connection, "jobs", id=job_id, adapter="acme", finished_at=CREATED_AT, **values, **ended, **common)
        version = None if result is None else result["version"]
        adapter = {"name": "acme", "rows": 7, "deletions": 0, "moved_live": False, "version": version, "error": error}
        _insert(connection, "job_adapters", job=job_id, position=0, **adapter)


def _fill_data_sets(connection: sqlite3.Connection, common: Mapping[str, Any]) -> None:
    _insert(connection, "datasets", name="rows", next_version=2, deleted=False, **common)
    columns = [{"name": "x", "type": "number", "width": None, "nulls": 0, "not_finite": 0}]
    stored = {"digest": f"sha256:{sha256(b'rows').hexdigest()}", "bytes": 4, "rows": 1, "file": ROWS_BLOB}
    described = {"content_type": "text/csv", "columns": json.dumps(columns), "bad_rows": "[]"}
    _insert(connection, "dataset_versions", dataset="rows", version=1, **stored, **described, **common)


@pytest.mark.parametrize("revision", REVISIONS)
def test_everything_answers_after_an_upgrade(serve: Serve, tmp_path: Path, revision: str) -> None:
    _fill(tmp_path / "data", revision)
    assert diagnose(tmp_path / "data").findings == []
    client, _ = serve()
    assert stored_totals(tmp_path / "data") == count_totals(tmp_path / "data")
    names = [adapter["name"] for adapter in client.get("/adapters").raise_for_status().json()["data"]]
    assert names == ["acme", "globex"]
    for reference, seed in (("acme", 1), ("acme@2", 2), ("globex", 3)):
        answer = client.post("/predict", json={"adapter": reference, "inputs": INPUTS_NI.tolist()}).raise_for_status()
        np.testing.assert_allclose(answer.json()["outputs"], dense_answer(make_adapter(seed)), rtol=1e-4, atol=1e-4)
    newest = client.get("/adapters/acme/versions/2").raise_for_status().json()
    assert (newest["digest"], newest["created_at"]) == (make_adapter(2).digest, CREATED_AT)
    assert newest["metrics"] == {"train_loss": 1.5}
    assert client.get("/adapters/acme/download").status_code == 200

    jobs = client.get("/jobs").raise_for_status().json()["data"]
    assert [(job["id"], job["status"]) for job in jobs] == [("bad", "failed"), ("good", "succeeded")]
    good = client.get("/jobs/good").raise_for_status().json()
    assert (good["result"]["version"], good["history"]) == (2, [[1, 0.5]])
    (trained,) = client.get("/jobs/good/adapters").raise_for_status().json()["data"]
    assert (trained["name"], trained["rows"]) == ("acme", 7)
    assert [job["id"] for job in client.get("/jobs?adapter=acme").json()["data"]] == ["bad", "good"]
    sets = [entry["name"] for entry in client.get("/datasets").raise_for_status().json()["data"]]
    assert sets == (["rows"] if revision >= "0002" else [])

    entries = client.get("/audit").raise_for_status().json()["data"]
    assert [entry["action"] for entry in entries] == (["adapter.publish"] if revision >= "0013" else [])

    # Numbers go on, and a deleted name is still deleted.
    assert client.get("/adapters/gone").status_code == 404
    restored = client.post("/adapters/gone/restore")
    assert restored.status_code == (200 if revision >= "0007" else 404)
    client.delete("/adapters/gone")
    for name, number in (("acme", 3), ("gone", 4)):
        put = client.put(f"/adapters/{name}", json=as_upload(make_adapter(9))).raise_for_status()
        assert put.json()["version"] == number
    assert client.post("/adapters/gone/restore").json()["code"] == "name_taken"
    assert stored_totals(tmp_path / "data") == count_totals(tmp_path / "data")
    assert diagnose(tmp_path / "data").findings == []
