"""The mixed forward against `W + s·A·B` formed in float64."""

# N rows · I in_features · O out_features · R rank
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.lora.forward import add_gathered_terms, low_rank_term, mixed_forward
from tests.support.dense_oracle import Float64, answer, layer, random_adapter, relative_error

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Kind:
    """An adapter's settings; alpha is per rank, so that no row drowns the others."""

    rank: int
    alpha: float
    rslora: bool
    bias: bool

    def make(self, outputs: int, inputs: int, seed: int) -> Adapter:
        scale = self.rank**0.5 if self.rslora else self.rank
        return random_adapter(
            outputs, inputs, self.rank, alpha=self.alpha * scale, rslora=self.rslora, bias=self.bias, seed=seed
        )


KINDS = st.builds(
    Kind,
    rank=st.sampled_from([1, 2, 3, 8, 17, 64, 256]),
    alpha=st.sampled_from([-2.0, 0.0, 0.125, 0.3, 1.0, 7.5]),
    rslora=st.booleans(),
    bias=st.booleans(),
)


def _base(outputs: int, inputs: int, *, bias: bool, seed: int) -> BaseLayer:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    return layer(weight_OI, torch.randn(outputs, generator=generator) if bias else None)


def _dense(base: BaseLayer, x_NI: torch.Tensor, chosen_N: list[Adapter | None]) -> Float64:
    return np.vstack([answer(base, x_NI[row : row + 1], adapter) for row, adapter in enumerate(chosen_N)])


def _worst_row(given_NO: Float64, wanted_NO: Float64) -> float:
    """Each row on its own scale: a large neighbour must not excuse it."""
    return max(relative_error(one_O, other_O) for one_O, other_O in zip(given_NO, wanted_NO, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    kinds=st.lists(st.none() | KINDS, min_size=1, max_size=8),
    shape=st.tuples(st.sampled_from([2, 10, 33]), st.sampled_from([1, 10, 64])),
    bias=st.booleans(),
    data=st.data(),
)
def test_any_mixture_in_one_batch_answers_as_each_row_alone_would(
    kinds: list[Kind | None], shape: tuple[int, int], bias: bool, data: st.DataObject
) -> None:
    outputs, inputs = shape
    base = _base(outputs, inputs, bias=bias, seed=99)
    choices = [None if kind is None else kind.make(outputs, inputs, seed) for seed, kind in enumerate(kinds)]
    choice_N = data.draw(st.lists(st.integers(0, len(choices) - 1), min_size=1, max_size=32))
    x_NI = torch.randn(len(choice_N), inputs, generator=torch.Generator().manual_seed(1))
    given_NO = mixed_forward(base, x_NI, choices, choice_N).double().numpy()
    wanted_NO = _dense(base, x_NI, [choices[choice] for choice in choice_N])
    # A sum that cancels is measured by its parts.
    parts_N = np.abs(wanted_NO).max(axis=1) + np.abs(_dense(base, x_NI, [None] * len(choice_N))).max(axis=1)
    assert (np.abs(given_NO - wanted_NO).max(axis=1) / parts_N).max() < TOLERANCE


@dataclass(frozen=True)
class Ground:
    """A base layer, and its numbers by its definition rather than from it."""

    base: BaseLayer
    weight_OI: Float64
    bias_O: Float64

    @classmethod
    def random(cls, inputs: int, outputs: int, *, bias: bool) -> "Ground":
        """Standard normal, as numbers and not as a source."""
        made = _base(outputs, inputs, bias=bias, seed=inputs + outputs)
        bias_O = np.zeros(outputs) if made.bias_O is None else made.bias_O.double().numpy()
        return cls(made, made.weight_OI.double().numpy(), bias_O)

    @classmethod
    def seeded(cls, inputs: int, outputs: int) -> "Ground":
        """`random:IN,OUT,SEED`."""
        weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(7))
        return cls(load_base_layer(f"random:{inputs},{outputs},7"), weight_OI.double().numpy(), np.zeros(outputs))

    @classmethod
    def identity(cls, width: int) -> "Ground":
        """`identity:DIM`."""
        return cls(load_base_layer(f"identity:{width}"), np.eye(width), np.zeros(width))

    @classmethod
    def zeros(cls, inputs: int, outputs: int) -> "Ground":
        """`zeros:IN,OUT`."""
        return cls(load_base_layer(f"zeros:{inputs},{outputs}"), np.zeros((outputs, inputs)), np.zeros(outputs))

    def answer(self, x_NI: Float64, adapter: Adapter | None) -> tuple[Float64, Float64]:
        """(N, O) twice: the answer, and the scale of what was added up for each of its numbers.

        The scale of a sum is the root of the sum of its terms' squares: what is left where they do not cancel.
        """
        y_NO = x_NI @ self.weight_OI.T + self.bias_O
        scale_NO = np.sqrt(x_NI**2 @ (self.weight_OI**2).T) + np.abs(self.bias_O)
        if adapter is not None:
            s = adapter.alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)
            a_OR, b_RI = adapter.a_OR.double().numpy(), adapter.b_RI.double().numpy()
            bias_O = 0.0 if adapter.bias_O is None else adapter.bias_O.double().numpy()
            y_NO = y_NO + x_NI @ (s * a_OR @ b_RI).T + s * bias_O
            scale_NO = scale_NO + abs(s) * (np.sqrt(x_NI**2 @ (b_RI**2).T @ (a_OR**2).T) + np.abs(bias_O))
        return y_NO, scale_NO


