"""The page on training says what the code takes: every field, its default, its bound, and every choice there is."""

import json
import re
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from adapters.training.closed_form import ridge_search
from adapters.training.evaluation import selection as choice
from adapters.training.evaluation.evaluate import TASKS
from adapters.training.evaluation.gate import When
from adapters.training.evaluation.metrics import HIGHER_IS_BETTER
from adapters.training.gradient import training_loop as descent
from adapters.training.limits import MAX_STEPS
from adapters.training.planning import auto
from adapters.training.planning.request import GATE_METRICS
from adapters.training.planning.split import FEW_ROWS, FOLDS, SplitBy
from adapters.training.settings import AUTO, SETTINGS, Init, Loss, Method, Schedule
from app.http.schemas import trainings as schemas
from app.http.schemas.fields import OR_AUTO, RequestBody, not_null
from tests.conftest import Serve

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
MODELS: list[type[BaseModel]] = [
    schemas.TrainRequest,
    schemas.InlineData,
    schemas.DatasetData,
    schemas.CorpusBody,
    schemas.SplitBody,
    schemas.TrainingBody,
    schemas.EarlyStoppingBody,
    schemas.InitFactors,
    schemas.InitAdapter,
    schemas.PriorBody,
    schemas.GateBody,
    schemas.UpdateRequest,
]
FIELDS = [(model, name) for model in MODELS for name in model.model_fields]
_OPERATORS = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _rows_after(text: str) -> list[list[str]]:
    """The cells of the first table after this text, without its heading."""
    assert PAGE.count(text) == 1, text
    lines = PAGE.partition(text)[2].lstrip("\n").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    table = []
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            break
        table.append(_cells(line))
    return table


def _table(model: type[BaseModel]) -> dict[str, list[str]]:
    return {row[0].strip("`"): row[1:] for row in _rows_after(f"<!-- fields: {model.__name__} -->\n")}


def _names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def _number(text: str) -> float:
    base, _, power = text.replace(",", "").partition("^")
    return float(float(base) ** float(power or 1))


