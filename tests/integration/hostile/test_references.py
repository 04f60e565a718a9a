"""References to adapters: malformed, of what is not there, and of what cannot answer here."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import JSON, ROW, Raw, to_json
from tests.integration.hostile.case import Case, Target

INVALID_NAMES = {
    "an empty string": "",
    "a version of nothing": "@1",
    "an alias of nothing": "@live",
    "a space within": "ac me",
    "a space at its end": "acme ",
    "a newline at its end": "acme\n",
    "a NUL at its end": "acme\0",
    "a path upwards": "../x",
    "a path": "acme/versions",
    "dots in percent signs": "%2e%2e",
    "a Cyrillic letter": "аcme",
    "a full-width letter": "ａcme",
    "an Arabic digit": "٣",
    "a lone surrogate": "acme\ud800",
    "129 characters": "a" * 129,
    "the name of the base": "__base__",
    "a dot in front": ".acme",
    "a mark of byte order": "\ufeffacme",
    "a hundred thousand characters": "a" * 100_000,
}
INVALID_REFERENCES = {
    "nothing after the at sign": "acme@",
    "version 0": "acme@0",
    "version -1": "acme@-1",
    "version +1": "acme@+1",
    "version 01": "acme@01",
    "version 1.0": "acme@1.0",
    "version 1e0": "acme@1e0",
    "two at signs": "acme@x@y",
    "an alias in capitals": "acme@LIVE",
    "an alias with a space": "acme@ live",
    "an alias with a newline at its end": "acme@live\n",
    "a version with a newline at its end": "acme@1\n",
    "an alias with a Cyrillic letter": "acme@livе",
    "a version in Arabic digits": "acme@١",
    "an alias of 65 characters": f"acme@{'a' * 65}",
    "an alias that is a lone surrogate": "acme@\ud800",
}
NO_REFERENCES: dict[str, Any] = {
    "a number": 1,
    "a fraction": 1.5,
    "NaN": Raw("NaN"),
    "true": True,
    "false": False,
    "a list": ["acme"],
    "an object": {"name": "acme"},
}
UNANSWERABLE = [
    ("a name that nobody has", "nobody", "adapter_not_found", "nobody"),
    ("a version of a name that nobody has", "nobody@1", "adapter_not_found", "nobody"),
    ("a name in other letters", "ACME", "adapter_not_found", "ACME"),
    ("a version that there is not", "acme@99", "version_not_found", "99"),
    ("a version past 31 bits", "acme@2147483648", "version_not_found", "2147483648"),
    ("version 10^30", f"acme@{10**30}", "version_not_found", str(10**30)),
    ("an alias that there is not", "acme@canary", "alias_not_found", "canary"),
    ("an adapter that is not live", "draft", "adapter_not_live", "draft@1"),
    ("an adapter that is not live, by its alias", "draft@live", "adapter_not_live", "draft@1"),
    ("an adapter of another base", "foreign", "base_mismatch", "foreign@1"),
    ("an adapter of another encoder", "elsewhere", "feature_space_mismatch", "another-encoder@2"),
]


def _cases(name: str, reference: object, code: str, *says: str, named: bool = True) -> list[Case]:
    """For all rows, and for the second row of three."""
    one = {"adapter": reference, "inputs": [ROW]}
    by_row = {"adapters": [None, reference, "acme"], "inputs": [ROW] * 3}
    post: dict[str, Any] = {"method": "POST", "path": "/predict", "headers": {"Content-Type": JSON}, "code": code}
    return [
        Case(name=f"{name}, for all rows", body=to_json(one), field="adapter" if named else None, says=says, **post),
        Case(name=f"{name}, for one row", body=to_json(by_row), field="adapters", row=1, says=says, **post),
    ]


CASES = [
    *(case for name, text in INVALID_NAMES.items() for case in _cases(name, text, "invalid_name", text[:90])),
    *(case for name, text in INVALID_REFERENCES.items() for case in _cases(name, text, "invalid_reference", text)),
    *(case for name, value in NO_REFERENCES.items() if value is not None for case in _cases(name, value, "wrong_type")),
    *(case for name, text, code, says in UNANSWERABLE for case in _cases(name, text, code, says, named=False)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_predict_refuses(target: Target, case: Case) -> None:
    target.refuses(case)