GROUNDS: dict[str, Callable[[], Ground]] = {
    "64 to 10": lambda: Ground.random(64, 10, bias=True),
    "64 to 10 without bias": lambda: Ground.random(64, 10, bias=False),
    "384 to 384": lambda: Ground.seeded(384, 384),
    "identity of 384": lambda: Ground.identity(384),
    "identity of 1": lambda: Ground.identity(1),
    "64 zeros to 10": lambda: Ground.zeros(64, 10),
    "10 to 2": lambda: Ground.seeded(10, 2),
    "1 to 1": lambda: Ground.random(1, 1, bias=True),
    "1 to 33": lambda: Ground.random(1, 33, bias=False),
}


ANY_KIND = st.builds(
    Kind, rank=st.integers(1, 256), alpha=st.floats(-100, 100, width=32), rslora=st.booleans(), bias=st.booleans()
)


@pytest.mark.parametrize("name", GROUNDS)
def test_any_number_of_rows_in_any_order_agrees_with_float64_on_every_kind_of_base(name: str) -> None:
    ground = GROUNDS[name]()

    # Batches of the wide layers take a hundred times as long.
    @settings(max_examples=10 if "384" in name else 25, deadline=None, derandomize=True, database=None)
    @given(
        kinds=st.lists(st.none() | ANY_KIND, min_size=1, max_size=12),
        rows=st.integers(1, 300),
        order=st.integers(0, 2**32 - 1),
    )
    def check(kinds: list[Kind | None], rows: int, order: int) -> None:
        _check_against_float64(ground, kinds, rows, order)

    check()


def _check_against_float64(ground: Ground, kinds: list[Kind | None], rows: int, order: int) -> None:
    base, draw = ground.base, np.random.default_rng(order)
    choices = [
        None if kind is None else kind.make(base.out_features, base.in_features, seed)
        for seed, kind in enumerate(kinds)
    ]
    choice_N = draw.integers(len(choices), size=rows)
    # Rows of one request lie side by side, but those of one adapter need not.
    choice_N = choice_N if order % 2 else np.sort(choice_N)
    x_NI = draw.standard_normal((rows, base.in_features)).astype(np.float32)
    given_NO = mixed_forward(base, torch.from_numpy(x_NI), choices, choice_N.tolist()).numpy()
    assert given_NO.shape == (rows, base.out_features)
    for position, adapter in enumerate(choices):
        chosen = choice_N == position
        wanted_KO, scale_KO = ground.answer(x_NI[chosen].astype(np.float64), adapter)
        assert (np.abs(given_NO[chosen] - wanted_KO) <= TOLERANCE * scale_KO).all()


