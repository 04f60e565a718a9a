"""`X-Request-Timeout`: seconds that a client waits, which may only shorten what the service would allow."""

import httpx
import pytest

BODY = {"adapter": None, "inputs": [[1.0] * 10]}


@pytest.mark.parametrize("given", ["30", "0.5", "1e2", "60.0", "1000000", "1e300"])
def test_a_time_that_is_long_enough_changes_nothing(client: httpx.Client, given: str) -> None:
    plain = client.post("/predict", json=BODY)
    answer = client.post("/predict", json=BODY, headers={"X-Request-Timeout": given})
    assert (answer.status_code, answer.json()) == (200, plain.json())


@pytest.mark.parametrize("given", ["0", "-0", "0.0", "-1", "-1e999", "1e999", "1e-999"])
def test_a_time_that_nobody_can_wait_is_refused_by_its_name(client: httpx.Client, given: str) -> None:
    _check_refused(client, given, "out_of_range")


@pytest.mark.parametrize(
    "given",
    [
        *("", "soon", "1s", "1,5", "0x10", "1_000", "true", "null", "1 2", "--1", "."),
        *("nan", "NaN", "inf", "Infinity", "-inf"),
    ],
)
def test_what_is_no_number_is_refused_by_its_name(client: httpx.Client, given: str) -> None:
    _check_refused(client, given, "wrong_type")


def _check_refused(client: httpx.Client, given: str, code: str) -> None:
    answer = client.post("/predict", json=BODY, headers={"X-Request-Timeout": given})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, code), answer.text
    assert (problem["field"], problem["given"]) == ("X-Request-Timeout", given)
