"""Lists: byte order, prefixes, and cursors over several pages."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.settings import Settings
from tests.support.service import serving

NAMES = ["0", "9.a", "A", "Z", "a", "a-1", "a.1", "a1", "aA", "a_1", "aa", "ab", "b" * 128, "z", "z" * 127]
GONE = "aab"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    settings = Settings(base="random:10,2,42", data_dir=tmp_path_factory.mktemp("data"))
    with serving(settings) as (client, _):
        for name in [*reversed(NAMES), GONE]:
            client.put(f"/adapters/{name}", json={"A": [[1.0], [2.0]], "B": [[1.0] * 10]}).raise_for_status()
        client.delete(f"/adapters/{GONE}").raise_for_status()
        for factor in range(2, 8):
            body = {"A": [[factor], [2.0]], "B": [[1.0] * 10]}
            client.put("/adapters/a", json=body).raise_for_status()
        yield client


def _pages(client: httpx.Client, path: str, **query: Any) -> Iterator[list[dict[str, Any]]]:
    cursor: dict[str, str] = {}
    while True:
        page = client.get(path, params=query | cursor).raise_for_status().json()
        assert set(page) == {"data", "next_cursor"}
        yield page["data"]
        if page["next_cursor"] is None:
            return
        cursor = {"cursor": page["next_cursor"]}


def _names(pages: Iterator[list[dict[str, Any]]]) -> list[list[str]]:
    return [[adapter["name"] for adapter in page] for page in pages]


def test_adapters_come_in_byte_order_without_the_deleted(client: httpx.Client) -> None:
    assert _names(_pages(client, "/adapters")) == [sorted(NAMES, key=str.encode)]


@pytest.mark.parametrize("limit", [1, 2, 4, 7, 14, 15, 16, 1000])
def test_pages_together_are_the_whole_list(client: httpx.Client, limit: int) -> None:
    pages = _names(_pages(client, "/adapters", limit=limit))
    assert [name for page in pages for name in page] == sorted(NAMES)
    assert all(len(page) == limit for page in pages[:-1])
    assert 1 <= len(pages[-1]) <= limit


@pytest.mark.parametrize("prefix", ["", "a", "a.", "a-", "aA", "b", "z", "zz", "Z", "q", "b" * 128])
def test_a_prefix_is_letter_for_letter(client: httpx.Client, prefix: str) -> None:
    wanted = [name for name in sorted(NAMES) if name.startswith(prefix)]
    pages = _names(_pages(client, "/adapters", prefix=prefix, limit=2))
    assert [name for page in pages for name in page] == wanted


def test_an_entry_of_the_list_is_what_its_own_page_shows(client: httpx.Client) -> None:
    for page in _pages(client, "/adapters", prefix="a", limit=3):
        for entry in page:
            assert client.get(f"/adapters/{entry['name']}").json() == entry


def test_a_name_that_comes_in_between_two_pages_shifts_nothing(client: httpx.Client) -> None:
    first = client.get("/adapters", params={"limit": 4}).json()
    client.put("/adapters/00", json={"A": [[1.0], [2.0]], "B": [[1.0] * 10]}).raise_for_status()
    second = client.get("/adapters", params={"limit": 4, "cursor": first["next_cursor"]}).json()
    client.delete("/adapters/00").raise_for_status()
    together = [entry["name"] for entry in first["data"] + second["data"]]
    assert together == sorted(NAMES)[:8]


@pytest.mark.parametrize("limit", [1, 3, 7, 8])
def test_versions_come_newest_first_over_all_pages(client: httpx.Client, limit: int) -> None:
    pages = [[entry["version"] for entry in page] for page in _pages(client, "/adapters/a/versions", limit=limit)]
    assert [version for page in pages for version in page] == [7, 6, 5, 4, 3, 2, 1]
    assert all(len(page) == limit for page in pages[:-1])


def test_a_cursor_is_good_for_its_own_list_only(client: httpx.Client) -> None:
    cursor = client.get("/adapters", params={"limit": 1, "prefix": "a"}).json()["next_cursor"]
    for path, query in (
        ("/adapters", {"cursor": cursor}),
        ("/adapters", {"cursor": cursor, "prefix": "b"}),
        ("/adapters/a/versions", {"cursor": cursor}),
        ("/jobs", {"cursor": cursor}),
        ("/adapters", {"cursor": cursor[:-1], "prefix": "a"}),
        ("/adapters", {"cursor": "", "prefix": "a"}),
    ):
        answer = client.get(path, params=query)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_cursor")
    # Another page size is the same list.
    assert client.get("/adapters", params={"limit": 5, "prefix": "a", "cursor": cursor}).status_code == 200