@pytest.mark.parametrize("width", [10, 384])
def test_every_row_with_an_adapter_of_its_own(width: int) -> None:
    base = _base(width, width, bias=True, seed=1)
    choices = [random_adapter(width, width, rank, bias=rank % 2 == 0, seed=rank) for rank in (1, 2, 4, 16, 100, 256)]
    choice_N = [5, 0, 3, 2, 1, 4]
    x_NI = torch.randn(6, width, generator=torch.Generator().manual_seed(2))
    given_NO = mixed_forward(base, x_NI, choices, choice_N).double().numpy()
    assert _worst_row(given_NO, _dense(base, x_NI, [choices[choice] for choice in choice_N])) < TOLERANCE


@pytest.mark.parametrize("base_bias", [False, True])
def test_the_terms_that_cuda_adds_agree_with_float64(base_bias: bool) -> None:
    ground = Ground.random(64, 10, bias=base_bias)
    kinds = [(1, 3.0, True), (4, -2.0, True), (4, 0.5, False), (4, 8.0, True), (17, 1.0, False)]
    choices: list[Adapter | None] = [
        random_adapter(10, 64, rank, alpha=alpha * rank, bias=bias, seed=seed)
        for seed, (rank, alpha, bias) in enumerate(kinds)
    ]
    choices.append(None)
    choice_N = np.random.default_rng(0).permutation(np.repeat(np.arange(len(choices)), 3))
    x_NI = torch.randn(len(choice_N), 64, generator=torch.Generator().manual_seed(9))
    y_NO = ground.base.forward(x_NI)
    add_gathered_terms(y_NO, x_NI, choices, choice_N.tolist())
    for position, adapter in enumerate(choices):
        chosen = choice_N == position
        wanted_KO, scale_KO = ground.answer(x_NI.double().numpy()[chosen], adapter)
        assert (np.abs(y_NO.numpy()[chosen] - wanted_KO) <= TOLERANCE * scale_KO).all()


def test_rows_without_an_adapter_are_the_base_s_to_the_last_bit() -> None:
    base = _base(10, 64, bias=True, seed=3)
    x_NI = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    alone_NO = mixed_forward(base, x_NI, [None], [0] * 9)
    among_NO = mixed_forward(base, x_NI, [random_adapter(10, 64, 4), None], [0, 1, 1] * 3)
    kept = [row for row in range(9) if row % 3]
    assert among_NO[kept].equal(alone_NO[kept])
    assert _worst_row(alone_NO.double().numpy(), _dense(base, x_NI, [None] * 9)) < TOLERANCE


def test_a_choice_that_no_row_makes_changes_nothing() -> None:
    base = _base(5, 7, bias=False, seed=5)
    x_NI = torch.randn(3, 7, generator=torch.Generator().manual_seed(6))
    used = random_adapter(5, 7, 2)
    given_NO = mixed_forward(base, x_NI, [random_adapter(5, 7, 3, seed=1), used], [1, 1, 1])
    torch.testing.assert_close(given_NO, mixed_forward(base, x_NI, [used], [0, 0, 0]), rtol=1e-6, atol=1e-6)


def test_the_base_the_inputs_and_the_adapter_are_only_read() -> None:
    base = _base(5, 7, bias=True, seed=7)
    adapter = random_adapter(5, 7, 2, bias=True, alpha=3.0)
    x_NI = torch.randn(4, 7)
    assert base.bias_O is not None
    assert adapter.bias_O is not None
    watched = [base.weight_OI, base.bias_O, x_NI, adapter.a_OR, adapter.b_RI, adapter.bias_O]
    before = [tensor.clone() for tensor in watched]
    mixed_forward(base, x_NI, [adapter, None], [0, 1, 0, 1])
    mixed_forward(base, x_NI, [adapter], [0] * 4)
    assert all(map(torch.equal, before, watched))


def test_the_low_rank_term_is_the_delta_s_part_of_the_answer() -> None:
    adapter = random_adapter(5, 7, 3, alpha=-4.0, rslora=True, bias=True)
    x_NI = torch.randn(6, 7, generator=torch.Generator().manual_seed(8))
    nothing = layer(torch.zeros(5, 7))
    term_NO = low_rank_term(x_NI, adapter).double().numpy()
    assert relative_error(term_NO, answer(nothing, x_NI, adapter)) < TOLERANCE
