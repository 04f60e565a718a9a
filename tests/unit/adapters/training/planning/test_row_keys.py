"""Keys of rows: the same for the same row or group in any table, and spread evenly."""

# N rows · I in_features
import hashlib

import numpy as np

from adapters.training.data_file import Column
from adapters.training.planning.row_keys import keys_of_groups, keys_of_rows

X_NI = np.random.default_rng(5).normal(size=(5000, 3)).astype(np.float32)


def test_a_row_has_its_key_in_every_table_and_part() -> None:
    key_N = keys_of_rows(Column.of(X_NI))
    assert key_N.dtype == np.int64
    assert key_N.min() >= 0
    order_N = np.random.default_rng(6).permutation(5000)
    parts = np.array_split(X_NI[order_N], 7)
    assert (keys_of_rows(Column("F32", X_NI.shape, lambda: iter(parts))) == key_N[order_N]).all()
    signed_NI = np.where(X_NI[:, :1] > 0, X_NI * 0, X_NI * -0.0)
    assert len(set(keys_of_rows(Column.of(signed_NI)).tolist())) == 1


def test_a_key_is_the_keyed_hash_of_the_bytes() -> None:
    digest = hashlib.blake2b(X_NI[7].tobytes(), digest_size=8, key=b"loraplex held-out rows").digest()
    assert keys_of_rows(Column.of(X_NI))[7] == int.from_bytes(digest, "little") >> 1


def test_keys_are_spread_evenly() -> None:
    key_N = keys_of_rows(Column.of(X_NI))
    # 500 are expected in each tenth, with a standard deviation of 21.
    assert np.abs(np.histogram(key_N / 2**63, bins=10, range=(0, 1))[0] - 500).max() < 100
    assert len(set(key_N.tolist())) == 5000


def test_a_group_has_its_key_whatever_its_code() -> None:
    one = keys_of_groups(np.array([0, 1, 1, 2]), ["a", "b", "c"])
    other = keys_of_groups(np.array([1, 0]), ["b", "c"])
    assert (one[3], one[1]) == (other[0], other[1])
    assert keys_of_groups(np.array([0]), [7]) == keys_of_groups(np.array([0]), ["7"])
