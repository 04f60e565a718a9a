"""Response: the body of a `POST /predict`, from numbers to probabilities and labels."""

import asyncio
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from adapters.arrays import Float32
from adapters.catalog.versions import Version
from adapters.errors import OutOfRange
from adapters.lora.labels import Labels, most_probable, sigmoid, softmax
from adapters.training.settings import Loss
from app.http.schemas.predictions import LABELS, OUTPUTS, PROBABILITIES
from app.serving.queue_entry import InferenceResult
from app.serving.request import InferenceRequest, PredictOptions

# N rows · O out_features · C classes of one adapter · T most probable classes

# Largest number of outputs, about a millisecond of work, that are written in one turn of the event loop.
MAX_INLINE_NUMBERS = 2**15
_OUTPUTS = b'{"outputs":%b,%b'
# Format of a body whose members are JSON already.
MEMBERS_FORMAT = b"{%b,%b"
_BASE_LAYER = orjson.dumps({"adapter": None})


def write_response(request: InferenceRequest, result: InferenceResult, written: bytes, form: bytes = _OUTPUTS) -> bytes:
    """Return the body of an answer.

    `written` is the outputs from `write_numbers`, or with `MEMBERS_FORMAT` the members from `write_options`.
    """
    if request.by_row:
        described = [None if version is None else _to_json(version) for version in result.versions]
        which = orjson.dumps(_by_row(described, result.choice_N))
    else:
        version = result.versions[0]
        which = _BASE_LAYER if version is None else _write_adapter(version.adapter, version.version, version.digest)
    return form % (written, which[1:])


def write_numbers(numbers: Float32 | list[Any]) -> bytes:
    """Return an array, or a list of arrays or labels, as JSON."""
    return orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)


async def write_many_numbers(numbers: Float32) -> bytes:
    """Return an array as JSON; let the event loop run other tasks between the parts of a large array."""
    if numbers.size <= MAX_INLINE_NUMBERS:
        return write_numbers(numbers)
    parts = []
    for block in split_rows(len(numbers), numbers.size // len(numbers)):
        parts.append(write_numbers(numbers[block])[1:-1])
        await asyncio.sleep(0)
    return b"[%b]" % b",".join(parts)


def _to_json(version: Version) -> dict[str, object]:
    return {"name": version.adapter, "version": version.version, "digest": version.digest}


@lru_cache(2**14)
def _write_adapter(name: str, version: int, digest: str) -> bytes:
    return orjson.dumps({"adapter": {"name": name, "version": version, "digest": digest}})


def _by_row(described: list[dict[str, object] | None], choice_N: Sequence[int]) -> dict[str, object]:
    # Two references, such as `acme` and `acme@3`, may be the same version.
    keys = [None if entry is None else (entry["name"], entry["version"]) for entry in described]
    distinct = {key: entry for key, entry in zip(keys, described, strict=True) if key is not None}
    position: dict[object, int] = {key: index for index, key in enumerate(distinct)}
    row_adapters = [position.get(keys[choice]) for choice in choice_N]
    return {"adapters": list(distinct.values()), "row_adapters": row_adapters}


# Largest labels of one answer. A short request can ask for all labels of every row, and a label can be 20 times as long
# as a number.
MAX_LABEL_BYTES = 2**26


def write_options(options: PredictOptions, result: InferenceResult, base_labels: Labels | None) -> bytes:
    """Return the members of an answer as JSON without the braces; raise `OutOfRange` if the labels are too long.

    base_labels: see `select_classes`. Call it in a thread: some thousand rows with a thousand classes take a while.
    """
    parts: dict[str, list[bytes]] = {name: [] for name in options.members}
    label_bytes = 0
    for block in split_rows(*result.outputs_NO.shape):
        for name, rows in _write_block(options, result, base_labels, block).items():
            parts[name].append(write_numbers(rows)[1:-1])
        label_bytes += len(parts[LABELS][-1]) if LABELS in parts else 0
        check_label_size(label_bytes, field="top_k")
    return b",".join(b'"%b":[%b]' % (name.encode(), b",".join(rows)) for name, rows in parts.items())


def split_rows(rows: int, columns: int) -> Iterator[slice]:
    """Return blocks of rows that take about a millisecond each, so that other threads run between them."""
    step = max(1, MAX_INLINE_NUMBERS // columns)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def check_label_size(label_bytes: int, *, field: str) -> None:
    """Raise `OutOfRange` if labels are too long; `field` is the field of the request that asks for them."""
    if label_bytes > MAX_LABEL_BYTES:
        expected = f"labels of at most {MAX_LABEL_BYTES} bytes in one answer"
        raise OutOfRange(f"{field} asks for too much: expected {expected}", field=field, expected=expected)


def select_classes(
    version: Version | None, base_labels: Labels | None, x_NO: Float32
) -> tuple[Sequence[str | int] | None, Float32]:
    """Return the labels of a version, and the outputs of its classes, (N, O) -> (N, C).

    The bare base layer, and a version without labels of its own, have the labels of the base layer, if there are some.
    """
    labels = base_labels if version is None or version.labels is None else version.labels
    return labels, x_NO if labels is None else x_NO[:, : len(labels)]


def _write_block(
    options: PredictOptions, result: InferenceResult, base_labels: Labels | None, block: slice
) -> dict[str, list[Any]]:
    """Return the values of each member for a block of rows; each row has the classes of its own adapter."""
    x_NO, choice_N = result.outputs_NO[block], result.choice_N[block]
    rows_by_choice: dict[int, list[int]] = {}
    for row, choice in enumerate(choice_N):
        rows_by_choice.setdefault(choice, []).append(row)
    members: dict[str, list[Any]] = {name: [None] * len(choice_N) for name in options.members}
    for choice, rows in rows_by_choice.items():
        selected = select_classes(result.versions[choice], base_labels, x_NO[rows])
        for name, values in _select(options, result.versions[choice], x_NO[rows], *selected).items():
            for row, value in zip(rows, values, strict=True):
                members[name][row] = value
    return members


def _select(
    options: PredictOptions, version: Version | None, x_NO: Float32, labels: Sequence[str | int] | None, x_NC: Float32
) -> dict[str, Sequence[Any]]:
    """Return the values of each member for rows of one version, with the labels and outputs of its classes."""
    members: dict[str, Sequence[Any]] = {}
    if OUTPUTS in options.members:
        members[OUTPUTS] = list(x_NO)
    order_NT = None
    if LABELS in options.members or options.top_k is not None:
        order_NT = most_probable(x_NC, options.top_k or 1)
    if PROBABILITIES in options.members:
        # The loss that a version was trained with decides whether its classes exclude each other.
        is_multi_label = version is not None and version.loss == Loss.BINARY_CROSS_ENTROPY
        probability_NC = sigmoid(x_NC) if is_multi_label else softmax(x_NC)
        if options.top_k is not None and order_NT is not None:
            probability_NC = np.ascontiguousarray(np.take_along_axis(probability_NC, order_NT, axis=1))
        members[PROBABILITIES] = list(probability_NC)
    if LABELS in options.members and order_NT is not None:
        names_NT = order_NT if labels is None else np.array(labels, dtype=object)[order_NT]
        members[LABELS] = (names_NT if options.top_k is not None else names_NT[:, 0]).tolist()
    return members
