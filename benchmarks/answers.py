"""Answers held against numpy: a fast wrong answer is no figure."""

# I in_features · O out_features
import json
from email.message import Message
from typing import Any

import numpy as np

from benchmarks.failures import BenchFailed
from benchmarks.requests import HEADER_LENGTH, Mix, Shape, expected_answer, tenant_of

_TOLERANCE = 1e-3


def check_answer(
    exchanged: tuple[int, Message, bytes],
    *,
    who: str,
    weight_OI: Any,
    row_I: Any,
    shape: Shape,
    mix: Mix,
    number: int,
    rank: int,
    binary: bool,
) -> None:
    """Raise `BenchFailed` unless request `number` was answered with 200 and the right numbers."""
    status, headers, body = exchanged
    if status != 200:
        raise BenchFailed(f"{who} answered {status}: {body[:500]!r}")
    given_O = _binary_outputs(headers, body) if binary else np.array(json.loads(body)["outputs"])[0]
    sent_I = row_I.astype(np.float32) if binary else row_I
    expected_O = expected_answer(weight_OI, sent_I, tenant_of(mix, number, shape, rank))
    if given_O.shape != expected_O.shape or np.abs(given_O - expected_O).max() > _TOLERANCE * np.abs(expected_O).max():
        raise BenchFailed(f"{who} answered with wrong numbers: {given_O[:4]}, expected {expected_O[:4]}")


def _binary_outputs(headers: Message, body: bytes) -> Any:
    length = headers.get(HEADER_LENGTH)
    if length is None:
        raise BenchFailed(f"the answer is not in binary form: {body[:200]!r}")
    return np.frombuffer(body, dtype="<f4", offset=int(length))
