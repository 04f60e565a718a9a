"""What the closed form is asked to minimise, spelled out in numpy: weighted rows, a bias, a ridge and a prior."""

# N rows · I in_features · O out_features · R rank
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors, solve
from adapters.training.closed_form.statistics import Chunk, Statistics, accumulate
from tests.support.dense_oracle import Float64, layer


def numbers(*shape: int, seed: int) -> Float64:
    """Standard normal, and exact in float32."""
    drawn: Float64 = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(np.float64)
    return drawn


def relative(given: Float64, wanted: NDArray[np.floating[Any]]) -> float:
    """‖given − wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(given - wanted) / np.linalg.norm(wanted))


@dataclass(frozen=True, eq=False)
class Problem:
    """`r = y − x·Wᵀ − b` is what is left to fit."""

    base: BaseLayer
    x_NI: Float64
    y_NO: Float64
    weights_N: Float64 | None
    """As they were given; `w_N` is 1 where none were."""
    r_NO: Float64
    w_N: Float64 = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "w_N", np.ones(len(self.x_NI)) if self.weights_N is None else self.weights_N)

    @classmethod
    def of(cls, x_NI: Float64, y_NO: Float64, weights_N: Float64 | None = None, *, seed: int = 0) -> "Problem":
        """With a random base layer; all numbers are rounded to float32 first."""
        outputs, inputs = y_NO.shape[1], x_NI.shape[1]
        weight_OI, bias_O = numbers(outputs, inputs, seed=seed + 50), numbers(outputs, seed=seed + 51)
        base = layer(torch.from_numpy(weight_OI).float(), torch.from_numpy(bias_O).float())
        x_NI, y_NO = (each.astype(np.float32).astype(np.float64) for each in (x_NI, y_NO))
        if weights_N is not None:
            weights_N = weights_N.astype(np.float32).astype(np.float64)
        return cls(base, x_NI, y_NO, weights_N, y_NO - x_NI @ weight_OI.T - bias_O)

    def chunk(self, rows: slice | Sequence[int] = slice(None)) -> Chunk:
        """Some rows as the code takes them."""
        weights = None if self.weights_N is None else torch.from_numpy(self.weights_N[rows]).float()
        return torch.from_numpy(self.x_NI[rows]).float(), torch.from_numpy(self.y_NO[rows]).float(), weights

    def statistics(self, rows: slice | Sequence[int] = slice(None)) -> Statistics:
        """Of some rows, in one chunk."""
        return accumulate(self.base, [self.chunk(rows)])

    def solved(
        self, *, rank: int, ridge: float, bias: bool, prior_OI: Float64 | None = None, scaling: float = 1.0
    ) -> tuple[Float64, Float64]:
        """ΔW and β as the code finds them."""
        prior = None if prior_OI is None else torch.from_numpy(prior_OI)
        factors = solve(self.statistics(), rank=rank, scaling=scaling, ridge=ridge, bias=bias, prior_OI=prior)
        return dense(factors, scaling)

    def loss(
        self, delta_OI: Float64, beta_O: Float64 | float, *, ridge: float, prior_OI: Float64 | float = 0.0
    ) -> float:
        """What is minimised."""
        misfit_NO = self.x_NI @ delta_OI.T + beta_O - self.r_NO
        return float(self.w_N @ (misfit_NO**2).sum(1) + ridge * ((delta_OI - prior_OI) ** 2).sum())

    def found_by_search(
        self, *, rank: int, ridge: float, bias: bool, prior_OI: Float64 | float = 0.0, starts: int = 4
    ) -> tuple[Float64, Float64]:
        """ΔW and β of the lowest loss that L-BFGS finds over factors and bias from several starts."""
        outputs, inputs = self.r_NO.shape[1], self.x_NI.shape[1]
        cut, end = outputs * rank, rank * (outputs + inputs)

        def split(flat: Float64) -> tuple[Float64, Float64, Float64]:
            return flat[:cut].reshape(outputs, rank), flat[cut:end].reshape(rank, inputs), flat[end:]

        def loss_and_slope(flat: Float64) -> tuple[float, Float64]:
            a_OR, b_RI, beta_O = split(flat)
            shift_O = beta_O if bias else np.zeros(outputs)
            misfit_NO = (self.x_NI @ b_RI.T) @ a_OR.T + shift_O - self.r_NO
            slope_NO = 2 * self.w_N[:, None] * misfit_NO
            slope_OI = slope_NO.T @ self.x_NI + 2 * ridge * (a_OR @ b_RI - prior_OI)
            parts = [(slope_OI @ b_RI.T).ravel(), (a_OR.T @ slope_OI).ravel(), slope_NO.sum(0) * bias]
            return self.loss(a_OR @ b_RI, shift_O, ridge=ridge, prior_OI=prior_OI), np.concatenate(parts)

        found = []
        for start in range(starts):
            # One thread: on busy cores those of a BLAS wait for each other far longer than they work.
            with threadpool_limits(limits=1):
                reached = minimize(
                    loss_and_slope,
                    0.5 * numbers(end + outputs, seed=100 + start),
                    jac=True,
                    method="L-BFGS-B",
                    options={"maxiter": 3000, "maxfun": 5000, "ftol": 1e-16, "gtol": 1e-10},
                )
            a_OR, b_RI, beta_O = split(reached.x)
            found.append((float(reached.fun), a_OR @ b_RI, beta_O * bias))
        return min(found, key=lambda each: each[0])[1:]


def stacked(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of one or more groups as a stack."""
    return Statistics(*(torch.stack([getattr(part, each.name) for part in parts]) for each in fields(Statistics)))


def dense(factors: Factors, scaling: float = 1.0) -> tuple[Float64, Float64]:
    """ΔW and β of factors."""
    delta_OI: Float64 = scaling * factors.a_OR.double().numpy() @ factors.b_RI.double().numpy()
    beta_O = np.zeros(len(delta_OI)) if factors.bias_O is None else scaling * factors.bias_O.double().numpy()
    return delta_OI, beta_O
