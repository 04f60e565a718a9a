"""`POST /adapters` with splits that hold nothing out, and gates that compare nothing."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import LEFT_OUT, NOT_FINITE, NOT_NUMBERS
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.training_cases import (
    BINARY,
    CLASSES,
    CROSS,
    HALF,
    NOT_WHOLE,
    NUMBERS,
    ROWS,
    SHARES,
    case,
)

OUTSIDE: dict[str, list[Any]] = {"margin": [-0.1, -1, 1e31], "min_rows": [0, -1, 10**9 + 1]}
"""Of a gate."""


def _split(title: str, code: str, /, *says: str, field: str = "split", data: Any = NUMBERS, **split: Any) -> Case:
    return case(title, code, *says, field=field, data=data, split=split)


def _gate(title: str, code: str, /, *says: str, field: str, **body: Any) -> Case:
    return case(title, code, *says, field=field, **{"split": HALF} | body)


SPLITS = [
    *(
        case(f"take {title} for split", "wrong_type", field="split", split=value)
        for title, value in NOT_NUMBERS.items()
        if title != "an object"
    ),
    _split("hold out by nothing", "invalid_combination", "by"),
    _split("hold out by null", "invalid_combination", by=None),
    _split("hold out by chance", "out_of_range", "chance", field="split.by", by="chance"),
    _split("hold out by a number", "wrong_type", "1", field="split.by", by=1),
    _split("take an unknown field of a split", "unknown_field", field="split.seed", by="rows", seed=1),
    *(
        _split(f"hold out {value!r}", "out_of_range", str(value), field="split.fraction", by="rows", fraction=value)
        for value in (0, 1, -0.1, 1.5, 2)
    ),
    *(
        _split(f"hold out {title}", "wrong_type", field="split.fraction", by="rows", fraction=value)
        for title, value in (NOT_NUMBERS | {"null": None}).items()
    ),
    *(
        _split(f"hold out {title}", "not_finite", field="split.fraction", by="rows", fraction=NOT_FINITE[title])
        for title in ("NaN", "Infinity", "1e400")
    ),
    _split("hold out too little", "out_of_range", "0 to validate", by="rows", fraction=0.01),
    _split("hold out too much", "out_of_range", "0 rows to train", by="rows", fraction=0.99),
    _split("stratify with a number", "wrong_type", "1", field="split.stratify", by="rows", stratify=1),
    _split("stratify numbers", "invalid_combination", field="split.stratify", by="rows", stratify=True),
    case(
        "stratify labels that may hold together",
        "invalid_combination",
        field="split.stratify",
        split={"by": "rows", "stratify": True},
        data=SHARES,
        training=BINARY,
    ),
    case(
        "stratify groups",
        "invalid_combination",
        field="split.stratify",
        split={"by": "group", "stratify": True},
        data=CLASSES | {"groups": list(range(ROWS))},
        training=CROSS,
    ),
    _split("split by groups that it does not know", "missing_field", field="data.group", by="group"),
    _split("split one group", "out_of_range", "0 to validate", by="group", data=NUMBERS | {"groups": ["a"] * ROWS}),
    *(
        _split(f"split by {by} without a column", "missing_field", field="split.column", by=by)
        for by in ("time", "column")
    ),
    *(
        _split(
            f"split rows of a request by {by}",
            "invalid_combination",
            "when",
            field="split.column",
            by=by,
            column="when",
        )
        for by in ("time", "column")
    ),
    *(
        _split(
            f"ignore the column of a split by {by}", "ignored_field", "when", field="split.column", by=by, column="when"
        )
        for by in ("rows", "group")
    ),
    _split("take null for the column", "wrong_type", "null", field="split.column", by="time", column=None),
    _split("take a number for the column", "wrong_type", "1", field="split.column", by="time", column=1),
    _split(
        "ignore the fraction of a column",
        "ignored_field",
        field="split.fraction",
        by="column",
        column="x",
        fraction=0.2,
    ),
    _split("hold out rows and a data set", "invalid_combination", by="rows", dataset="held"),
    _split(
        "hold out a data set beside rows of a request", "invalid_combination", field="split.dataset", dataset="held"
    ),
    _split("ignore the fraction of a data set", "ignored_field", field="split.fraction", dataset="held", fraction=0.5),
    _split("ignore the strata of a data set", "ignored_field", field="split.stratify", dataset="held", stratify=True),
    case(
        "hold out twice",
        "invalid_combination",
        "validation_fraction",
        field="split",
        split=HALF,
        training={"validation_fraction": 0.5},
    ),
]


GATES = [
    *(
        case(f"publish {title}", "wrong_type", field="publish", publish=value)
        for title, value in {"a number": 1, "a list": ["always"], "false": False}.items()
    ),
    _gate("publish in an empty object", "missing_field", field="publish.when", publish={}),
    _gate("publish if_better as a word", "out_of_range", "if_better", field="publish", publish="if_better"),
    _gate("publish when asked", "out_of_range", "asked", field="publish.when", publish={"when": "asked"}),
    _gate("publish when null", "wrong_type", "null", field="publish.when", publish={"when": None}),
    _gate(
        "publish with an unknown field",
        "unknown_field",
        field="publish.than",
        publish={"when": "if_better", "than": "base"},
    ),
    _gate("gate without held-out rows", "missing_field", field="split", split=LEFT_OUT, publish={"when": "if_better"}),
    *(
        _gate(
            f"gate by {metric}",
            "out_of_range",
            metric,
            field="publish.metric",
            publish={"when": "if_better", "metric": metric},
        )
        for metric in ("f1", "LOSS", "", "auto", "validation_loss")
    ),
    _gate("gate by null", "wrong_type", "null", field="publish.metric", publish={"when": "if_better", "metric": None}),
    *(
        _gate(
            f"gate {loss} by {metric}",
            "invalid_combination",
            metric,
            loss,
            field="publish.metric",
            publish={"when": "if_better", "metric": metric},
            data=data,
            training={"loss": loss} | ({"batch_size": 4} if loss == "multiple_negatives" else {}),
        )
        for loss, data, metrics in (
            ("mse", NUMBERS, ("accuracy", "macro_f1", "recall_at_1")),
            ("huber", NUMBERS, ("exact_match", "mrr")),
            ("cosine", NUMBERS, ("calibration_error",)),
            ("cross_entropy", CLASSES, ("rmse", "exact_match", "micro_f1", "cosine")),
            ("binary_cross_entropy", SHARES, ("accuracy", "r2_mean")),
            ("multiple_negatives", NUMBERS, ("accuracy", "rmse", "cosine")),
        )
        for metric in metrics
    ),
    *(
        _gate(
            f"gate by a {name} of {value!r}",
            "out_of_range",
            str(value),
            field=f"publish.{name}",
            publish={"when": "if_better", name: value},
        )
        for name, values in OUTSIDE.items()
        for value in values
    ),
    *(
        _gate(
            f"gate by a {name} of {title}",
            "wrong_type",
            field=f"publish.{name}",
            publish={"when": "if_better", name: value},
        )
        for name in ("margin", "min_rows")
        for title, value in ((NOT_WHOLE if name == "min_rows" else NOT_NUMBERS) | {"null": None}).items()
    ),
    *(
        _gate(
            f"gate by a {name} of {title}",
            "not_finite",
            field=f"publish.{name}",
            publish={"when": "if_better", name: NOT_FINITE[title]},
        )
        for name in ("margin", "min_rows")
        for title in ("NaN", "Infinity", "1e400")
    ),
    *(
        _gate(
            f"ignore {name} where it publishes {when}",
            "ignored_field",
            when,
            field=f"publish.{name}",
            publish={"when": when, name: value},
        )
        for when in ("always", "never")
        for name, value in {"metric": "loss", "margin": 0, "min_rows": 50}.items()
    ),
]


@pytest.mark.parametrize("case", SPLITS + GATES, ids=lambda case: case.name)
def test_training_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)
