"""Deleted adapters are kept for some days, and can be restored or purged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.catalog.catalog import Catalog
from adapters.errors import AdapterNotFound, NameTaken
from adapters.names import Reference
from adapters.storage.store_identity import unreferenced
from adapters.storage.totals import read_totals
from tests.conftest import Serve
from tests.support.catalog_factories import (
    INPUTS_NI,
    as_upload,
    dense_answer,
    make_adapter,
    publication,
    put,
    stored_files,
)
from tests.support.databases import open_catalog
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages

DAY = 86_400
ROWS = INPUTS_NI.tolist()


def _upload(client: httpx.Client, name: str, seed: int) -> dict[str, Any]:
    version: dict[str, Any] = (
        client.put(f"/adapters/{name}", json=as_upload(make_adapter(seed))).raise_for_status().json()
    )
    return version


def _code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def _numbers(client: httpx.Client, name: str) -> list[int]:
    return [
        version["version"] for version in client.get(f"/adapters/{name}/versions").raise_for_status().json()["data"]
    ]


def test_a_deleted_adapter_is_gone_until_it_is_restored_as_it_was(client: httpx.Client) -> None:
    versions = [_upload(client, "acme", seed) for seed in (1, 2, 3)]
    client.put("/adapters/acme/aliases/live", json={"version": 2}).raise_for_status()
    before = client.get("/adapters/acme").json()
    assert client.delete("/adapters/acme").status_code == 204
    for path in ("/adapters/acme", "/adapters/acme/versions", "/adapters/acme/versions/2", "/adapters/acme/download"):
        assert _code(client.get(path)) == (404, "adapter_not_found")
    for reference in ("acme", "acme@2"):
        answer = client.post("/predict", json={"adapter": reference, "inputs": ROWS})
        assert _code(answer) == (404, "adapter_not_found")
    assert client.get("/adapters").json()["data"] == []
    assert _code(client.delete("/adapters/acme")) == (404, "adapter_not_found")

    restored = client.post("/adapters/acme/restore")
    assert restored.status_code == 200
    assert restored.json() == before == client.get("/adapters/acme").json()
    assert [client.get(f"/adapters/acme/versions/{number}").json() for number in (1, 2, 3)] == versions
    answer = client.post("/predict", json={"adapter": "acme", "inputs": ROWS}).json()
    assert answer["adapter"]["version"] == 2
    np.testing.assert_allclose(answer["outputs"], dense_answer(make_adapter(2)), rtol=1e-4, atol=1e-4)
    assert _upload(client, "acme", 4)["version"] == 4


def test_a_name_that_was_made_again_is_taken_and_comes_back_with_the_versions_of_both(client: httpx.Client) -> None:
    _upload(client, "acme", 1)
    client.delete("/adapters/acme").raise_for_status()
    assert _upload(client, "acme", 2)["version"] == 2
    refused = client.post("/adapters/acme/restore")
    assert _code(refused) == (409, "name_taken")
    assert _numbers(client, "acme") == [2]
    client.delete("/adapters/acme").raise_for_status()
    assert client.post("/adapters/acme/restore").json()["live"]["version"] == 2
    assert _numbers(client, "acme") == [2, 1]
    client.put("/adapters/acme/aliases/live", json={"version": 1}).raise_for_status()
    answer = client.post("/predict", json={"adapter": "acme", "inputs": ROWS}).json()
    np.testing.assert_allclose(answer["outputs"], dense_answer(make_adapter(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["never", "live"])
def test_what_is_not_in_the_trash_is_not_restored(client: httpx.Client, name: str) -> None:
    _upload(client, "live", 1)
    expected = {"never": (404, "adapter_not_found"), "live": (409, "name_taken")}[name]
    assert _code(client.post(f"/adapters/{name}/restore")) == expected


def test_a_purge_removes_the_bytes_of_the_name_at_once(serve: Serve, data_folder: Path) -> None:
    client, _ = serve()
    folder = data_folder
    for seed in (1, 2):
        _upload(client, "acme", seed)
        client.delete("/adapters/acme").raise_for_status()
    assert len(stored_files(folder)) == 2
    _upload(client, "acme", 3)
    assert client.delete("/adapters/acme?purge=true").status_code == 204
    assert stored_files(folder) == set()
    assert _code(client.post("/adapters/acme/restore")) == (404, "adapter_not_found")
    # Of a name that only the trash has.
    _upload(client, "acme", 4)
    client.delete("/adapters/acme").raise_for_status()
    assert client.delete("/adapters/acme?purge=true").status_code == 204
    assert stored_files(folder) == set()
    assert _code(client.delete("/adapters/acme?purge=true")) == (404, "adapter_not_found")
    assert _upload(client, "acme", 5)["version"] == 5


def test_conditions_hold_for_deletions_and_purges(client: httpx.Client) -> None:
    tag = {"If-Match": f'"{_upload(client, "acme", 1)["digest"]}"'}
    other = {"If-Match": '"sha256:0"'}
    assert client.delete("/adapters/acme?purge=true", headers=other).status_code == 412
    client.delete("/adapters/acme", headers=tag).raise_for_status()
    # Nothing of the name exists, so that no tag matches.
    assert client.delete("/adapters/acme?purge=true", headers=tag).status_code == 412
    client.post("/adapters/acme/restore").raise_for_status()
    client.delete("/adapters/acme?purge=true", headers=tag).raise_for_status()
    assert client.delete("/adapters/acme?purge=yes").status_code == 422


def test_without_days_the_bytes_are_gone_at_once(serve: Serve, data_folder: Path) -> None:
    client, _ = serve(trash_days=0)
    _upload(client, "acme", 1)
    client.delete("/adapters/acme").raise_for_status()
    assert stored_files(data_folder) == set()
    assert _code(client.post("/adapters/acme/restore")) == (404, "adapter_not_found")


class _Clock:
    seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def dated(folder: Path, clock: _Clock) -> Iterator[Catalog]:
    opened = open_catalog(folder, now=clock, trash_days=7)
    yield opened
    opened.close()


def test_the_trash_is_emptied_when_its_days_are_over(dated: Catalog, clock: _Clock, folder: Path) -> None:
    pack = [
        one.version
        for one in dated.publish([publication(name, seed) for seed, name in enumerate("abc")], tenant="default")
    ]
    dated.delete("a", tenant="default")
    clock.seconds += 3 * DAY
    dated.delete("b", tenant="default")
    clock.seconds += 3.9 * DAY
    assert dated.purge_trash() == 0
    clock.seconds += 0.2 * DAY
    # The file stays for the others of its fleet.
    assert dated.purge_trash() == 0
    with pytest.raises(AdapterNotFound):
        dated.restore("a", tenant="default")
    assert dated.restore("b", tenant="default").live == pack[1]
    for name in "bc":
        dated.delete(name, tenant="default")
    clock.seconds += 7 * DAY
    assert dated.purge_trash() == sum(version.bytes for version in pack)
    assert stored_files(folder) == set()
    assert put(dated, "a", 9).version == 2


def test_the_trash_counts_as_stored_and_its_files_are_referenced(dated: Catalog, folder: Path) -> None:
    version, other = put(dated, "acme", 1), put(dated, "other", 2)
    dated.delete("acme", tenant="default")
    with dated.database.read() as connection:
        assert read_totals(connection, tenant="default").stored_bytes == version.bytes + other.bytes
        assert read_totals(connection, tenant="another").stored_bytes == 0
    assert dated.sweep() == 0
    assert unreferenced(folder, dated.database) == []
    dated.delete("acme", purge=True, tenant="default")
    with dated.database.read() as connection:
        assert read_totals(connection, tenant="default").stored_bytes == other.bytes


def test_kept_statistics_are_gone_at_once(dated: Catalog, folder: Path) -> None:
    (published,) = dated.publish([publication("acme", 1, statistics=b"sums", evidence=b"errors")], tenant="default")
    dated.delete("acme", tenant="default")
    assert stored_files(folder) == {published.version.file}
    restored = dated.restore("acme", tenant="default").live
    assert restored is not None
    assert restored.statistics is None
    assert dated.live_versions(["acme"], tenant="default")["acme"] == (restored, b"errors")


def test_a_restore_is_seen_by_the_resolver_and_refused_while_the_name_exists(dated: Catalog) -> None:
    version = put(dated, "acme", 1)
    dated.delete("acme", tenant="default")
    revision = dated.revision()
    dated.restore("acme", tenant="default")
    assert dated.revision() == revision + 1
    assert dated.find(Reference("acme"), tenant="default") == version
    with pytest.raises(NameTaken):
        dated.restore("acme", tenant="default")
