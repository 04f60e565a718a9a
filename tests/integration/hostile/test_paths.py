"""Names in paths, paths that lead nowhere, and methods that a path does not take."""

from typing import Any
from urllib.parse import quote

import pytest

from tests.integration.hostile.bodies import IN, JSON, OUT, to_json
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.test_references import INVALID_NAMES

UPLOAD = to_json({"A": [[1]] * OUT, "B": [[1] * IN]})
CALLS: dict[str, tuple[str, str, bytes]] = {
    "upload": ("PUT", "/adapters/{}", UPLOAD),
    "show": ("GET", "/adapters/{}", b""),
    "list the versions of": ("GET", "/adapters/{}/versions", b""),
    "show a version of": ("GET", "/adapters/{}/versions/1", b""),
    "download": ("GET", "/adapters/{}/download", b""),
    "roll back": ("PUT", "/adapters/{}/aliases/live", b'{"version": 1}'),
    "delete": ("DELETE", "/adapters/{}", b""),
}
"""Every call that has a name in its path."""
NAMES = {
    title: quote(name, safe="", errors="surrogatepass")
    for title, name in (INVALID_NAMES | {"a version": "acme@1", "an alias": "acme@live"}).items()
    if name and "/" not in name and len(name) < 10_000
} | {
    "two dots": "..",
    "two dots in percent signs": "%2e%2e",
    "one dot": "%2E",
    "two dots, percent-encoded twice": "%252e%252e",
    "a backslash": "a%5C..%5Cx",
    "a tab": "a%09",
    "a carriage return": "acme%0D",
    "invalid UTF-8": "acme%FF",
    "half an escape": "acme%2",
    "a wildcard": "*",
    "a quote": "a'--",
    "a semicolon": "acme;version=1",
}
"""As they stand in a path."""
FEW = (
    "two dots",
    "two dots in percent signs",
    "a Cyrillic letter",
    "a newline at its end",
    "a NUL at its end",
    "a version",
)
"""For the calls that have the check in common with others."""


def _case(title: str, method: str, path: str, code: str, /, *says: str, body: bytes = b"", **more: Any) -> Case:
    headers = {"Content-Type": JSON} if body else {}
    return Case(name=title, method=method, path=path, code=code, says=says, body=body, headers=headers, **more)


BAD_NAMES = [
    _case(f"{call} {title}", method, path.format(name), "invalid_name", body=body, field="name")
    for call, (method, path, body) in CALLS.items()
    for title, name in NAMES.items()
    if call in ("upload", "show") or title in FEW
]

NOBODY = [
    _case(f"{call} what is not there", method, path.format("nobody"), "adapter_not_found", "nobody", body=body)
    for call, (method, path, body) in CALLS.items()
    if call != "upload"
] + [
    _case("show a name in other letters", "GET", "/adapters/ACME", "adapter_not_found", "ACME"),
    _case("show a job that is not there", "GET", "/jobs/nothing", "job_not_found", "nothing"),
    _case("show a job of no name", "GET", "/jobs/%00", "job_not_found", "\0"),
    _case("show a job of a kilobyte", "GET", f"/jobs/{'j' * 1000}", "job_not_found", "jjjj"),
    _case("cancel a job that is not there", "POST", "/jobs/nothing/cancel", "job_not_found", "nothing"),
    _case("cancel a path upwards", "POST", "/jobs/%2e%2e/cancel", "job_not_found", ".."),
]

NOWHERE = [
    _case(f"find {path[:60]}", "GET", path, "route_not_found", shown)
    for path, shown in {
        "/nothing": "/nothing",
        "//": "//",
        "/predict/": "/predict/",
        "/base/": "/base/",
        "/Base": "/Base",
        "/adapters/": "/adapters/",
        "/adapters//versions": "/adapters//versions",
        "/adapters/../base": "/adapters/../base",
        "/adapters/..%2Fx": "/adapters/../x",
        "/adapters/%2Fetc%2Fpasswd": "/adapters//etc/passwd",
        "/adapters/acme/": "/adapters/acme/",
        "/adapters/acme/nothing": "/adapters/acme/nothing",
        "/adapters/acme/versions/1/2": "/adapters/acme/versions/1/2",
        "/adapters/acme/versions/..%2F..": "/adapters/acme/versions/../..",
        "/adapters/acme/aliases/canary": "canary",
        "/jobs/": "/jobs/",
        "/jobs/nothing/history": "history",
        "/v1/models": "/v1/models",
        "/.env": "/.env",
        "/static/%2e%2e/%2e%2e/etc/passwd": "passwd",
        f"/{'x' * 5000}": "xxxx",
        "/base%0A": "/base",
        "/jobs%0A": "/jobs",
        "/adapters/acme/versions%0A": "/adapters/acme/versions",
    }.items()
] + [
    _case("post to a path with a newline at its end", "POST", "/predict%0A", "route_not_found", "/predict", body=b"{}"),
    _case("cancel with a newline at its end", "POST", "/jobs/x/cancel%0A", "route_not_found", "/jobs/x/cancel"),
]

METHODS = [
    _case(f"{method} {path}", method, path, "method_not_allowed", method)
    for path, methods in {
        "/predict": ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"),
        "/adapters": ("PUT", "DELETE", "PATCH"),
        "/adapters/acme": ("POST", "PATCH"),
        "/adapters/acme/versions": ("POST", "DELETE"),
        "/adapters/acme/versions/1": ("PUT", "DELETE"),
        "/adapters/acme/download": ("POST", "PUT"),
        "/adapters/acme/aliases/live": ("GET", "DELETE"),
        "/jobs": ("POST", "DELETE"),
        "/jobs/nothing": ("DELETE", "PUT"),
        "/jobs/nothing/cancel": ("GET",),
        "/base": ("POST", "PUT", "TRACE"),
        "/healthz": ("POST",),
        "/readyz": ("DELETE",),
    }.items()
    for method in methods
]


@pytest.mark.parametrize("case", BAD_NAMES + NOBODY + NOWHERE + METHODS, ids=lambda case: case.name)
def test_it_is_refused_to(target: Target, case: Case) -> None:
    target.refuses(case)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/predict", "POST"),
        ("/base", "GET"),
        ("/adapters", "GET, POST"),
        ("/adapters/acme", "DELETE, GET, PUT"),
        ("/adapters/acme/versions/1", "GET"),
        ("/jobs/nothing/cancel", "POST"),
    ],
)
def test_a_refused_method_comes_with_those_that_are_taken(target: Target, path: str, allowed: str) -> None:
    assert target.client.patch(path).headers["allow"] == allowed
