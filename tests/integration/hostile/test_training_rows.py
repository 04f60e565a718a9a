"""`POST /adapters` with weights, groups and documents that do not go with the rows, and bad names of fleets."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import NOT_FINITE, NOT_NUMBERS, OUT, ROW, to_json
from tests.integration.hostile.case import Case, Target, problem_of
from tests.integration.hostile.training_cases import BINARY, CLASSES, CROSS, NEGATIVES, NUMBERS, SHARES, case, rows

NOT_GROUPS: dict[str, Any] = {"null": None, "true": True, "1.0": 1.0, "a list": ["a"], "an object": {}}


def _weights(title: str, code: str, /, *says: str, weights: Any, row: int | None = None) -> Case:
    return rows(title, code, *says, field="data.weights", row=row, weights=weights)


def _groups(title: str, code: str, /, *says: str, groups: Any, row: int | None = None) -> Case:
    return rows(title, code, *says, field="data.groups", row=row, groups=groups)


def _fleet(title: str, code: str, /, *says: str, field: str = "name", name: str, **body: Any) -> Case:
    groups = body.pop("groups", ["a", "a", "b"])
    data = {"inputs": [ROW] * 3, "targets": [[1.0] * OUT] * 3} | ({} if groups is None else {"groups": groups})
    return case(title, code, *says, field=field, name=name, **{"data": data} | body)


WEIGHTS = [
    _weights("take null for weights", "wrong_type", "null", weights=None),
    _weights("take a number for weights", "wrong_type", "1", weights=1),
    _weights("take an object for weights", "wrong_type", weights={"0": 1}),
    _weights("weigh fewer rows than there are", "wrong_shape", "2 numbers", weights=[1, 1]),
    _weights("weigh more rows than there are", "wrong_shape", "4 numbers", weights=[1] * 4),
    _weights("weigh no rows", "wrong_shape", "0 numbers", weights=[]),
    _weights("weigh a row -1", "bad_rows", "below 0", row=2, weights=[1, 0, -1]),
    _weights("weigh every row 0", "out_of_range", "every weight is 0", weights=[0, 0, 0]),
    _weights("weigh every row less than float32 can", "out_of_range", "every weight is 0", weights=[1e-60] * 3),
    *(
        _weights(f"weigh a row {title}", "wrong_type", "position 1", weights=[1, value, 1])
        for title, value in (NOT_NUMBERS | {"null": None}).items()
    ),
    *(
        _weights(f"weigh a row {title}", "not_finite", "position 2", weights=[1, 1, number])
        for title, number in NOT_FINITE.items()
    ),
]

GROUPS = [
    _groups("take null for groups", "wrong_type", "null", groups=None),
    _groups("take a string for groups", "wrong_type", "abc", groups="abc"),
    _groups("group fewer rows than there are", "wrong_shape", "2 rows", groups=["a", "b"]),
    _groups("group more rows than there are", "wrong_shape", "4 rows", groups=["a"] * 4),
    _groups("group by numbers and strings", "wrong_type", "b", row=1, groups=[1, "b", 2]),
    *(
        _groups(f"group a row by {title}", "wrong_type", row=0, groups=[value, "b", "c"])
        for title, value in NOT_GROUPS.items()
    ),
    *(
        _groups(f"group a row by {title}", "not_finite", row=2, groups=[1, 2, NOT_FINITE[title]])
        for title in ("NaN", "1e400", "10^400", "an integer of 10,000 digits")
    ),
]

DOCUMENTS = [
    *(
        rows(
            f"search documents with {loss}",
            "ignored_field",
            loss,
            field="data.corpus",
            training={"loss": loss},
            targets=targets,
            corpus=[[1.0] * OUT],
        )
        for loss, targets in {"mse": [[1.0] * OUT] * 3, "cosine": [[1.0] * OUT] * 3, "cross_entropy": [0, 1, 0]}.items()
    ),
    *(
        rows(f"search {title}", code, *says, field="data.corpus", row=row, training=NEGATIVES, corpus=corpus)
        for title, code, says, row, corpus in (
            ("null", "wrong_type", ["null"], None, None),
            ("no documents", "wrong_shape", ["0 rows"], None, []),
            ("narrow documents", "wrong_shape", ["1 numbers"], 0, [[1.0]]),
            ("a document that is a number", "wrong_type", [], 1, [[1.0] * OUT, 2]),
            ("a document that is not finite", "not_finite", [], 0, [[1.0, NOT_FINITE["1e39"]]]),
            ("documents for no held-out rows", "ignored_field", ["no rows are held out"], None, [[1.0] * OUT]),
        )
    ),
]

FLEETS = [
    *(
        _fleet(f"train {name}", "invalid_name", name, name=name)
        for name in ("acme-{tenant}", "acme-{}", "{group}-{group}", "{group}-{tenant}", "acme-{Group}", "acme-{group }")
    ),
    *(
        _fleet(f"train {name}", "invalid_name", name, name=name, groups=groups)
        for name in ("acme-{", "acme-{group", "acme-{group{", "{")
        for groups in (["a", "a", "b"],)
    ),
    _fleet("train a brace without groups", "invalid_name", "acme-{", name="acme-{", groups=None),
    _fleet(
        "train a fleet without groups",
        "missing_field",
        "acme-{group}",
        field="data.groups",
        name="acme-{group}",
        groups=None,
    ),
    *(
        _fleet(f"publish a fleet's prior as {prior!r}", code, field="fleet_prior", name="acme-{group}", **body)
        for code, prior, body in (
            ("invalid_name", "a b", {"fleet_prior": "a b"}),
            ("wrong_type", 7, {"fleet_prior": 7}),
            ("wrong_type", None, {"fleet_prior": None}),
            ("invalid_combination", "acme-b", {"fleet_prior": "acme-b", "training": {"method": "auto"}}),
            ("invalid_combination", "prior", {"fleet_prior": "prior", "training": {"method": "adamw"}}),
        )
    ),
    case("publish the prior of no fleet", "invalid_combination", field="fleet_prior", fleet_prior="prior"),
    _fleet(
        "train two groups of one name",
        "invalid_combination",
        "'a b'",
        "'a-b-c8687a08'",
        name="acme-{group}",
        groups=["a b", "a-b-c8687a08", "b"],
    ),
    _fleet("train a fleet under a bad name", "invalid_name", name="../{group}"),
    _fleet("train a fleet of long names", "invalid_name", name="x" * 100 + "-{group}", groups=["y" * 40, "b", "b"]),
    *(
        _fleet(f"leave the {name} of a fleet open", "invalid_combination", field=field, name="acme-{group}", **body)
        for name, field, body in (
            ("rank", "rank", {"rank": "auto"}),
            ("learning rate", "training.learning_rate", {"training": {"learning_rate": "auto"}}),
            ("ridge", "training.ridge", {"training": {"method": "closed_form", "ridge": "auto"}}),
        )
    ),
    _fleet(
        "keep the statistics of a fleet",
        "invalid_combination",
        field="training.keep_statistics",
        name="acme-{group}",
        training={"method": "closed_form", "keep_statistics": True},
    ),
    _fleet(
        "gate a fleet",
        "invalid_combination",
        field="publish.when",
        name="acme-{group}",
        split={"by": "rows", "fraction": 0.5},
        publish={"when": "if_better"},
    ),
    *(
        _fleet(
            f"hold out {fraction} of groups of one row",
            "out_of_range",
            "3 rows",
            field="split",
            name="acme-{group}",
            groups=["a", "b", "c"],
            split={"by": "rows", "fraction": fraction},
        )
        for fraction in (0.1, 0.9)
    ),
    _fleet(
        "validate groups of one row",
        "out_of_range",
        "3 rows",
        field="training.validation_fraction",
        name="acme-{group}",
        groups=["a", "b", "c"],
        training={"validation_fraction": 0.9},
    ),
]


@pytest.mark.parametrize("case", WEIGHTS + GROUPS + DOCUMENTS + FLEETS, ids=lambda case: case.name)
def test_training_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)


def test_bad_rows_are_named_up_to_twenty(target: Target) -> None:
    many = 50
    data = {"inputs": [ROW] * many, "weights": [1, *[-1] * (many - 1)], "targets": [[1.0] * OUT] * many}
    body = to_json({"name": "fresh", "rank": 2, "data": data})
    answer = target.client.post("/adapters", content=body, headers={"Content-Type": "application/json"})
    rows = answer.json()["rows"]
    assert problem_of(answer)["detail"] == "data.weights: 49 weights are below 0"
    assert rows == [{"row": row, "column": None, "reason": "the weight -1 is below 0"} for row in range(1, 21)]


@pytest.mark.parametrize(
    ("data", "training", "rank"),
    [(NUMBERS, {}, 2), (CLASSES, CROSS, 1), (SHARES, BINARY, "auto")],
    ids=["numbers", "classes", "shares"],
)
def test_what_the_cases_change_is_good_as_it_stands(target: Target, data: Any, training: Any, rank: Any) -> None:
    before = target.state()
    body = {"name": "fresh", "rank": rank, "data": data, "training": training}
    answer = target.client.post("/adapters?dry_run=true", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"spec", "estimate", "adapters"}
    assert target.state() == before