def _kinds(annotation: Any) -> set[Any]:
    """The types of which a field may be, and the words that it may be."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    arguments = get_args(annotation)
    return set().union(*map(_kinds, arguments)) if arguments else {annotation}


def _takes_null(field: FieldInfo) -> bool:
    refuses = any(isinstance(each, BeforeValidator) and each.func is not_null for each in field.metadata)
    return NoneType in _kinds(field.annotation) and not refuses


def _takes_auto(field: FieldInfo) -> bool:
    return OR_AUTO in field.metadata or AUTO in _kinds(field.annotation)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_table_has_the_fields_of_its_model_in_their_order(model: type[BaseModel]) -> None:
    assert list(_table(model)) == list(model.model_fields)


def test_every_body_of_a_request_has_a_table() -> None:
    requests = {kind for kind in vars(schemas).values() if isinstance(kind, type) and issubclass(kind, RequestBody)}
    # docs/evaluations.md has the fields of the other one.
    assert requests - {RequestBody, schemas.EvaluateRequest} == set(MODELS)
    assert len(re.findall(r"<!-- fields: \w+ -->", PAGE)) == len(MODELS)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_field_has_its_default(model: type[BaseModel], name: str) -> None:
    field, told = model.model_fields[name], _table(model)[name][0]
    default = field.get_default(call_default_factory=True, validated_data={})
    if field.is_required():
        assert told == "required"
    elif isinstance(default, BaseModel):
        assert told == "{}"
        assert default == type(default)()
    elif default is None and not _takes_null(field) and field.annotation is not Any:
        assert told == ("the rank" if name == "alpha" else "left out")
    elif default is None:
        # An update reads its rows as soon as they are given, null too.
        refuses = model is schemas.UpdateRequest or any(isinstance(each, BeforeValidator) for each in field.metadata)
        assert told == ("left out" if refuses else "null")
    elif type(default) in (int, float):
        assert _number(told) == default
    else:
        assert told == str(default).lower()


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_field_has_its_bound(model: type[BaseModel], name: str) -> None:
    field, told = model.model_fields[name], _table(model)[name][1]
    kinds = _kinds(field.annotation)
    if kinds == {Any}:
        assert told
        return
    bounds = {
        (sign, float(getattr(each, kind.__name__.lower())))
        for each in field.metadata
        for kind, sign in _OPERATORS.items()
        if isinstance(each, kind)
    }
    written = {(sign, _number(number)) for sign, number in re.findall(r"([≥>≤<]) ([\d.,^e-]*[\d])", told)}
    assert written == bounds
    assert ("whole" in told) == (int in kinds)
    assert ("null" in re.findall(r"\w+", told)) == _takes_null(field)
    assert ("auto" in re.findall(r"\w+", told)) == _takes_auto(field)
    if bool in kinds:
        assert "true, false" in told
    words = {each for each in kinds if isinstance(each, str)} - {AUTO}
    assert set(_names(told)) == words


def test_a_setting_says_which_methods_or_losses_it_goes_with() -> None:
    for name, (_, _, told, _) in _table(schemas.TrainingBody).items():
        methods, losses = SETTINGS[name].methods, SETTINGS[name].losses
        expected = methods if methods != tuple(Method) else losses if losses != tuple(Loss) else ("all",)
        assert told == ", ".join(expected), name


def _first_column(text: str) -> list[str]:
    return [name for row in _rows_after(text) for name in _names(row[0])]


def test_every_choice_has_its_line() -> None:
    assert _first_column("What targets are depends on the loss:") == [
        "mse",
        "huber",
        "cosine",
        "multiple_negatives",
        "cross_entropy",
        "binary_cross_entropy",
    ]
    assert sorted(_first_column("## Losses")) == sorted(Loss)
    assert _first_column("| `by` | held out are |") == [by for by in SplitBy if by is not SplitBy.HASH]
    assert _first_column("| `init` | start |")[:2] == [Init.ZERO_DELTA, Init.RANDN]
    assert _first_column("| method | update with rate η, gradient g |") == [Method.ADAMW, Method.SGD]
    assert f"\n## {Method.CLOSED_FORM}\n" in PAGE
    assert [name for name in _first_column("| schedule | rate of step k of n") if name in set(Schedule)] == list(
        Schedule
    )
    assert _names(_table(schemas.GateBody)["when"][1]) == list(When)


def test_the_metrics_that_can_gate_are_those_of_the_code() -> None:
    told = {
        loss: set(_names(row[1])) for row in _rows_after("| loss | metrics that can gate |") for loss in _names(row[0])
    }
    assert told == {loss: set(GATE_METRICS[TASKS[loss]]) for loss in Loss}
    assert set(_names(_table(schemas.GateBody)["metric"][1])) == set(HIGHER_IS_BETTER)


def test_what_auto_becomes_is_what_the_code_decides() -> None:
    told = {_names(row[0])[0]: row[1] for row in _rows_after("\n## auto\n")}
    request = {name for name, field in schemas.TrainRequest.model_fields.items() if _takes_auto(field)}
    settings = {name for name, field in schemas.TrainingBody.model_fields.items() if _takes_auto(field)}
    assert told.keys() == request | settings
    assert f"of {', '.join(map(str, auto.RANKS))} up to" in told["rank"]
    assert f"within {100 * ridge_search.LOSS_TOLERANCE:g} % of the least" in told["rank"]
    assert f"of {', '.join(f'{rate:g}' for rate in auto.LEARNING_RATES)} whose" in told["learning_rate"]
    assert f"a trial of {choice.TRIAL_STEPS} steps" in told["learning_rate"]
    assert f"up to {auto.FULL_BATCH_ROWS} rows" in told["batch_size"]
    assert f"about {auto.STEPS} steps" in told["epochs"]
    section = PAGE.partition("\n## auto\n")[2].partition("\n## ")[0]
    for words in (
        f"{FOLDS}-fold cross-validation",
        f"Fewer than {FEW_ROWS} rows",
        f"Fewer than {auto.MIN_ROWS} rows",
        f"min({auto.FEW_ROWS_RANK}, ",
        f"about {auto.FEW_ROWS_STEPS} steps",
        f"the rate {auto.FALLBACK_RATE:g}",
    ):
        assert words in section, words


def test_the_requests_that_the_page_begins_with_can_be_trained(serve: Serve) -> None:
    requests = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert len(requests) == 2
    client, _ = serve(base="random:3,4,42")
    heading, topics = "e_0,e_1,e_2,topic,customer", ("bill", "door", "lamp", "tap")
    for version in range(3):
        rows = [f"{row},{version},1,{topics[row % 4]},c{row // 6}" for row in range(60)]
        body = "\n".join([heading, *rows])
        client.put("/datasets/tickets", content=body, headers={"Content-Type": "text/csv"}).raise_for_status()
    for request in requests:
        answer = client.post("/adapters?dry_run=true", json=json.loads(request))
        assert answer.status_code == 200, answer.text
        assert answer.json().keys() == {"spec", "estimate", "adapters"}
        assert answer.json()["spec"]["labels"] == list(topics)


def test_numbers_of_the_code_stand_on_the_page() -> None:
    assert f"all steps together at most {MAX_STEPS:,}" in PAGE
    assert f"every {descent.SECONDS_BETWEEN_CHECKPOINTS:g} seconds" in PAGE
