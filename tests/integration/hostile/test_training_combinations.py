"""`POST /adapters` with settings that are fine alone: what another ignores, and what auto cannot decide."""

from typing import Any

import pytest

from tests.integration.hostile.bodies import Raw
from tests.integration.hostile.case import Case, Target
from tests.integration.hostile.test_training_settings import OUTSIDE
from tests.integration.hostile.training_cases import CLASSES, CROSS, NUMBERS, beside, case, setting

USELESS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("a ridge beside epochs", NUMBERS, {"ridge": 0.5, "epochs": 3}),
    ("keep_statistics", NUMBERS, {"keep_statistics": False, "epochs": 3}),
    ("momentum", NUMBERS, {"momentum": 0.5}),
]
"""Settings of which the first has no use once auto has come to adamw."""
OF_GRADIENTS: dict[str, Any] = {
    "weight_decay": 0,
    "momentum": 0,
    "clip_norm": None,
    "schedule": "constant",
    "warmup_steps": 0,
    "early_stopping": {},
    "max_steps": None,
    "max_seconds": None,
}
OF_LOSSES: dict[str, tuple[Any, str]] = {
    "huber_delta": (1.0, "huber"),
    "label_smoothing": (0, "cross_entropy"),
    "class_weights": ("balanced", "cross_entropy"),
    "temperature": (0.05, "multiple_negatives"),
}

LEFT_TO_THE_DATA = [
    *(
        setting(f"leave {name} to the data", "wrong_type", "auto", **beside(name, "auto"))
        for name in (*OUTSIDE, "seed", "validation_fraction", "early_stopping", "prior")
        if name != "learning_rate"
    ),
    setting("leave the schedule to the data", "out_of_range", "auto", schedule="auto"),
    setting("leave class_weights to the data", "wrong_type", "auto", class_weights="auto", data=CLASSES, **CROSS),
    setting("leave the start to the data", "wrong_type", "auto", init="auto"),
    *(
        setting(f"take {name} in capitals", "wrong_type", "AUTO", **{name: "AUTO"})
        for name in ("epochs", "learning_rate", "batch_size")
    ),
    case("take the rank in capitals", "wrong_type", "AUTO", field="rank", rank="AUTO"),
    case("take alpha in capitals", "wrong_type", "AUTO", field="alpha", alpha="AUTO"),
    *(
        setting(f"ignore {name} with classes in closed form", "ignored_field", "closed_form", **settings)
        for name, settings in (
            ("label_smoothing", {"label_smoothing": 0.1, "method": "closed_form", "loss": "cross_entropy"}),
            ("class_weights", {"class_weights": "balanced", "method": "closed_form", "loss": "cross_entropy"}),
        )
    ),
    setting(
        "keep statistics of classes",
        "invalid_combination",
        "cross_entropy",
        loss="cross_entropy",
        method="closed_form",
        keep_statistics=True,
        data=CLASSES,
    ),
    setting("try a bias with a method", "invalid_combination", "adamw", bias="auto", method="adamw"),
    case(
        "shrink towards a prior by another loss",
        "invalid_combination",
        "closed_form",
        field="training.loss",
        training={"method": "auto", "loss": "huber", "prior": {"adapter": "acme"}},
    ),
    case("leave the publish to the data", "out_of_range", "auto", field="publish", publish="auto"),
    *(
        setting(
            f"leave {name} to the data in closed form",
            "ignored_field",
            "closed_form",
            **{name: "auto"},
            method="closed_form",
        )
        for name in ("epochs", "learning_rate", "batch_size")
    ),
    *(
        setting(f"leave the ridge to the data with {method}", "ignored_field", method, ridge="auto", method=method)
        for method in ("adamw", "sgd")
    ),
    *(
        setting(
            f"ignore {name} where auto comes to adamw", "ignored_field", "adamw", data=data, **training, method="auto"
        )
        for name, data, training in USELESS
    ),
]


