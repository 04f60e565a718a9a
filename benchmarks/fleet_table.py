"""One table with the rows of many tenants, as an Arrow stream."""

# N rows · K rows of one tenant · I in_features · O out_features
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.jobs import arrow_stream
from benchmarks.requests import Shape
from benchmarks.stores import load_base
from benchmarks.tenants import factors, name_of

_NOISE = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """float32 rows in no order, and whose each is."""

    inputs_NI: NDArray[np.float32]
    targets_NO: NDArray[np.float32]
    tenants_N: NDArray[np.int64]

    def rows_of(self, tenant: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the inputs (K, I) and targets (K, O) of one group."""
        mine_K = np.flatnonzero(self.tenants_N == tenant)
        return self.inputs_NI[mine_K], self.targets_NO[mine_K]

    def arrow(self) -> memoryview:
        """Return the Arrow stream with the columns `x`, `y` and `tenant`."""
        tenants = [name_of(tenant) for tenant in self.tenants_N]
        return arrow_stream(x=self.inputs_NI, y=self.targets_NO, tenant=tenants)


def make_table(shape: Shape, *, tenants: int, rows: int, rank: int) -> Table:
    """Each tenant has a layer of its own, which is the base layer and an adapter; `rows` of each."""
    generator = np.random.default_rng(17)
    tenants_N = generator.permutation(np.repeat(np.arange(tenants), rows))
    inputs_NI = generator.standard_normal((len(tenants_N), shape.in_features), dtype=np.float32)
    targets_NO = inputs_NI @ load_base(shape).weight_OI.numpy().T
    targets_NO += _NOISE * generator.standard_normal(targets_NO.shape, dtype=np.float32)
    for tenant, mine_K in enumerate(np.split(np.argsort(tenants_N, kind="stable"), tenants)):
        own: Any = factors(tenant, shape.in_features, shape.out_features, rank)
        targets_NO[mine_K] += inputs_NI[mine_K] @ own.b_RI.T @ own.a_OR.T
    return Table(inputs_NI, targets_NO, tenants_N)
