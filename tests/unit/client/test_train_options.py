"""Options of `loraplex train`, against the service's table of settings, which the client cannot import."""

from typing import Any, get_args

import pytest
from loraplex.cli import train
from loraplex.cli.root import cli
from typer.main import get_command

from adapters.training.evaluation.gate import Gate, When
from adapters.training.planning import split
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import AUTO, SETTINGS, Loss, Method, Setting

_ROOT: Any = get_command(cli)
OPTIONS = {option.name: option for option in _ROOT.commands["train"].params}


def _shown_default(name: str) -> object:
    return getattr(OPTIONS[name], "show_default", None)


def test_the_choices_are_those_of_the_service() -> None:
    assert get_args(train.Loss) == tuple(Loss)
    assert sorted(get_args(train.Method)) == sorted([AUTO, *Method])
    assert sorted(get_args(train.SplitBy)) == sorted(["none", *(by for by in SplitBy if by != "hash")])
    assert {publish.replace("-", "_") for publish in get_args(train.Publish)} <= set(When)


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() & OPTIONS.keys() - {"method", "loss", "rank", "alpha"}))
def test_a_setting_s_option_has_its_type_and_its_default(name: str) -> None:
    setting: Setting = SETTINGS[name]
    assert OPTIONS[name].type_descriptor.annotation is setting.kind
    assert _shown_default(name) == (AUTO if setting.takes_auto else str(setting.default))


def test_the_options_of_the_split_and_of_the_gate_have_their_defaults() -> None:
    gate = Gate()
    assert _shown_default("held_out") == str(Split().fraction)
    assert (_shown_default("metric"), _shown_default("margin")) == (gate.metric, f"{gate.margin:g}")


def test_the_numbers_that_the_command_line_repeats_are_those_of_the_service() -> None:
    assert train._FEW_ROWS == split.FEW_ROWS
    assert SETTINGS["learning_rate"].default == train._FLEET_RATE
