"""Whether live moves: always, never, or where the held-out rows say that it should."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest

from adapters.catalog.versions import Source, Version
from adapters.training.evaluation.gate import Gate, When
from adapters.training.evaluation.metrics import HIGHER_IS_BETTER

IF_BETTER = Gate(when=When.IF_BETTER, metric="accuracy", margin=0.02, min_rows=50)
LIVE = Version(
    adapter="acme",
    version=7,
    digest="sha256:0",
    rank=1,
    alpha=1.0,
    rslora=False,
    base="sha256:1",
    feature_space=None,
    created_at="2026-01-01T00:00:00Z",
    source=Source.JOB,
    job=None,
    module=None,
    metrics=None,
    relative_norm=None,
    file="f",
    offset=0,
    bytes=1,
)


def _held_out(values: Mapping[str, float | None], *, metric: str = "accuracy", rows: int = 50) -> dict[str, Any]:
    return {"rows": rows, "trivial": {metric: 2.0}} | {who: {metric: value} for who, value in values.items()}


@pytest.mark.parametrize(("when", "moves"), [(When.ALWAYS, True), (When.NEVER, False)])
@pytest.mark.parametrize("held_out", [None, _held_out({"adapter": 0.1, "base": 0.9})])
def test_always_and_never_look_at_nothing(when: When, moves: bool, held_out: dict[str, Any] | None) -> None:
    gate = Gate(when=when)
    assert (gate.compares, gate.moves, gate.decide(held_out, None).moves) == (False, moves, moves)
    assert gate.decide(held_out, LIVE).values == {}


def test_without_a_judgement_nothing_is_worse() -> None:
    gate = Gate(when=When.IF_NOT_WORSE)
    assert (gate.compares, gate.moves, gate.decide(None, None).moves) == (True, True, True)


@pytest.mark.parametrize(
    ("adapter", "base", "live", "moves"),
    [
        (0.80, 0.50, None, True),
        (0.52, 0.50, None, True),
        (0.5199, 0.50, None, False),
        (0.50, 0.50, None, False),
        (0.80, 0.50, 0.70, True),
        (0.80, 0.50, 0.79, False),
        (0.80, 0.79, 0.50, False),
        (0.40, 0.50, 0.30, False),
    ],
)
def test_it_has_to_beat_the_base_and_the_live_version_by_the_margin(
    adapter: float, base: float, live: float | None, moves: bool
) -> None:
    values = {"adapter": adapter, "base": base} | ({} if live is None else {"live": live})
    verdict = IF_BETTER.decide(_held_out(values), None if live is None else LIVE)
    assert verdict.moves is moves
    assert verdict.values == values
    assert "accuracy" in verdict.reason
    if not moves:
        beaten_by_base = adapter - base < 0.0199999
        assert ("the base layer" in verdict.reason) is beaten_by_base
        assert ("the live version 7" in verdict.reason) is not beaten_by_base


@pytest.mark.parametrize("metric", HIGHER_IS_BETTER)
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_of_each_metric_it_is_known_which_way_is_better(metric: str, margin: float) -> None:
    gate = replace(IF_BETTER, metric=metric, margin=margin)
    high, low = (
        _held_out({"adapter": 0.75, "base": 0.5}, metric=metric),
        _held_out({"adapter": 0.5, "base": 0.75}, metric=metric),
    )
    assert [gate.decide(each, None).moves for each in (high, low)] == [
        HIGHER_IS_BETTER[metric],
        not HIGHER_IS_BETTER[metric],
    ]


def test_with_no_margin_it_still_has_to_be_better() -> None:
    gate = replace(IF_BETTER, margin=0.0)
    assert not gate.decide(_held_out({"adapter": 0.5, "base": 0.5}), None).moves
    assert gate.decide(_held_out({"adapter": 0.5 + 1e-12, "base": 0.5}), None).moves


@pytest.mark.parametrize(("rows", "moves"), [(49, False), (50, True), (51, True)])
def test_few_held_out_rows_are_not_believed(rows: int, moves: bool) -> None:
    verdict = IF_BETTER.decide(_held_out({"adapter": 0.9, "base": 0.1}, rows=rows), None)
    assert verdict.moves is moves
    assert moves or verdict.reason == "49 held-out rows are fewer than 50"


@pytest.mark.parametrize("undefined", ["adapter", "base", "live"])
def test_a_metric_that_is_undefined_beats_nothing_and_is_beaten_by_nothing(undefined: str) -> None:
    values: dict[str, float | None] = {"adapter": 0.9, "base": 0.1, "live": 0.1}
    assert IF_BETTER.decide(_held_out(values), LIVE).moves
    verdict = IF_BETTER.decide(_held_out(values | {undefined: None}), LIVE)
    assert not verdict.moves
    assert verdict.values[undefined] is None


def test_a_metric_that_the_task_has_not_moves_nothing() -> None:
    verdict = replace(IF_BETTER, metric="mrr").decide(_held_out({"adapter": 0.9, "base": 0.1}), None)
    assert (verdict.moves, verdict.values) == (False, {"adapter": None, "base": None})


def test_what_a_job_shows_says_what_was_compared_and_whether_live_moved() -> None:
    verdict = IF_BETTER.decide(_held_out({"adapter": 0.9, "base": 0.1}), None)
    told = verdict.to_json(moved=True)
    assert told == {
        "metric": "accuracy",
        "margin": 0.02,
        "min_rows": 50,
        "compared": {"adapter": 0.9, "base": 0.1},
        "moves_live": True,
        "reason": verdict.reason,
    }
    overtaken = verdict.to_json(moved=False)
    assert overtaken["moves_live"] is False
    assert overtaken["reason"] != verdict.reason
    lost = IF_BETTER.decide(_held_out({"adapter": 0.1, "base": 0.9}), None)
    assert lost.to_json(moved=False)["reason"] == lost.reason


@pytest.mark.parametrize("gate", [Gate(), IF_BETTER, Gate(when=When.NEVER)])
def test_a_gate_survives_json(gate: Gate) -> None:
    again = Gate.from_json(json.loads(json.dumps(asdict(gate))))
    assert again == gate
    assert isinstance(again.when, When)


def test_rows_of_little_weight_are_not_believed_as_whole_ones() -> None:
    held_out = _held_out({"adapter": 0.9, "base": 0.1}, rows=100)
    held_out["adapter"]["effective_rows"] = 1.0
    verdict = IF_BETTER.decide(held_out, None)
    assert (verdict.moves, verdict.reason) == (False, "1 held-out rows are fewer than 50")
