"""Labels that are none, in uploads; and predict requests that ask for what there is not."""

import json
from typing import Any

import pytest

from adapters.errors import shorten
from tests.integration.hostile.bodies import (
    A_NAME,
    B_NAME,
    IN,
    JSON,
    LEFT_OUT,
    OUT,
    ROW,
    TEN_THOUSAND_DIGITS,
    Raw,
    ones,
    tensor_file,
    to_json,
)
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.test_infer import INFER
from tests.integration.hostile.upload_forms import Both, cases, tensors

BAD: dict[str, tuple[str, object, str]] = {
    "a string": ("wrong_type", "yes,no", "yes,no"),
    "a number": ("wrong_type", 2, "2"),
    "an object": ("wrong_type", {"0": "no", "1": "yes"}, "no"),
    "true": ("wrong_type", True, "true"),
    "none": ("out_of_range", [], "0 entries"),
    "one label": ("out_of_range", ["a"], "1 entries"),
    "more labels than outputs": ("out_of_range", ["a", "b", "c"], "3 entries"),
    "50,000 labels": ("out_of_range", ["a"] * 50_000, "50000 entries"),
    "an empty label": ("out_of_range", ["a", ""], "position 1"),
    "a label of 201 characters": ("out_of_range", ["x" * 201, "a"], "position 0"),
    "a label past 2^53": ("out_of_range", [0, 2**53 + 1], "position 1"),
    "a label of 10^400": ("not_finite", [0, TEN_THOUSAND_DIGITS], "position 1"),
    "NaN for a label": ("not_finite", [0, Raw("NaN")], "position 1"),
    "1e400 for a label": ("not_finite", [0, Raw("1e400")], "position 1"),
    "1.0 for a label": ("wrong_type", [0, Raw("1.0")], "position 1"),
    "true for a label": ("wrong_type", [0, True], "position 1"),
    "null for a label": ("wrong_type", ["a", None], "position 1"),
    "a list for a label": ("wrong_type", [["a"], "b"], "position 0"),
    "half of a character": ("wrong_type", ["a", "\ud800"], "position 1"),
    "a string after a number": ("invalid_combination", [1, "2"], "position 1"),
    "a label twice": ("invalid_combination", ["a", "a"], "position 1"),
    "a number twice": ("invalid_combination", [0, Raw("-0")], "position 1"),
}
"""Values of `labels`: the code, the value and words that name the culprit."""


def _case(title: str, code: str, says: str, *, field: str, method: str = "PUT", path: str, body: object) -> Case:
    content, headers = to_json(body), {"Content-Type": JSON}
    return Case(
        name=title, method=method, path=path, code=code, says=(says,), field=field, body=content, headers=headers
    )


def _upload(title: str, code: str, says: str, *, peft: bool = False, labels: object) -> Case:
    own: dict[str, Any] = {"lora_A": [ROW], "lora_B": [[1]] * OUT} if peft else {"A": [[1]] * OUT, "B": [ROW]}
    return _case(title, code, says, field="labels", path="/adapters/fresh", body=own | {"labels": labels})


def _file(title: str, code: str, says: str, *, labels: object) -> Both:
    """A good file of PEFT's, but for the labels in our own metadata."""
    about = json.dumps({"base": None, "labels": 0}).replace("0", to_json([labels]).decode()[1:-1])
    file = tensor_file({A_NAME: ones(OUT, 1), B_NAME: ones(1, IN)}, metadata={"loraplex": about})
    return tensors(title, code, file, says)


UPLOADS = [
    *(_upload(f"take {name} for labels", code, says, labels=labels) for name, (code, labels, says) in BAD.items()),
    _upload("take null for labels", "wrong_type", "null", labels=None),
    _upload("take a label twice beside PEFT's factors", "invalid_combination", "position 1", peft=True, labels=[7, 7]),
    _case(
        "take labels alone",
        "missing_field",
        "A is missing",
        field="A",
        path="/adapters/fresh",
        body={"labels": ["a", "b"]},
    ),
    # 50,000 labels are past the header that a file may have.
    *cases(
        [
            _file(f"a file with {name} for labels", code, says, labels=labels)
            for name, (code, labels, says) in BAD.items()
            if name != "50,000 labels"
        ]
    ),
]