IGNORED = [
    *(
        setting(
            f"ignore {name} with closed_form", "ignored_field", "closed_form", **{name: value}, method="closed_form"
        )
        for name, value in OF_GRADIENTS.items()
    ),
    *(
        setting(f"ignore {name} with {method}", "ignored_field", method, **{name: value}, method=method)
        for method in ("adamw", "sgd")
        for name, value in {"prior": {"adapter": "acme"}, "keep_statistics": False}.items()
    ),
    setting("ignore momentum with adamw", "ignored_field", "adamw", momentum=0),
    *(
        setting(f"ignore {name} with {loss}", "ignored_field", loss, **{name: value}, loss=loss)
        for name, (value, fits) in OF_LOSSES.items()
        for loss in ("mse", "huber", "cross_entropy", "binary_cross_entropy", "cosine", "multiple_negatives")
        if loss != fits
    ),
    *(
        setting(
            f"fit {loss} in closed form", "invalid_combination", "closed_form", loss, loss=loss, method="closed_form"
        )
        for loss in ("huber", "cosine", "multiple_negatives")
    ),
    *(
        case(
            f"draw negatives from a batch of unsaid size with {method}",
            "missing_field",
            field="training.batch_size",
            training={"loss": "multiple_negatives", "method": method},
        )
        for method in ("adamw", "sgd")
    ),
]


PRIORS = [
    *(
        case(
            f"shrink towards {title}",
            code,
            *says,
            field=f"training.prior{inner}",
            training={"method": "closed_form", "prior": prior},
        )
        for title, code, inner, says, prior in (
            ("a name", "wrong_type", "", ["acme"], "acme"),
            ("a list", "wrong_type", "", [], ["acme"]),
            ("an empty object", "missing_field", ".adapter", [], {}),
            ("no adapter", "wrong_type", ".adapter", ["null"], {"adapter": None}),
            ("a number", "wrong_type", ".adapter", ["7"], {"adapter": 7}),
            ("an adapter and more", "unknown_field", ".ridge", [], {"adapter": "acme", "ridge": 1}),
            ("nobody", "adapter_not_found", ".adapter", ["nobody"], {"adapter": "nobody"}),
            ("a version that is not there", "version_not_found", ".adapter", ["9"], {"adapter": "acme@9"}),
            ("one that is not live", "adapter_not_live", ".adapter", ["draft"], {"adapter": "draft"}),
            ("one of another base", "base_mismatch", ".adapter", ["foreign"], {"adapter": "foreign"}),
            ("one of another encoder", "feature_space_mismatch", ".adapter", ["elsewhere"], {"adapter": "elsewhere"}),
            ("a bad name", "invalid_name", ".adapter", ["../x"], {"adapter": "../x"}),
            ("a bad version", "invalid_reference", ".adapter", ["acme@0"], {"adapter": "acme@0"}),
        )
    )
]


DRY_RUNS = [
    *(
        case(f"run dry {value!r}", code, field="dry_run", query=f"?dry_run={value}")
        for value, code in (("maybe", "wrong_type"), ("True", "wrong_type"), ("1", "wrong_type"), ("", "wrong_type"))
    ),
    case("take a query that it does not know", "unknown_field", field="dry", query="?dry=true"),
    case("run dry what cannot be run", "out_of_range", field="rank", rank=0, query="?dry_run=true"),
    case(
        "run dry what auto cannot decide",
        "missing_field",
        field="split",
        training={"early_stopping": {}},
        query="?dry_run=true",
    ),
    case("say whole numbers as text", "wrong_type", field="rank", rank=Raw('"2"'), query="?dry_run=false"),
]


@pytest.mark.parametrize("case", LEFT_TO_THE_DATA + IGNORED + PRIORS + DRY_RUNS, ids=lambda case: case.name)
def test_training_refuses_to(target: Target, case: Case) -> None:
    target.refuses(case)
