"""Options of `loraplex train`, against the service's table of settings, which the client cannot import."""

from typing import Any, get_args

import pytest
from loraplex import defaults
from loraplex.cli.root import cli
from typer.main import get_command

from adapters.training.evaluation.gate import When
from adapters.training.planning.split import SplitBy
from adapters.training.settings import AUTO, SETTINGS, Loss, Method

_ROOT: Any = get_command(cli)
OPTIONS = {option.name: option for option in _ROOT.commands["train"].params}


def test_the_choices_are_those_of_the_service() -> None:
    assert get_args(defaults.Loss) == (AUTO, *Loss)
    assert sorted(get_args(defaults.Method)) == sorted([AUTO, *Method])
    assert sorted(get_args(defaults.SplitBy)) == sorted([AUTO, "none", *set(SplitBy) - {SplitBy.HASH}])
    assert sorted(publish.replace("-", "_") for publish in get_args(defaults.Publish)) == sorted(When)


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() & OPTIONS.keys() - {"method", "loss", "rank", "prior"}))
def test_a_setting_s_option_has_its_type(name: str) -> None:
    assert OPTIONS[name].type_descriptor.annotation is SETTINGS[name].kind


def test_a_retry_has_the_options_of_a_training_that_are_settings() -> None:
    retry = {option.name for option in _ROOT.commands["retry"].params}
    under_training = {name for name, setting in SETTINGS.items() if not setting.is_top_level}
    assert retry & SETTINGS.keys() == OPTIONS.keys() & under_training
