"""The service with its blobs in a bucket: publish, predict, train, an outage, and maintenance."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from adapters.storage.blob_location import BLOB_CACHE, BlobLocation
from app.service import Service
from app.settings import Settings, SettingsError, load_settings
from tests.support.catalog_factories import BASE, make_adapter
from tests.support.hostile_proxy import HostileProxy, refuse
from tests.support.object_server import bucket_of, objects_in
from tests.support.service import eventually, serving

ROWS = torch.randn(64, BASE.in_features, generator=torch.Generator().manual_seed(1))

Start = Callable[..., tuple[httpx.Client, Service]]


@pytest.fixture
def start(in_bucket: BlobLocation, proxy: HostileProxy) -> Iterator[Start]:
    """Start a service whose bucket is behind the proxy."""
    with ExitStack() as stack:

        def _start(folder: Path = in_bucket.folder, **options: Any) -> tuple[httpx.Client, Service]:
            settings = Settings(
                base="random:10,2,42",
                data_dir=folder,
                blob_url=in_bucket.url,
                allow_mixed_storage=True,
                cache_bytes=options.pop("cache_bytes", 2**30),
            )
            return stack.enter_context(serving(settings, **options))

        yield _start


def _upload(client: httpx.Client, name: str, seed: int) -> httpx.Response:
    adapter = make_adapter(seed)
    return client.put(f"/adapters/{name}", json={"A": adapter.a_OR.tolist(), "B": adapter.b_RI.tolist()})


def _predict(client: httpx.Client, name: str | None) -> httpx.Response:
    return client.post("/predict", json={"adapter": name, "inputs": ROWS[:3].tolist()})


def _check(answer: httpx.Response, seed: int) -> None:
    """Compare an answer with the dense layer that has the adapter of a seed."""
    assert answer.status_code == 200, answer.text
    adapter = make_adapter(seed)
    weight_OI = BASE.weight_OI.double() + adapter.a_OR.double() @ adapter.b_RI.double()
    bias_O = torch.zeros(BASE.out_features) if BASE.bias_O is None else BASE.bias_O
    expected = ROWS[:3].double() @ weight_OI.T + bias_O.double()
    np.testing.assert_allclose(answer.json()["outputs"], expected.numpy(), rtol=1e-5, atol=1e-5)


def _forget_copies(folder: Path) -> None:
    shutil.rmtree(folder / BLOB_CACHE)
    (folder / BLOB_CACHE).mkdir()


def test_what_was_published_and_trained_on_one_machine_is_served_from_the_bucket(
    start: Start, in_bucket: BlobLocation, proxy: HostileProxy
) -> None:
    client, _ = start(trainer=True, own_fitter=True)
    assert _upload(client, "acme", 1).status_code == 201
    header = ",".join([*(f"x{number}" for number in range(10)), "y0", "y1"])
    table = "\n".join([header, *(",".join(map(str, [*row, 1.0, 2.0])) for row in ROWS.tolist())])
    stored = client.put("/datasets/rows", content=table.encode(), headers={"Content-Type": "text/csv"})
    assert stored.status_code == 201, stored.text
    data = {"dataset": "rows", "inputs": {"prefix": "x"}, "targets": {"prefix": "y"}}
    training = {"method": "closed_form", "loss": "mse"}
    job = client.post("/adapters", json={"name": "trained", "rank": 2, "data": data, "training": training}).json()
    assert "id" in job, job
    done = eventually(lambda: _ended(client, job["id"]), what="the end of the job")
    assert done["status"] == "succeeded", done
    before = _predict(client, "trained").json()
    assert len(objects_in(in_bucket, "blobs")) >= 3
    assert not (in_bucket.folder / "blobs").exists()
    # A publish that the bucket does not take is repeated, without another fit.
    job = client.post("/adapters", json={"name": "late", "rank": 2, "data": data, "training": training}).json()
    with proxy.failing(refuse):
        eventually(lambda: client.get(f"/jobs/{job['id']}").json()["status"] == "running", what="the start of the job")
        eventually(lambda: proxy.faults >= 12, what="several attempts to publish")
        assert client.get("/adapters/late").status_code == 404
    done = eventually(lambda: _ended(client, job["id"]), what="the end of the job")
    assert (done["status"], done["attempt"]) == ("succeeded", 1)
    # As on another machine: the catalogue, and nothing of the blobs.
    _forget_copies(in_bucket.folder)
    other, _ = start()
    _check(_predict(other, "acme"), 1)
    assert _predict(other, "trained").json()["outputs"] == before["outputs"]
    assert other.get("/datasets/rows/preview?limit=2").status_code == 200


def _ended(client: httpx.Client, job: str) -> dict[str, Any] | None:
    answer: dict[str, Any] = client.get(f"/jobs/{job}").json()
    return answer if answer["finished_at"] else None


def test_while_the_bucket_is_down_warm_adapters_answer_and_nothing_is_published(
    start: Start, proxy: HostileProxy, in_bucket: BlobLocation
) -> None:
    client, _ = start()
    for number in range(3):
        assert _upload(client, f"tenant-{number}", number).status_code == 201
    _forget_copies(in_bucket.folder)
    assert _predict(client, "tenant-0").status_code == 200
    stored = objects_in(in_bucket, "blobs")
    with proxy.failing(refuse):
        for _ in range(5):
            _check(_predict(client, "tenant-0"), 0)
            assert _predict(client, None).status_code == 200
        cold, published = _predict(client, "tenant-1"), _upload(client, "new", 9)
        for answer in (cold, published):
            assert (answer.status_code, answer.json()["code"]) == (503, "storage_failed")
            assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/adapters/new").status_code == 404
        assert client.get("/readyz").status_code == 200
        # The list needs only the catalogue.
        assert len(client.get("/adapters").json()["data"]) == 3
    _check(_predict(client, "tenant-1"), 1)
    assert objects_in(in_bucket, "blobs") == stored
    with closing(sqlite3.connect(in_bucket.folder / "catalog.sqlite3")) as catalog:
        files = {file for (file,) in catalog.execute("SELECT file FROM versions")}
    assert files == stored
    assert _upload(client, "new", 9).status_code == 201


def test_a_damaged_object_is_503_until_the_same_bytes_are_uploaded_again(start: Start, in_bucket: BlobLocation) -> None:
    client, _ = start(cache_bytes=0)
    assert _upload(client, "acme", 1).status_code == 201
    (name,) = objects_in(in_bucket, "blobs")
    bucket_of(in_bucket).put(f"blobs/{name}", b"something else")
    _forget_copies(in_bucket.folder)
    answer = _predict(client, "acme")
    assert (answer.status_code, answer.json()["code"]) == (503, "blob_corrupt")
    assert _upload(client, "acme", 1).status_code == 200
    _check(_predict(client, "acme"), 1)
    (aside,) = objects_in(in_bucket, "quarantine")
    assert aside.endswith(name)


def test_a_bucket_with_sqlite_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_BLOB_URL", "s3://bucket/prefix")
    with pytest.raises(SettingsError, match="LORAPLEX_ALLOW_MIXED_STORAGE=true"):
        load_settings()
    monkeypatch.setenv("LORAPLEX_ALLOW_MIXED_STORAGE", "true")
    assert load_settings().blob_location.url == "s3://bucket/prefix"
    for url in ("s3://", "https://bucket", "s3://Bucket", "bucket"):
        monkeypatch.setenv("LORAPLEX_BLOB_URL", url)
        with pytest.raises(SettingsError, match="LORAPLEX_BLOB_URL"):
            load_settings()
