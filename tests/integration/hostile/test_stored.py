"""Calls on what is stored: roll back, show a version, download, cancel; and conditions that do not hold."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pytest

from tests.integration.hostile.bodies import IN, JSON, LEFT_OUT, NOT_FINITE, NOT_NUMBERS, OUT, to_json
from tests.integration.hostile.case import Case, Target

GOOD_UPLOAD = {"A": [[1]] * OUT, "B": [[1] * IN]}
HUGE = ("2147483647", "2147483648", "9223372036854775808", str(10**30))


def _roll_back(title: str, code: str, /, *says: str, field: str | None = "version", **body: Any) -> Case:
    return Case(
        name=title,
        method="PUT",
        path="/adapters/acme/aliases/live",
        code=code,
        says=says,
        field=field,
        body=to_json(body),
        headers={"Content-Type": JSON},
    )


ROLL_BACK = [
    _roll_back("roll back to nothing", "missing_field"),
    _roll_back("roll back to null", "wrong_type", "null", version=None),
    *(_roll_back(f"roll back to {name}", "wrong_type", version=value) for name, value in NOT_NUMBERS.items()),
    *(
        _roll_back(f"roll back to version {value}", "wrong_type", str(value), version=value)
        for value in (1.0, 1.5, "1")
    ),
    *(
        _roll_back(f"roll back to {name}", "not_finite", version=NOT_FINITE[name])
        for name in ("NaN", "Infinity", "-Infinity", "1e400", "10^400", "an integer of 10,000 digits")
    ),
    *(
        _roll_back(f"roll back to version {value}", "out_of_range", str(value), version=value)
        for value in (0, -1, -(10**30))
    ),
    *(
        _roll_back(f"roll back to version {value}", "version_not_found", value, "2, 1", version=int(value))
        for value in ("3", "99", *HUGE)
    ),
    _roll_back("roll back to version 10^350", "version_not_found", "digits", version=10**350),
    _roll_back("roll back with an alias", "unknown_field", field="alias", version=1, alias="live"),
    _roll_back("roll back with a name", "unknown_field", field="name", version=1, name="acme"),
]


def _get(title: str, path: str, code: str, *says: str, field: str | None = None) -> Case:
    return Case(name=title, method="GET", path=path, code=code, says=says, field=field)


VERSIONS = [
    *(
        _get(
            f"show version {text[:30]!r}", f"/adapters/acme/versions/{quote(text)}", "wrong_type", text, field="version"
        )
        for text in ("-1", "+1", "1.0", "1e0", "live", "one", " 1", "1\n", "0x1", "1_0", "١", "NaN", "Infinity", "1@1")
    ),
    *(
        _get(f"show version {text}", f"/adapters/acme/versions/{text}", "version_not_found", text, "2, 1")
        for text in ("0", "3", *HUGE)
    ),
    _get("show a version of 10,000 digits", f"/adapters/acme/versions/{'9' * 10_000}", "version_not_found", "digits"),
    _get("show a version of what is not live", "/adapters/draft/versions/2", "version_not_found", "'draft'"),
]

DOWNLOADS = [
    *(
        _get(
            f"download version {text!r}", f"/adapters/acme/download?version={quote(text)}", code, text, field="version"
        )
        for code, texts in {
            "wrong_type": ("-1", "+1", "1.0", "", "live", "1\n", "true", "NaN", "١"),
            "out_of_range": ("0", "00"),
            "version_not_found": ("3", *HUGE),
        }.items()
        for text in (texts if code != "out_of_range" else texts[:1])
    ),
    _get(
        "download a version of 10,000 digits",
        f"/adapters/acme/download?version={'9' * 10_000}",
        "not_finite",
        "version",
    ),
    *(
        _get(
            f"download for module {module!a}",
            f"/adapters/acme/download?module={quote(module)}",
            "invalid_name",
            field="module",
        )
        for module in ("", "../x", "a/b", "a b", ".a", "a.", "a..b", "a\n", "a\0", "а", "a" * 257, "lin.*", "é")
    ),
    _get("download what is not live", "/adapters/draft/download", "adapter_not_live", "draft@1"),
]


@pytest.mark.parametrize("case", ROLL_BACK + VERSIONS + DOWNLOADS, ids=lambda case: case.name)
def test_it_is_refused_to(target: Target, case: Case) -> None:
    target.refuses(case)


def test_a_job_that_has_ended_is_not_cancelled(target: Target) -> None:
    (failed,) = target.client.get("/jobs", params={"status": "failed"}).json()["data"]
    path = f"/jobs/{failed['id']}/cancel"
    target.refuses(Case(name="it", method="POST", path=path, code="job_ended", says=("failed",)))


WRONG = '"sha256:' + "0" * 64 + '"'
CONDITIONS: list[tuple[str, str, Mapping[str, str]]] = [
    ("a match with other bytes", "acme", {"If-Match": WRONG}),
    ("a match with a list of other bytes", "acme", {"If-Match": f'{WRONG}, "abc"'}),
    ("a match with the weak tag", "acme", {"If-Match": "W/{live}"}),
    ("a match with the tag without its quotes", "acme", {"If-Match": "{digest}"}),
    ("a match with the tag in capitals", "acme", {"If-Match": "{LIVE}"}),
    ("a match with half a tag", "acme", {"If-Match": '"sha256:'}),
    ("a match with an empty tag", "acme", {"If-Match": '""'}),
    ("a match with nothing", "acme", {"If-Match": ""}),
    ("a match with bytes that are not ASCII", "acme", {"If-Match": '"\xff\xfe"'}),
    ("a match with 60,000 characters", "acme", {"If-Match": ",".join(['"x"'] * 15_000)}),
    ("a match with the version before", "acme", {"If-Match": "{before}"}),
    ("a match with what is not there", "nobody", {"If-Match": WRONG}),
    ("a match with anything that is not there", "nobody", {"If-Match": "*"}),
    ("a match with what is not live", "draft", {"If-Match": WRONG}),
    ("no match with anything", "acme", {"If-None-Match": "*"}),
    ("no match with anything, not live", "draft", {"If-None-Match": "*"}),
    ("no match with the live bytes", "acme", {"If-None-Match": "{live}"}),
    ("no match with a list of the live bytes", "acme", {"If-None-Match": f"{WRONG}, {{live}}"}),
    ("a match and no match at once", "acme", {"If-Match": "{live}", "If-None-Match": "*"}),
]


@pytest.mark.parametrize(("title", "name", "headers"), CONDITIONS, ids=[title for title, *_ in CONDITIONS])
@pytest.mark.parametrize("call", ["upload", "roll back", "delete"])
def test_a_condition_that_does_not_hold_stops(
    target: Target, call: str, title: str, name: str, headers: Mapping[str, str]
) -> None:
    newest, before = target.client.get("/adapters/acme/versions").json()["data"]
    live = f'"{newest["digest"]}"'
    values = {"live": live, "LIVE": live.upper(), "digest": newest["digest"], "before": f'"{before["digest"]}"'}
    method, path, body = {
        "upload": ("PUT", f"/adapters/{name}", to_json(GOOD_UPLOAD)),
        "roll back": ("PUT", f"/adapters/{name}/aliases/live", b'{"version": 1}'),
        "delete": ("DELETE", f"/adapters/{name}", b""),
    }[call]
    # Where nothing is there, only an upload could make it: the other calls say that first (RFC 9110, 13.2.1).
    code = "adapter_not_found" if name == "nobody" and call != "upload" else "precondition_failed"
    sent = {header: value.format_map(values) for header, value in headers.items()} | {"Content-Type": JSON}
    says = (name,) if code == "adapter_not_found" else ("does not hold",)
    target.refuses(Case(name=title, method=method, path=path, code=code, says=says, body=body, headers=sent))


@pytest.mark.parametrize(
    "space", ["another@1", "minilm@2", "MINILM@1", "minilm@1 x", "", "\xff", "mínilm@1", "x" * 5000]
)
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/predict", {"adapter": None, "inputs": [[1] * IN]}),
        ("POST", "/adapters", {"name": "a", "rank": 1, "data": {"inputs": [[1] * IN], "targets": [[1] * OUT]}}),
        ("PUT", "/adapters/fresh", GOOD_UPLOAD),
        ("PUT", "/adapters/acme/aliases/live", {"version": 1}),
        ("DELETE", "/adapters/acme", LEFT_OUT),
        ("GET", "/adapters/acme/download", LEFT_OUT),
    ],
)
def test_another_encoder_is_refused(target: Target, method: str, path: str, body: object, space: str) -> None:
    content = b"" if body is LEFT_OUT else to_json(body)
    headers = {"Content-Type": JSON, "X-Feature-Space": space}
    code, field = "feature_space_mismatch", "X-Feature-Space"
    target.refuses(Case(name=space, method=method, path=path, code=code, field=field, body=content, headers=headers))
