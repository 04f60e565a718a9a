"""If-Match and If-None-Match on the digest of what is live (RFC 9110, section 13.1)."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.settings import Settings
from tests.conftest import Serve
from tests.support.service import serving

MOVES, ROUNDS = 100, 6
OTHER = '"sha256:' + "0" * 64 + '"'


def _factors(factor: float) -> dict[str, Any]:
    return {"A": [[factor], [2 * factor]], "B": [[1.0] * 10]}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    settings = Settings(base="random:10,2,42", data_dir=tmp_path_factory.mktemp("data"))
    with serving(settings) as (client, _):
        yield client


@pytest.fixture
def live(client: httpx.Client) -> Iterator[str]:
    """The tag of `acme`, which has one version; gone after the test."""
    yield client.put("/adapters/acme", json=_factors(1)).headers["etag"]
    client.delete("/adapters/acme")


MATCHING = ["{live}", "*", "{other}, {live}", "{live},{other}", '"", {live}', 'W/"x" , {live}']
FAILING = ["{other}", "W/{live}", "{bare}", '"{live}', "", '""', "{other}, W/{live}", "'{bare}'", "{upper}"]


def _header(pattern: str, live: str) -> str:
    return pattern.format(live=live, other=OTHER, bare=live.strip('"'), upper=live.upper())


@pytest.mark.parametrize("pattern", MATCHING)
def test_if_match_lets_pass_what_names_the_live_bytes(client: httpx.Client, live: str, pattern: str) -> None:
    answer = client.put("/adapters/acme", json=_factors(2), headers={"If-Match": _header(pattern, live)})
    assert answer.status_code == 201


@pytest.mark.parametrize("pattern", FAILING)
def test_if_match_refuses_what_does_not(client: httpx.Client, live: str, pattern: str) -> None:
    answer = client.put("/adapters/acme", json=_factors(2), headers={"If-Match": _header(pattern, live)})
    assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    assert answer.json()["field"] == "If-Match"
    assert answer.json()["expected"] == live.strip('"')
    assert client.get("/adapters/acme").json()["versions"] == 1


@pytest.mark.parametrize("pattern", MATCHING)
def test_if_none_match_refuses_what_names_the_live_bytes(client: httpx.Client, live: str, pattern: str) -> None:
    answer = client.put("/adapters/acme", json=_factors(2), headers={"If-None-Match": _header(pattern, live)})
    assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    assert client.get("/adapters/acme").json()["versions"] == 1


@pytest.mark.parametrize("pattern", FAILING)
def test_if_none_match_lets_pass_what_does_not(client: httpx.Client, live: str, pattern: str) -> None:
    answer = client.put("/adapters/acme", json=_factors(2), headers={"If-None-Match": _header(pattern, live)})
    assert answer.status_code == 201


def test_a_name_is_made_once_with_if_none_match_any(client: httpx.Client) -> None:
    headers = {"If-None-Match": "*"}
    assert client.put("/adapters/once", json=_factors(1), headers=headers).status_code == 201
    # Before the rule that the same bytes are a 200.
    assert client.put("/adapters/once", json=_factors(1), headers=headers).status_code == 412
    client.delete("/adapters/once")
    assert client.put("/adapters/once", json=_factors(1), headers=headers).status_code == 201


@pytest.mark.parametrize("tag", ["*", OTHER])
def test_if_match_never_makes_a_name(client: httpx.Client, tag: str) -> None:
    answer = client.put("/adapters/nobody", json=_factors(1), headers={"If-Match": tag})
    assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    assert client.get("/adapters/nobody").status_code == 404


def test_the_same_bytes_under_a_condition_that_holds_are_a_200(client: httpx.Client, live: str) -> None:
    assert client.put("/adapters/acme", json=_factors(1), headers={"If-Match": live}).status_code == 200
    assert client.put("/adapters/acme", json=_factors(1), headers={"If-Match": OTHER}).status_code == 412


def test_both_conditions_have_to_hold(client: httpx.Client, live: str) -> None:
    headers = {"If-Match": live, "If-None-Match": live}
    assert client.put("/adapters/acme", json=_factors(2), headers=headers).status_code == 412
    headers = {"If-Match": live, "If-None-Match": OTHER}
    assert client.put("/adapters/acme", json=_factors(2), headers=headers).status_code == 201


def test_a_condition_in_several_headers_is_one_list(client: httpx.Client, live: str) -> None:
    headers = [("If-Match", OTHER), ("If-Match", live)]
    assert client.put("/adapters/acme", json=_factors(2), headers=headers).status_code == 201


def test_delete_and_roll_back_are_conditional_too(client: httpx.Client, live: str) -> None:
    back = {"version": client.get("/adapters/acme").json()["live"]["version"]}
    second = client.put("/adapters/acme", json=_factors(2)).headers["etag"]
    assert client.put("/adapters/acme/aliases/live", json=back, headers={"If-Match": live}).status_code == 412
    assert client.put("/adapters/acme/aliases/live", json=back, headers={"If-Match": second}).status_code == 200
    assert client.delete("/adapters/acme", headers={"If-Match": second}).status_code == 412
    assert client.get("/adapters/acme").status_code == 200
    assert client.delete("/adapters/acme", headers={"If-Match": live}).status_code == 204


def test_of_two_who_saw_the_same_version_one_replaces_it(client: httpx.Client, live: str) -> None:
    answers = [client.put("/adapters/acme", json=_factors(n), headers={"If-Match": live}).status_code for n in (2, 3)]
    assert answers == [201, 412]


@pytest.mark.slow
def test_of_many_racing_moves_of_live_one_wins_each_round(serve: Serve) -> None:
    # Two workers on one data folder.
    clients = [serve()[0] for _ in range(2)]
    tags = [clients[0].put("/adapters/acme", json=_factors(factor)).headers["etag"] for factor in (1, 2)]

    async def race(client: httpx.AsyncClient, number: int) -> Counter[int]:
        # Odd rounds move back what even ones moved: the live version is 2 at the beginning.
        target, live = (1, tags[1]) if number % 2 == 0 else (2, tags[0])
        urls = [f"{clients[move % 2].base_url}/adapters/acme/aliases/live" for move in range(MOVES)]
        moves = (client.put(url, json={"version": target}, headers={"If-Match": live}) for url in urls)
        return Counter([answer.status_code for answer in await asyncio.gather(*moves)])

    async def scene() -> list[Counter[int]]:
        # Without an expiry: httpcore may close a connection that expires while a request is about to use it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=None)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            return [await race(client, number) for number in range(ROUNDS)]

    assert asyncio.run(scene()) == [{200: 1, 412: MOVES - 1}] * ROUNDS
    assert clients[1].get("/adapters/acme").json()["aliases"] == {"live": 2}
