"""The front: every task, in JSON, within memory, and on the page that documents it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.training.evaluation.metrics import HIGHER_IS_BETTER, PRIMARY, Metrics, Task, measure, measure_trivial
from tests.unit.adapters.training.evaluation.held_out_rows import held_out, plain, scalars

PAGE = (Path(__file__).parents[5] / "docs" / "metrics.md").read_text()
SUMMARIES = {
    Task.CLASSIFICATION: torch.tensor([4, 3, 2, 1]),
    Task.MULTILABEL: torch.tensor([0.4, 0.3, 0.2, 0.6]),
    Task.REGRESSION: torch.tensor([0.5, 0.6, 0.4, 0.5]),
    Task.RETRIEVAL: torch.zeros(4),
}


def _both(task: Task, *, rows: int = 60) -> tuple[Metrics, Metrics]:
    made = held_out(task, rows=rows)
    reached = measure(task, made.outputs_NO, made.targets, weights_N=made.weights_N)
    return reached, measure_trivial(task, SUMMARIES[task], made.targets, weights_N=made.weights_N)


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("rows", [1, 60])
def test_everything_is_json_as_it_stands(task: Task, rows: int) -> None:
    for metrics in _both(task, rows=rows):
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@pytest.mark.parametrize("task", Task)
def test_an_adapter_and_the_trivial_baseline_are_told_in_the_same_names(task: Task) -> None:
    reached, trivial = _both(task)
    assert trivial.keys() - {"loss"} == reached.keys()


@pytest.mark.parametrize("task", Task)
def test_the_headline_is_there_and_better_than_the_trivial_one_s(task: Task) -> None:
    name, (reached, trivial) = PRIMARY[task], _both(task)
    assert (plain(reached, name) > plain(trivial, name)) is HIGHER_IS_BETTER[name]


@pytest.mark.parametrize("task", Task)
def test_a_perfect_layer_is_better_by_every_number(task: Task) -> None:
    made = held_out(task)
    match task:
        case Task.CLASSIFICATION:
            perfect = torch.nn.functional.one_hot(made.targets, 4) * 50.0
        case Task.MULTILABEL:
            perfect = made.targets * 100 - 50
        case _:
            perfect = made.targets
    best = scalars(measure(task, perfect.double(), made.targets))
    for name, value in scalars(measure(task, made.outputs_NO, made.targets)).items():
        reached = best[name]
        assert reached is not None
        assert value is not None
        assert reached != value
        assert (reached > value) is HIGHER_IS_BETTER[name]


@pytest.mark.parametrize("task", Task)
def test_a_weight_of_three_is_the_row_three_times(task: Task) -> None:
    made = held_out(task)
    weighted = measure(
        task,
        made.outputs_NO,
        made.targets,
        weights_N=made.weights_N,
        corpus_MO=made.targets if task is Task.RETRIEVAL else None,
    )
    outputs, targets = made.repeated()
    repeated = measure(task, outputs, targets, corpus_MO=made.targets if task is Task.RETRIEVAL else None)
    assert scalars(weighted) == pytest.approx(scalars(repeated))


def test_a_task_has_the_first_outputs_of_a_wider_layer() -> None:
    made = held_out(Task.CLASSIFICATION)
    wider = torch.cat([made.outputs_NO, torch.full((60, 2), 1e3)], dim=1)
    assert measure(made.task, wider, made.targets, classes=4) == measure(made.task, made.outputs_NO, made.targets)
    made = held_out(Task.MULTILABEL)
    assert measure(made.task, wider, made.targets) == measure(made.task, wider[:, :4], made.targets)


def test_only_what_can_be_better_or_worse_is_a_scalar() -> None:
    reached, trivial = _both(Task.CLASSIFICATION)
    assert list(scalars(reached)) == ["accuracy", "macro_f1", "calibration_error"]
    assert list(scalars(trivial)) == ["loss", "accuracy", "macro_f1", "calibration_error"]


@pytest.mark.parametrize("task", Task)
def test_chunks_of_any_size_tell_the_same(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _both(task)
    monkeypatch.setattr("adapters.training.evaluation.metrics.CHUNK_ELEMENTS", 49)
    for one, other in zip(_both(task), whole, strict=True):
        assert scalars(one) == pytest.approx(scalars(other), rel=1e-12)
        assert one.keys() == other.keys()


class _Largest(TorchDispatchMode):
    """The most elements that any operation made a new tensor of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return made


@pytest.mark.parametrize("task", Task)
def test_nothing_as_large_as_the_outputs_or_all_pairs_is_ever_made(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.training.evaluation.metrics.CHUNK_ELEMENTS", 1000)
    rows = 900
    made = held_out(task, rows=rows)
    largest = _Largest()
    with largest:
        measure(task, made.outputs_NO, made.targets, weights_N=made.weights_N)
        measure_trivial(task, SUMMARIES[task], made.targets, weights_N=made.weights_N)
    assert rows <= largest.elements <= 1000 < made.outputs_NO.numel()


@pytest.mark.parametrize("name", HIGHER_IS_BETTER)
def test_a_metric_that_may_gate_is_on_the_page_with_the_way_that_is_up(name: str) -> None:
    arrow = "↑" if HIGHER_IS_BETTER[name] else "↓"
    assert any(line.startswith(f"| `{name}` {arrow} |") for line in PAGE.splitlines())


@pytest.mark.parametrize("task", Task)
def test_every_name_and_headline_is_on_the_page(task: Task) -> None:
    section = PAGE.partition(f"## {task.value.capitalize()}")[2].partition("\n## ")[0]
    for name in _both(task)[1].keys() - {"rows", "effective_rows"}:
        assert f"`{name}`" in section
    assert f"Headline: `{PRIMARY[task]}`" in section
