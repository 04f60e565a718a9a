"""What the command line says of a job: its evaluation, what auto compared, and the decision."""

from typing import Any

import pytest
from loraplex import decode
from loraplex.cli.job_summary import adapter_table, comparison, evaluation, outcome_lines
from loraplex.cli.output import console, plain
from loraplex.results import JobFields

from tests.support.job_reports import AUTO, DECISION, EVALUATION

JOB: dict[str, Any] = {
    "id": "j1",
    "kind": "train",
    "status": "succeeded",
    "adapter": "acme",
    "created_at": "",
    "started_at": None,
    "finished_at": None,
    "attempt": 1,
    "progress": None,
    "metrics": {},
    "result": {"name": "acme", "version": 2, "digest": "sha256:1"},
    "error": None,
    "spec": {"publish": "if_not_worse"},
    "evaluation": EVALUATION,
    "decision": DECISION,
    "auto": AUTO,
    "summary": None,
    "warnings": ["the adapter loses to the trivial guess"],
}
ADAPTER: dict[str, Any] = {
    "name": "acme-eu",
    "group": "eu",
    "rows": 40,
    "version": 2,
    "digest": "sha256:1",
    "metrics": {},
    "error": None,
    "moved_live": False,
    "replaced": 1,
    "outcome": "worse",
    "gain": -0.1,
    "evaluation": EVALUATION | {"adapter": 0.325, "gain": -0.1},
    "decision": DECISION | {"moved": False, "reason": "it is worse", "outcome": "worse", "gain": -0.1},
    "auto": None,
    "warnings": [],
}


def _job(**members: Any) -> JobFields:
    return decode.build(JobFields, JOB | members)


def _shown(parts: list[Any]) -> str:
    printer = console(stderr=False)
    with printer.capture() as capture:
        for part in parts:
            printer.print(part, crop=False)
    return capture.get()


def _words(parts: list[Any]) -> str:
    return " ".join(_shown(parts).split())


@pytest.mark.parametrize(
    ("read", "value"),
    [(lambda value: decode.build(JobFields, value), JOB), (decode.job_adapter, ADAPTER)],
    ids=["job", "adapter"],
)
def test_what_the_service_reports_is_read_whole(read: Any, value: dict[str, Any]) -> None:
    again = plain(read(value))
    assert {name: again[name] for name in value} == value


def test_an_evaluation_has_every_figure_with_its_interval_and_the_gain_with_its_error() -> None:
    text = _words(evaluation(_job().evaluation))
    assert "Accuracy on 40 cross-validated rows" in text
    assert "adapter 0.85 0.7093 – 0.9294" in text
    assert "base layer 0.425 0.2851 – 0.578" in text
    assert "trivial guess 0.1 –" in text
    assert "live before" not in text
    assert "gain over the base layer: +0.425 per row, standard error 0.0812" in text


def test_an_adapter_that_was_live_is_what_the_gain_is_over() -> None:
    text = _words(evaluation(_job(evaluation=EVALUATION | {"live": 0.9, "gain": -0.05}).evaluation))
    assert "live before 0.9 –" in text
    assert "gain over the live version before: -0.05" in text


def test_what_auto_compared_has_each_candidate_and_what_was_taken() -> None:
    lines = [" ".join(line.split()) for line in _shown(comparison(_job().auto)).splitlines()]
    assert "What auto compared: loss on 40 left-out rows" in lines
    assert "base 1.9" in lines
    assert "ridge * 0.5222 ridge 3, rank 4, bias yes" in lines
    assert "own head – skipped: rank 64 is above 8" in lines
    assert "* taken: ridge, the lowest of all" in lines


def test_the_decision_says_why_and_how_to_undo_it() -> None:
    assert "acme@2 is live: it is better" in _words(outcome_lines(_job()))
    held_back = _job(decision=DECISION | {"moved": False, "reason": "its gain is -0.1 a row."})
    assert _words(outcome_lines(held_back)) == (
        "acme@2 was made, and live did not move: its gain is -0.1 a row. To make it live: loraplex rollback acme 2"
    )


def test_adapters_are_listed_with_outcome_gain_and_figures() -> None:
    failed = ADAPTER | {
        "name": "acme-us",
        "group": "us",
        "version": None,
        "outcome": "failed",
        "gain": None,
        "evaluation": None,
        "decision": None,
        "error": {"code": "diverged", "detail": "the loss is infinite"},
    }
    text = _words([adapter_table([decode.job_adapter(value) for value in (ADAPTER, failed)])])
    assert "acme-eu 40 worse -0.1 0.325 0.425 no it is worse" in text
    assert "acme-us 40 failed – – – – the loss is infinite" in text


def test_nothing_is_shown_of_a_job_of_an_earlier_service() -> None:
    old = decode.build(JobFields, {name: JOB[name] for name in list(JOB)[:13] if name != "kind"})
    assert (old.kind, old.evaluation, old.warnings) == ("train", None, ())
    assert evaluation(old.evaluation) == comparison(old.auto) == []
    assert "acme@2 is live" in _words(outcome_lines(old))
