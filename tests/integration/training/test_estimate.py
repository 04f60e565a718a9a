"""What a training is estimated to need is enough, and not out of all proportion."""

# N rows · I in_features · O out_features
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.training.data_file import TrainingData, write_data_file
from adapters.training.planning.estimate import Estimate, estimate, estimate_evaluation
from adapters.training.planning.split import Split
from adapters.training.settings import Loss, Method, TrainingSpec
from tests.support.data_file_columns import columns_of

SPEC = TrainingSpec(rank=4, alpha=4.0, max_steps=20)
EXACT = replace(SPEC, method=Method.CLOSED_FORM)
STOPPED = replace(SPEC, split=Split(), patience=3, evaluate_every=5)
FIXED = estimate(SPEC, in_features=1, out_features=1, training_rows=1).memory_bytes


@dataclass(frozen=True)
class Case:
    """A training of random rows; of a fleet where it has groups."""

    spec: TrainingSpec
    rows: int
    in_features: int
    out_features: int
    groups: int | None = None
    is_evaluation: bool = False

    def estimate(self) -> Estimate:
        """As a request has it, from the shape alone."""
        if self.is_evaluation:
            shape = {"in_features": self.in_features, "out_features": self.out_features}
            return estimate_evaluation(self.spec, **shape, rows=self.rows, adapters=2)
        split = self.spec.split
        held_rows = 0 if split is None else split.held_out_rows(self.rows)
        return estimate(
            self.spec,
            in_features=self.in_features,
            out_features=self.out_features,
            training_rows=self.rows - held_rows,
            held_rows=held_rows,
            group_sizes=None if self.groups is None else [-(-self.rows // self.groups)] * self.groups,
        )

    def write(self, path: Path) -> None:
        """The data file."""
        draw = torch.Generator().manual_seed(0)
        targets: Tensor = torch.randn(self.rows, self.out_features, generator=draw)
        if self.spec.loss is Loss.CROSS_ENTROPY:
            targets = targets.argmax(dim=1)
        groups_N = None if self.groups is None else torch.arange(self.rows) % self.groups
        data = TrainingData(torch.randn(self.rows, self.in_features, generator=draw), targets, groups_N=groups_N)
        with path.open("wb") as file:
            write_data_file(columns_of(data), file)


CASES = {
    "few rows of a small layer": Case(SPEC, 40, 10, 2),
    "classes, stopped early": Case(replace(STOPPED, loss=Loss.CROSS_ENTROPY), 20_000, 384, 10),
    "all rows a step": Case(replace(STOPPED, batch_size=None, loss=Loss.HUBER, rank=32), 1_500, 512, 512),
    "many inputs": Case(replace(STOPPED, loss=Loss.COSINE), 3_000, 4096, 8),
    "many outputs": Case(STOPPED, 2_500, 64, 2_000),
    "negatives": Case(replace(STOPPED, loss=Loss.MULTIPLE_NEGATIVES, batch_size=256), 4_000, 256, 256),
    "exact": Case(replace(EXACT, bias=True), 5_000, 384, 192),
    "exact, of very many rows": Case(replace(EXACT, split=Split()), 150_000, 50, 10),
    "exact, searched": Case(replace(EXACT, split=Split(), try_ridges=True, try_ranks=(1, 8)), 3_000, 384, 100),
    "evaluation": Case(replace(SPEC, loss=Loss.CROSS_ENTROPY), 60_000, 64, 100, is_evaluation=True),
    "evaluation of numbers": Case(SPEC, 60_000, 64, 100, is_evaluation=True),
    "fleet": Case(replace(STOPPED, loss=Loss.CROSS_ENTROPY), 10_000, 128, 10, groups=100),
    "fleet, negatives": Case(
        replace(SPEC, loss=Loss.MULTIPLE_NEGATIVES, batch_size=256, max_steps=6), 12_000, 16, 16, groups=40
    ),
    "fleet, exact": Case(EXACT, 10_000, 96, 8, groups=200),
}


class Measuring:
    """The process that measures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.training.memory_probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, case: Case, memory_bytes: int) -> dict[str, Any]:
        """What it took where it may use so much."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        path = self._folder / "rows"
        case.write(path)
        asked = {
            "path": str(path),
            "in_features": case.in_features,
            "out_features": case.out_features,
            "spec": asdict(case.spec),
            "is_evaluation": case.is_evaluation,
            "memory_bytes": memory_bytes,
        }
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(scope="module")
def measuring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measuring]:
    started = Measuring(tmp_path_factory.mktemp("rows"))
    yield started
    started.process.communicate()
    assert started.process.returncode == 0


@pytest.mark.parametrize("name", CASES)
def test_a_training_gets_by_with_what_it_is_estimated_to_need_which_is_not_far_above(
    name: str, measuring: Measuring
) -> None:
    case = CASES[name]
    guessed = case.estimate().memory_bytes
    # The limit is the kernel's, and the one that a process that fits has.
    found = measuring.measure(case, guessed)
    assert "error" not in found, found
    assert guessed - FIXED <= 4 * (found["most"] - found["before"]) + FIXED


def test_with_less_than_it_needs_it_fails(measuring: Measuring) -> None:
    case = CASES["many outputs"]
    assert "memory" in measuring.measure(case, 2**28)["error"]


@pytest.mark.parametrize("name", CASES)
def test_more_of_anything_is_never_estimated_at_less(name: str) -> None:
    case = CASES[name]
    least = case.estimate()
    for more in (
        replace(case, rows=case.rows * 3),
        replace(case, in_features=case.in_features * 3),
        replace(case, out_features=case.out_features * 3),
        replace(case, spec=replace(case.spec, rank=case.spec.rank * 3)),
    ):
        found = more.estimate()
        assert found.memory_bytes >= least.memory_bytes
        assert found.seconds >= least.seconds > 0


def test_time_goes_with_steps_and_with_what_is_tried() -> None:
    case = CASES["classes, stopped early"]
    seconds = [
        replace(case, spec=replace(case.spec, max_steps=steps, epochs=10**6)).estimate().seconds
        for steps in (1000, 100_000)
    ]
    assert seconds[1] > 30 * seconds[0]
    tried = replace(case.spec, max_steps=1000, epochs=10**6, try_rates=(0.1, 0.01), try_ranks=(1, 2))
    assert replace(case, spec=tried).estimate().seconds > 1.5 * seconds[0]
