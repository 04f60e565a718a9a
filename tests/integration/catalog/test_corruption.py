"""A file that is not what was stored is never served, and harms nobody else."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.names import Reference
from app.service import Service
from tests.conftest import Serve
from tests.support.catalog_factories import (
    INPUTS_NI,
    as_upload,
    dense_answer,
    make_adapter,
    publication,
    quarantined_files,
    referenced_files,
    stored_files,
)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _exchange(path: Path) -> None:
    path.write_bytes(make_adapter(99).canonical_bytes)


@pytest.fixture
def harm(serve: Serve) -> Callable[[Callable[[Path], None]], httpx.Client]:
    """A client of a service that has `good` and `bad`, the file of `bad` harmed."""

    def make(action: Callable[[Path], None]) -> httpx.Client:
        client, service = serve(cache_bytes=0)
        for seed, name in enumerate(("good", "bad")):
            client.put(f"/adapters/{name}", json=as_upload(make_adapter(seed))).raise_for_status()
        action(service.catalog.blobs.local(service.catalog.find(Reference("bad"), tenant="default").file))
        return client

    return make


@pytest.mark.parametrize("action", [_flip, _cut_short, _exchange, Path.unlink])
def test_a_harmed_file_is_an_error_of_its_adapter_alone(
    harm: Callable[[Callable[[Path], None]], httpx.Client], action: Callable[[Path], None]
) -> None:
    client = harm(action)
    rows = INPUTS_NI.tolist()
    for answer in (
        client.post("/predict", json={"adapter": "bad", "inputs": rows}),
        client.post("/predict", json={"adapters": ["good", "bad", None, None, None], "inputs": rows}),
        client.get("/adapters/bad/download"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "blob_corrupt")
    answer = client.post("/predict", json={"adapter": "good", "inputs": rows})
    outputs = torch.tensor(answer.json()["outputs"], dtype=torch.float64)
    torch.testing.assert_close(outputs, dense_answer(make_adapter(0)), rtol=1e-5, atol=1e-5)
    assert client.get("/adapters/good/download").status_code == 200
    # Uploading it again cures it.
    assert client.put("/adapters/bad", json=as_upload(make_adapter(5))).status_code == 201
    assert client.post("/predict", json={"adapter": "bad", "inputs": rows}).status_code == 200
    assert client.delete("/adapters/bad").status_code == 204


@pytest.mark.parametrize("action", [_flip, _cut_short, _exchange, Path.unlink])
def test_the_same_bytes_again_repair_a_harmed_file(
    harm: Callable[[Callable[[Path], None]], httpx.Client], tmp_path: Path, action: Callable[[Path], None]
) -> None:
    client = harm(action)
    body = {"adapter": "bad", "inputs": INPUTS_NI.tolist()}
    assert client.post("/predict", json=body).json()["code"] == "blob_corrupt"
    assert int(client.post("/predict", json=body).headers["Retry-After"]) >= 1
    before = client.get("/adapters/bad").json()
    answer = client.put("/adapters/bad", json=as_upload(make_adapter(1)))
    assert (answer.status_code, answer.json()) == (200, before["live"])
    predicted = client.post("/predict", json=body)
    assert predicted.status_code == 200, predicted.text
    assert predicted.json()["adapter"]["digest"] == make_adapter(1).digest
    assert client.get("/adapters/bad/download").status_code == 200
    assert client.get("/adapters/bad").json() == before
    # What was wrong is kept for whoever wants to know why; nothing else is.
    assert stored_files(tmp_path / "data") == referenced_files(tmp_path / "data")
    assert len(quarantined_files(tmp_path / "data")) == (0 if action is Path.unlink else 1)


def test_a_sound_copy_stays_where_it_is(serve: Serve) -> None:
    client, service = serve()
    for status in (201, 200):
        assert client.put("/adapters/acme", json=as_upload(make_adapter(1))).status_code == status
        file, revision = service.catalog.find(Reference("acme"), tenant="default").file, service.catalog.revision()
    assert (
        (service.catalog.find(Reference("acme"), tenant="default").file, service.catalog.revision())
        == (file, 1)
        == (file, revision)
    )


def test_one_of_a_fleet_is_repaired_and_the_others_keep_their_file(catalog: Catalog, folder: Path) -> None:
    first, second = (
        one.version for one in catalog.publish([publication("a", 1), publication("b", 2)], tenant="default")
    )
    _flip(catalog.blobs.local(second.file))
    repaired, is_new = catalog.put(publication("b", 2), tenant="default")
    assert not is_new
    assert repaired == catalog.find(Reference("b"), tenant="default")
    assert (repaired.version, repaired.digest, repaired.offset) == (1, second.digest, 0)
    assert read_adapter(repaired, catalog.blobs).digest == second.digest
    assert read_adapter(catalog.find(Reference("a"), tenant="default"), catalog.blobs).digest == first.digest
    assert stored_files(folder) == {first.file, repaired.file}


def test_a_condition_that_fails_repairs_nothing(harm: Callable[[Callable[[Path], None]], httpx.Client]) -> None:
    client = harm(_flip)
    answer = client.put("/adapters/bad", json=as_upload(make_adapter(1)), headers={"If-None-Match": "*"})
    assert answer.status_code == 412
    assert client.post("/predict", json={"adapter": "bad", "inputs": INPUTS_NI.tolist()}).status_code == 503


@pytest.mark.parametrize("action", [_flip, Path.unlink])
def test_the_same_data_set_again_repairs_a_harmed_file(serve: Serve, action: Callable[[Path], None]) -> None:
    client, service = serve()
    headers = {"Content-Type": "text/csv"}
    first = client.put("/datasets/rows", content=b"x\n1\n2\n", headers=headers).json()
    (name,) = stored_files(service.settings.data_dir)
    file = service.catalog.blobs.local(name)
    whole = file.read_bytes()
    action(file)
    answer = client.put("/datasets/rows", content=b"x\n1\n2\n", headers=headers)
    assert (answer.status_code, answer.json()) == (200, first)
    assert client.get("/datasets/rows/preview").json()["rows"] == [{"x": 1}, {"x": 2}]
    (repaired,) = stored_files(service.settings.data_dir)
    assert service.catalog.blobs.local(repaired).read_bytes() == whole
    assert client.put("/datasets/rows", content=b"x\n1\n2\n", headers=headers).status_code == 200
    assert stored_files(service.settings.data_dir) == {repaired}


def _meet_a_deletion(service: Service, name: str) -> None:
    """Let somebody delete `name` right after it was looked up, before its file is read: once."""
    finders = {finder: getattr(service.catalog, finder) for finder in ("find", "find_all")}

    def then_delete(find: Callable[..., object]) -> Callable[..., object]:
        def found(*asked: object, **options: object) -> object:
            result = find(*asked, **options)
            for finder, own in finders.items():
                setattr(service.catalog, finder, own)
            service.catalog.delete(name, tenant="default", purge=True)
            return result

        return found

    for finder, own in finders.items():
        setattr(service.catalog, finder, then_delete(own))


@pytest.mark.parametrize("call", ["predict", "predict by row", "download", "train"])
def test_what_was_deleted_between_the_look_and_the_read_is_not_found(serve: Serve, call: str) -> None:
    client, service = serve(cache_bytes=0)
    client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
    _meet_a_deletion(service, "acme")
    rows = INPUTS_NI.tolist()
    if call == "download":
        answer = client.get("/adapters/acme/download")
    elif call == "train":
        training = {"method": "sgd", "init": {"adapter": "acme"}}
        data = {"inputs": rows, "targets": [[0.0, 0.0]] * len(rows)}
        answer = client.post("/adapters", json={"name": "b", "rank": 2, "data": data, "training": training})
    elif call == "predict":
        answer = client.post("/predict", json={"adapter": "acme", "inputs": rows})
    else:
        answer = client.post("/predict", json={"adapters": ["acme"] * len(rows), "inputs": rows})
    assert (answer.status_code, answer.json()["code"]) == (404, "adapter_not_found")


def test_what_was_made_again_between_the_look_and_the_read_is_answered_as_it_is_now(serve: Serve) -> None:
    client, service = serve(cache_bytes=0)
    client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
    delete = service.catalog.delete

    def delete_and_make_again(name: str, *, tenant: str, purge: bool) -> None:
        delete(name, tenant=tenant, purge=purge)
        service.catalog.put(publication("acme", 2), tenant="default")

    for _ in range(3):
        service.catalog.delete = delete_and_make_again  # type: ignore[method-assign,assignment]
        _meet_a_deletion(service, "acme")
        answer = client.get("/adapters/acme/download")
        assert answer.status_code == 200
        _meet_a_deletion(service, "acme")
        answer = client.post("/predict", json={"adapter": "acme", "inputs": INPUTS_NI.tolist()})
        assert answer.status_code == 200
        assert answer.json()["adapter"]["digest"] == make_adapter(2).digest