def _predict(title: str, code: str, says: str, *, field: str, **body: Any) -> Case:
    good = {"adapter": "acme", "inputs": [ROW]}
    return _case(title, code, says, field=field, method="POST", path="/predict", body=good | body)


RETURNS = [
    _predict(f"answer with {shorten(given)[:40]}", code, says, field="return", **{"return": given})
    for given, code, says in (
        (None, "wrong_type", "null"),
        ("labels", "wrong_type", "labels"),
        ({"labels": True}, "wrong_type", "labels"),
        (1, "wrong_type", "1"),
        ([], "out_of_range", "empty"),
        ([1], "wrong_type", "position 0"),
        ([None], "wrong_type", "position 0"),
        ([["labels"]], "wrong_type", "position 0"),
        (["labels", "logits"], "out_of_range", "logits"),
        (["Labels"], "out_of_range", "Labels"),
        (["\ud800"], "out_of_range", "position 0"),
        (["x" * 100_000], "out_of_range", "xxxx"),
        (["labels"] * 50_000, "invalid_combination", "position 1"),
        (["outputs", "outputs"], "invalid_combination", "position 1"),
        (["outputs", "labels", "probabilities", "labels"], "invalid_combination", "position 3"),
    )
]
TOP_K = [
    _predict(f"take {title} for top_k", code, says, field="top_k", top_k=top_k, **{"return": ["labels"]})
    for title, top_k, code, says in (
        ("null", None, "wrong_type", "null"),
        ("a string", "1", "wrong_type", "1"),
        ("true", True, "wrong_type", "true"),
        ("1.0", Raw("1.0"), "wrong_type", "1.0"),
        ("a list", [1], "wrong_type", "[1]"),
        ("0", 0, "out_of_range", "0"),
        ("-1", -1, "out_of_range", "-1"),
        ("more than there are outputs", OUT + 1, "out_of_range", str(OUT + 1)),
        ("2^63", 2**63, "out_of_range", str(2**63)),
        ("10^30", 10**30, "out_of_range", str(10**30)),
        ("NaN", Raw("NaN"), "not_finite", "NaN"),
        ("1e400", Raw("1e400"), "not_finite", "Infinity"),
        ("an integer of 10,000 digits", TEN_THOUSAND_DIGITS, "not_finite", "Infinity"),
    )
] + [
    _predict("take top_k without classes", "invalid_combination", "neither", field="top_k", top_k=1),
    _predict(
        "take top_k for outputs", "invalid_combination", "neither", field="top_k", top_k=1, **{"return": ["outputs"]}
    ),
    _predict("take a field by another name", "unknown_field", "wanted", field="wanted", wanted=["labels"]),
    _predict(
        "guess an adapter that was left out",
        "missing_field",
        "null",
        field="adapter",
        adapter=LEFT_OUT,
        **{"return": ["labels"]},
    ),
    _predict(
        "answer in labels with an unknown adapter",
        "adapter_not_found",
        "nobody",
        field="adapter",
        adapter="nobody",
        **{"return": ["labels"]},
    ),
]


def _infer(title: str, code: str, count: object) -> Case:
    tensor = {"name": "inputs", "shape": [1, IN], "datatype": "FP32", "data": ROW}
    output = {"name": "outputs", "parameters": {"classification": count}}
    body = {"inputs": [tensor], "outputs": [output]}
    says = "outputs.parameters.classification"
    return _case(f"take {title} for classification", code, says, field=says, method="POST", path=INFER, body=body)


CLASSES = [
    _infer(title, code, count)
    for title, code, count in (
        ("null", "wrong_type", None),
        ("a string", "wrong_type", "1"),
        ("true", "wrong_type", True),
        ("1.0", "wrong_type", Raw("1.0")),
        ("a list", "wrong_type", [1]),
        ("NaN", "wrong_type", Raw("NaN")),
        ("1e400", "wrong_type", Raw("1e400")),
        ("0", "out_of_range", 0),
        ("-1", "out_of_range", -1),
        ("2^32", "out_of_range", 2**32),
        ("10^300", "out_of_range", 10**300),
    )
]


@pytest.mark.parametrize("case", UPLOADS + RETURNS + TOP_K, ids=lambda case: case.name)
def test_it_is_refused_to(target: Target, case: Case) -> None:
    target.refuses(case)


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_infer_refuses_to(target: Target, case: Case) -> None:
    target.refuses_in_protocol(case)
