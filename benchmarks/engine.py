"""Time of one mixed batch in this process, on one thread, over the time of the base GEMM alone."""

# N rows · I in_features · O out_features
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.lora.base_layer import BaseLayer
from benchmarks.engine_contenders import Contender, contenders
from benchmarks.failures import BenchFailed
from benchmarks.plan import RANK, Plan
from benchmarks.progress import say
from benchmarks.requests import Shape, expected_answer
from benchmarks.stores import load_base
from benchmarks.tenants import MIXED_RANKS, Factors, factors

_BLOCK_SECONDS = 0.002
_SLOW_SECONDS = 0.2
_SLOW_REPETITIONS = 3
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Case:
    """One batch: so many rows, spread evenly over so many adapters."""

    key: str
    rows: int
    adapters: int
    ranks: Sequence[int] = (RANK,)

    @property
    def title(self) -> str:
        """For the head of a column."""
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {min(self.ranks)} to {max(self.ranks)}"
        return f"{self.adapters} × {self.rows // self.adapters} rows, {ranks}"


CASES = (
    Case("1", 32, 1),
    Case("4", 32, 4),
    Case("32", 32, 32),
    Case("32-mixed", 32, 32, MIXED_RANKS),
    Case("8-rows", 8, 8),
    Case("128", 128, 128),
)


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Return a record for each layer, case and contender: seconds per call, one number per repetition."""
    torch.set_num_threads(1)
    records = []
    for shape in plan.engine_shapes:
        base = load_base(shape)
        for case in CASES:
            for name, seconds in _measure_case(base, shape, case, plan.engine_repetitions).items():
                records.append({"layer": str(shape), "case": case.key, "contender": name, "seconds": seconds})
            say(f"engine {shape}, {case.title}")
    return records


def _measure_case(base: BaseLayer, shape: Shape, case: Case, repetitions: int) -> dict[str, list[float | None]]:
    tenants = [
        factors(number, shape.in_features, shape.out_features, case.ranks[number % len(case.ranks)])
        for number in range(case.adapters)
    ]
    x_NI = torch.randn(case.rows, shape.in_features, generator=torch.Generator().manual_seed(1))
    # Neighbouring rows belong to different tenants, as requests come in.
    choice_N = [row % case.adapters for row in range(case.rows)]
    taking_part = contenders(base, tenants, x_NI, choice_N)
    with torch.inference_mode():
        _check(taking_part, base, tenants, x_NI, choice_N)
        calls = {name: _calls_in_a_block(contender) for name, contender in taking_part.items()}
        times: dict[str, list[float | None]] = {name: [] for name in taking_part}
        for repetition in range(repetitions):
            for name, contender in taking_part.items():
                slow = calls[name] == 0
                skipped = slow and repetition >= _SLOW_REPETITIONS
                times[name].append(None if skipped else _time(contender, max(1, calls[name])))
    return times


def _time(contender: Contender, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        contender()
    return (time.perf_counter() - begin) / calls


def _calls_in_a_block(contender: Contender) -> int:
    """As many as take about `_BLOCK_SECONDS`; 0 where one call takes so long that a few repetitions must do."""
    once = min(_time(contender, 1) for _ in range(2))
    if once > _SLOW_SECONDS:
        return 0
    once = min(once, *(_time(contender, 1) for _ in range(3)))
    return max(1, round(_BLOCK_SECONDS / once))


def _check(
    taking_part: dict[str, Contender],
    base: BaseLayer,
    tenants: Sequence[Factors],
    x_NI: torch.Tensor,
    choice_N: Sequence[int],
) -> None:
    weight_OI = base.weight_OI.numpy()
    for row in (0, len(choice_N) - 1):
        expected_O = torch.from_numpy(expected_answer(weight_OI, x_NI[row].numpy(), tenants[choice_N[row]]))
        for name, contender in taking_part.items():
            if name != "base" and (contender()[row] - expected_O).abs().max() > _TOLERANCE * expected_O.abs().max():
                raise BenchFailed(f"{name} answers with wrong numbers")
