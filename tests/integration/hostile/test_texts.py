"""Bodies that are not JSON, or not an object, sent to every call that takes JSON."""

import gzip

import pytest

from tests.integration.hostile.bodies import JSON
from tests.integration.hostile.case import Case, Target

CALLS = {
    "predict": ("POST", "/predict"),
    "train": ("POST", "/adapters"),
    "upload": ("PUT", "/adapters/fresh"),
    "roll back": ("PUT", "/adapters/acme/aliases/live"),
}
DEEP = 100_000
NOT_JSON = {
    "nothing": b"",
    "spaces": b"  \r\n",
    "half an object": b'{"adapter": ',
    "a comma too many": b'{"adapter": null,}',
    "two objects": b"{} {}",
    "single quotes": b"{'adapter': null}",
    "a bare key": b"{adapter: null}",
    "a comment": b'{"adapter": null} // all rows',
    "Python": b'{"adapter": None}',
    "a hexadecimal number": b'{"rank": 0x10}',
    "a number with a leading zero": b'{"rank": 01}',
    "a number with a plus sign": b'{"rank": +1}',
    "a number without its zero": b'{"rank": .5}',
    "a newline within a string": b'{"name": "a\nb"}',
    "a NUL": b'{"name": "a"}\0',
    "invalid UTF-8": b'{"name": "\xff"}',
    "an overlong slash": b'{"name": "..\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"name": "\xed\xa0\x80"}',
    "Latin-1": '{"name": "é"}'.encode("latin-1"),
    "UTF-16": '{"name": "a"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"name": "a"}'.encode("utf-16-le"),
    "UTF-32": '{"name": "a"}'.encode("utf-32"),
    "a mark of byte order": b'\xef\xbb\xbf{"name": "a"}',
    "gzip": gzip.compress(b'{"name": "a"}'),
    "100,000 open brackets": b"[" * DEEP,
    "100,000 nested lists": b"[" * DEEP + b"]" * DEEP,
    "100,000 nested objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "lists nested too deeply in a field": b'{"adapter": null, "inputs": ' + b"[" * DEEP + b"]" * DEEP + b"}",
}
NOT_OBJECTS = {
    "a list": b"[]",
    "a list of objects": b'[{"name": "a"}]',
    "a string": b'"acme"',
    "an integer": b"7",
    "an integer of 10,000 digits": b"7" * 10_000,
    "null": b"null",
    "true": b"true",
}
TWICE = {
    "a key twice": (b'{"name": "a", "adapter": 1, "name": "b"}', "name"),
    "a key twice with the same value": (b'{"rank": 1, "rank": 1}', "rank"),
    "a key twice, once escaped": (b'{"name": "a", "n\\u0061me": "b"}', "name"),
    "a nested key twice": (b'{"training": {"seed": 1, "seed": 2}}', "seed"),
    "a key twice in a list": (b'{"inputs": [[{"deep": 1, "deep": 1}]]}', "deep"),
    "a key of a lone surrogate twice": (b'{"\\ud800": 1, "\\ud800": 2}', "\ud800"),
}


def _case(name: str, call: tuple[str, str], body: bytes, code: str, field: str | None, *says: str) -> Case:
    method, path = call
    headers = {"Content-Type": JSON}
    return Case(
        name=name,
        method=method,
        path=path,
        body=body,
        headers=headers,
        code=code,
        field=field,
        says=says or ("the body",),
    )


CASES = [
    _case(f"{call} from {name}", where, body, code, field)
    for call, where in CALLS.items()
    for table, code, field in ((NOT_JSON, "not_json", None), (NOT_OBJECTS, "wrong_type", "body"))
    for name, body in table.items()
] + [
    _case(f"{call} from {name}", where, body, "duplicate_key", key, key)
    for call, where in CALLS.items()
    for name, (body, key) in TWICE.items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_to(target: Target, case: Case) -> None:
    target.refuses(case)
