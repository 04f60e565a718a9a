"""Limits, cursors, prefixes and filters of the three lists."""

import base64
from typing import Any
from urllib.parse import quote

import pytest

from app.http.paging import make_cursor
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.test_paths import NAMES

LISTS = ("/adapters", "/adapters/acme/versions", "/jobs")


def _get(title: str, path: str, code: str, field: str, *says: str) -> Case:
    return Case(name=title, method="GET", path=path, code=code, field=field, says=says)


LIMITS = [
    _get(f"{path} with limit {text!r}", f"{path}?limit={quote(text)}", code, "limit", shown)
    for path in LISTS
    for text, code, shown in (
        ("0", "out_of_range", "0"),
        ("1001", "out_of_range", "1001"),
        (str(10**30), "out_of_range", str(10**30)),
        ("9" * 10_000, "not_finite", ""),
        ("-1", "wrong_type", "-1"),
        ("abc", "wrong_type", "abc"),
        ("", "wrong_type", ""),
        ("1.0", "wrong_type", "1.0"),
        ("1e2", "wrong_type", "1e2"),
        ("+5", "wrong_type", "+5"),
        (" 5", "wrong_type", " 5"),
        ("5\n", "wrong_type", "5\n"),
        ("1_0", "wrong_type", "1_0"),
        ("0x10", "wrong_type", "0x10"),
        ("٣", "wrong_type", "٣"),
        ("NaN", "wrong_type", "NaN"),
        ("Infinity", "wrong_type", "Infinity"),
        ("true", "wrong_type", "true"),
        ("null", "wrong_type", "null"),
    )
]

CURSORS = [
    _get(f"{path} from {title}", f"{path}?cursor={cursor}", "invalid_cursor", "cursor")
    for path in LISTS
    for title, cursor in {
        "nothing": "",
        "a word": "abc",
        "a number": "1",
        "a name": "acme",
        "a NUL": "%00",
        "invalid UTF-8": "%FF",
        "null": base64.urlsafe_b64encode(b"null").decode(),
        "a list of nothing": base64.urlsafe_b64encode(b"[]").decode(),
        "a position without its check": base64.urlsafe_b64encode(b'["acme"]').decode(),
        "a position with a check of zeros": base64.urlsafe_b64encode(b'["acme", "000000000000"]').decode(),
        "a number with a check of zeros": base64.urlsafe_b64encode(b'[1, "000000000000"]').decode(),
        "100,000 brackets": base64.urlsafe_b64encode(b"[" * 30_000).decode(),
        "40,000 characters": "A" * 40_000,
    }.items()
]

FILTERS = [
    *(
        _get(f"prefix {name}", f"/adapters?prefix={text}", "invalid_name", "prefix")
        for name, text in NAMES.items()
        if text not in ("*", "acme;version=1")
    ),
    _get("a prefix of a wildcard", "/adapters?prefix=*", "invalid_name", "prefix", "*"),
    _get("a prefix of a percent sign", "/adapters?prefix=%25", "invalid_name", "prefix", "%"),
    *(
        _get(f"jobs of {name}", f"/jobs?adapter={text}", "invalid_name", "adapter")
        for name, text in NAMES.items()
        if text != "acme;version=1"
    ),
    _get("jobs of an empty name", "/jobs?adapter=", "invalid_name", "adapter"),
    *(
        _get(f"jobs that are {status!r}", f"/jobs?status={quote(status)}", "out_of_range", "status", status)
        for status in ("done", "", "QUEUED", "queued ", "queued\n", "queued,failed", "null", "1")
    ),
]

UNKNOWN = [
    _get(f"{path} with {name}", f"{path}?{name}=1", "unknown_field", name)
    for path, names in {
        "/adapters": ("status", "offset", "Limit", "tenant"),
        "/adapters/acme/versions": ("prefix", "page", "live"),
        "/jobs": ("of", "name", "history"),
        "/adapters/acme/download": ("limit", "format", "alias"),
    }.items()
    for name in names
]


@pytest.mark.parametrize("case", LIMITS + CURSORS + FILTERS + UNKNOWN, ids=lambda case: case.name)
def test_a_list_refuses(target: Target, case: Case) -> None:
    target.refuses(case)


@pytest.mark.parametrize(
    ("issued_by", "sent_to"),
    [
        ("/adapters", "/adapters?prefix=a"),
        ("/adapters", "/jobs"),
        ("/adapters", "/adapters/acme/versions"),
        ("/adapters?prefix=", "/adapters?prefix=d"),
        ("/adapters/acme/versions", "/adapters"),
        ("/adapters/acme/versions", "/adapters/draft/versions"),
        ("/adapters/acme/versions", "/jobs"),
        ("/jobs", "/adapters"),
        ("/jobs", "/adapters/acme/versions"),
        ("/jobs", "/jobs?status=queued"),
        ("/jobs", "/jobs?adapter=acme"),
        ("/jobs?status=queued", "/jobs"),
        ("/jobs?status=queued", "/jobs?status=failed"),
        ("/jobs?adapter=acme", "/jobs?adapter=draft"),
    ],
)
def test_a_cursor_is_refused_by_every_list_but_its_own(target: Target, issued_by: str, sent_to: str) -> None:
    path = _and(sent_to, f"cursor={_cursor(target, issued_by)}")
    target.refuses(_get("it", path, "invalid_cursor", "cursor"))


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("change", ["A{}", "{}A", "{}%3D", "{}%0A", "%20{}"])
def test_a_cursor_that_was_changed_is_refused(target: Target, path: str, change: str) -> None:
    cursor = _cursor(target, path)
    target.refuses(_get("it", f"{path}?cursor={change.format(cursor)}", "invalid_cursor", "cursor"))


@pytest.mark.parametrize(
    ("path", "of", "position"),
    [
        ("/adapters", "adapters ", 10**30),
        ("/adapters", "adapters ", "\ud800"),
        ("/adapters", "adapters ", 5),
        ("/datasets", "datasets ", 3),
        ("/adapters/acme/versions", "versions acme", "acme"),
        ("/jobs", "jobs None None", "acme"),
        ("/adapters/acme/versions", "versions acme", 10**30),
        ("/adapters/acme/versions", "versions acme", 2**63),
        ("/jobs", "jobs None None", 10**30),
        ("/jobs", "jobs None None", -(2**70)),
        ("/jobs", "jobs None None", True),
    ],
)
def test_a_cursor_whose_check_a_client_computed_is_refused(
    target: Target, path: str, of: str, position: str | int
) -> None:
    cursor = make_cursor(of, position)
    target.refuses(_get("it", f"{path}?cursor={cursor}", "invalid_cursor", "cursor"))


def _cursor(target: Target, path: str) -> Any:
    cursor = target.client.get(_and(path, "limit=1")).raise_for_status().json()["next_cursor"]
    assert cursor is not None
    return cursor


def _and(path: str, query: str) -> str:
    return f"{path}{'&' if '?' in path else '?'}{query}"
