"""Defaults of a training: those of the contract, declared once and shown by the description of the API."""

from dataclasses import fields
from typing import Any

from adapters.training.evaluation.gate import When
from adapters.training.planning.request import PublishRequest, TrainingRequest
from adapters.training.settings import AUTO, SETTINGS, Init, Loss, Method, RequestedSettings, settings_of
from app.http.schemas.trainings import TrainRequest, training_request

ROWS = {"inputs": [[1.0]], "targets": [[1.0]]}


def _defaults() -> dict[str, Any]:
    schema = TrainRequest.model_json_schema()
    properties = schema["properties"] | schema["$defs"]["TrainingBody"]["properties"]
    return {name: described["default"] for name, described in properties.items() if "default" in described}


def test_the_defaults_are_those_of_the_contract() -> None:
    declared = _defaults()
    assert {name: declared[name] for name in ("rank", "method", "loss", "bias", "split")} == dict.fromkeys(
        ("rank", "method", "loss", "bias", "split"), AUTO
    )
    assert declared["publish"] == When.IF_NOT_WORSE


def test_the_api_shows_the_default_of_each_declaration() -> None:
    declared = _defaults()
    assert declared["split"] == settings_of(TrainingRequest)["split"].default
    assert declared["publish"] == settings_of(PublishRequest)["when"].default
    for name, setting in SETTINGS.items():
        assert declared[name] == setting.default, name


def test_a_request_of_a_name_and_rows_has_the_declared_defaults() -> None:
    request = training_request({"name": "acme", "data": ROWS})
    settings = {field.name: getattr(request.settings, field.name) for field in fields(RequestedSettings)}
    assert settings == {name: setting.default for name, setting in SETTINGS.items()} | {"given": {"name", "data"}}
    assert (request.split, request.publish) == (AUTO, PublishRequest())


def test_a_request_that_names_a_method_has_the_values_of_section_7() -> None:
    training = {"method": "adamw"}
    request = training_request({"name": "acme", "data": ROWS, "training": training}).complete(Loss.MSE, max_rank=256)
    of_section_7 = {
        "rank": 4,
        "method": Method.ADAMW,
        "loss": Loss.MSE,
        "bias": False,
        "epochs": 50,
        "learning_rate": 0.01,
        "batch_size": 64,
        "seed": 0,
        "init": Init.ZERO_DELTA,
        "validation_fraction": 0,
        "ridge": 0,
    }
    assert {name: getattr(request.settings, name) for name in of_section_7} == of_section_7
    assert request.split is None
    small = training_request({"name": "acme", "data": ROWS, "training": training}).complete(Loss.MSE, max_rank=3)
    assert small.settings.rank == 3
    evaluated = training_request({"name": "acme", "data": ROWS, "training": training, "split": "auto"})
    assert evaluated.complete(Loss.MSE, max_rank=3).split == AUTO


def test_a_request_that_names_none_leaves_to_the_data_what_it_leaves_out() -> None:
    request = training_request({"name": "acme", "data": ROWS, "rank": 2, "training": {"epochs": 3}})
    settings = request.complete(Loss.CROSS_ENTROPY, max_rank=256).settings
    assert (settings.rank, settings.epochs, settings.loss) == (2, 3, Loss.CROSS_ENTROPY)
    assert {getattr(settings, name) for name in ("method", "bias", "learning_rate", "batch_size", "ridge")} == {AUTO}
