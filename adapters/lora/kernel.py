"""CPU kernel, compiled by numba: the low-rank terms of many adapters in one pass over the rows."""

# N rows · I in_features · O out_features · R rank · C choices
from typing import Any

import numpy as np
from numba import carray, float32, float64, int64, njit, types, void
from numba.extending import intrinsic
from numpy.typing import NDArray

from adapters.arrays import Float32

Indices = NDArray[np.int64]

_POINTER = types.CPointer(float32)


@intrinsic  # type: ignore[untyped-decorator]
def _float_pointer(_typing: Any, address: Any) -> Any:
    """Convert an address to a pointer to float32."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return _POINTER(address), lower


def _add_terms(y_NO: Any, x_NI: Any, table_C5: Any, scaling_C5: Any, choice_N: Any, order_N: Any) -> None:
    I, O = x_NI.shape[1], y_NO.shape[1]
    for row in order_N:
        choice = choice_N[row]
        R, s = table_C5[choice, 3], float32(scaling_C5[choice, 4])
        a_RO = carray(_float_pointer(table_C5[choice, 0]), (R, O))
        b_RI = carray(_float_pointer(table_C5[choice, 1]), (R, I))
        for r in range(R):
            hidden = float32(0)
            for i in range(I):
                hidden += x_NI[row, i] * b_RI[r, i]
            hidden *= s
            for o in range(O):
                y_NO[row, o] += hidden * a_RO[r, o]
        if table_C5[choice, 2] != 0:
            bias_O = carray(_float_pointer(table_C5[choice, 2]), (O,))
            for o in range(O):
                y_NO[row, o] += s * bias_O[o]


# Compiled here, at import (see `forward.load_kernel`), and never cached on disk: numba's cache is pickle. Sums may be
# reordered, but unlike with all of fastmath an overflow stays an infinity. Without the interpreter lock: it may run
# beside the event loop.
_compiled = njit(
    void(
        float32[:, ::1],
        float32[:, ::1],
        types.Array(int64, 2, "C", readonly=True),
        types.Array(float64, 2, "C", readonly=True),
        int64[::1],
        int64[::1],
    ),
    fastmath={"reassoc", "contract", "nsz"},
    error_model="numpy",
    nogil=True,
)(_add_terms)


def add_low_rank_terms(y_NO: Float32, x_NI: Float32, records: bytes, choice_N: Indices, order_N: Indices) -> None:
    """Add s·((x[n]·Bᵀ)·Aᵀ + bias) to y[n] for each row n in `order_N`, with the factors of `choice_N[n]`.

    `records` has one `adapters.lora.adapter.RECORD` per choice, with R = 0 for no term. The caller keeps alive the
    tensors that they point to.
    """
    table_C5 = np.frombuffer(records, dtype=np.int64).reshape(-1, 5)
    _compiled(y_NO, x_NI, table_C5, table_C5.view(np.float64), choice_N, order_N)
