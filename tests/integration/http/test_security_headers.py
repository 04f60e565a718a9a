"""Security headers of API answers, pages, static files, errors and predictions."""

import httpx
import pytest

from app.web.pages import rendering

ALWAYS = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}
API = "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("method", "path", "policy", "cache"),
    [
        ("GET", "/adapters", API, "no-store"),
        ("GET", "/healthz", API, "no-store"),
        ("GET", "/nothing", API, "no-store"),
        ("DELETE", "/adapters/nobody", API, "no-store"),
        ("GET", "/ui/adapters", rendering.CONTENT_SECURITY_POLICY, "no-store"),
        ("GET", "/ui/adapters/nobody", rendering.CONTENT_SECURITY_POLICY, "no-store"),
        ("GET", rendering.static_url("css/base.css"), API, "public, max-age=31536000, immutable"),
    ],
)
def test_answers_have_security_headers_once(
    client: httpx.Client, method: str, path: str, policy: str, cache: str
) -> None:
    headers = client.request(method, path).headers
    assert headers.get_list("content-security-policy") == [policy]
    assert headers.get_list("cache-control") == [cache]
    assert {name: headers[name] for name in ALWAYS} == ALWAYS
    assert all(len(headers.get_list(name)) == 1 for name in headers)


def test_predictions_have_none_on_either_path(client: httpx.Client) -> None:
    client.put("/adapters/a", json={"A": [[1.0], [2.0]], "B": [[1.0] * 10]}).raise_for_status()
    for extra in ({}, {"X-Other": "1"}):
        answer = client.post("/predict", json={"adapter": "a", "inputs": [[1.0] * 10]}, headers=extra)
        assert answer.status_code == 200
        assert not {*ALWAYS, "content-security-policy", "cache-control"} & set(answer.headers)
