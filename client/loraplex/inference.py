"""Calls that predict and classify, and their answers: binary for one adapter, JSON for one adapter per row."""

# N rows · I in_features · O out_features
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from loraplex.arrays import Float32, Rows
from loraplex.calls import NAME, Call, path
from loraplex.decode import Answer, reference
from loraplex.errors import LoraplexError, WrongShape
from loraplex.results import AdapterRef, Label, Prediction

# One adapter for all rows, or one for each row; None is the base layer.
Which = str | Sequence[str | None] | None
BASE_MODEL = "__base__"
# Rows of one request, with the default settings of the service.
MAX_ROWS = 4096
# Bytes of the rows of one request: half of the service's default limit.
_BINARY_BYTES = 2**25
_JSON_BYTES = 3 * 2**20
_JSON_BYTES_A_NUMBER = 24
_HEADER_LENGTH = "Inference-Header-Content-Length"
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_TIMING = re.compile(r"(queue|forward);dur=([0-9]+(?:\.[0-9]+)?)")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Answer to some of the rows."""

    values: Any
    """Outputs, (N, O) float32, or a list of labels for each row."""
    versions_N: Sequence[AdapterRef | None]
    queue_ms: float
    forward_ms: float


def references_of(which: Which, rows: int) -> tuple[list[str | None], bool]:
    """Return a reference for each row, and whether the caller gave one for each."""
    if which is None or isinstance(which, str):
        return [which] * rows, False
    if len(which) != rows:
        detail, given = f"there are {len(which)} adapters for {rows} rows", f"{len(which)} adapters"
        raise WrongShape(detail, field="adapters", given=given, expected="one adapter for all rows, or one a row")
    return list(which), True


def slices(rows: int, columns: int, *, max_rows: int, as_json: bool) -> list[slice]:
    """Return the rows of each request."""
    fit = _JSON_BYTES // (_JSON_BYTES_A_NUMBER * columns) if as_json else _BINARY_BYTES // (4 * columns)
    step = max(1, min(max_rows, fit))
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def count_from(error: LoraplexError, begin: int) -> None:
    """Make the row of an error count from the first row of all; it is that of a request whose first row is `begin`."""
    if begin and isinstance(error.row, int):
        error.row += begin
        # A part may be split again; the position that the service gave counts from the first row of its own request.
        detail, counted_from = error.members.get("detail", error.title), error.row - error.members["row"]
        error.detail = f"{detail} (counted from row {counted_from} on)"
        error.args = (error.detail,)


def prediction(rows: Rows, parts: Sequence[Part], *, by_row: bool) -> Prediction:
    """Return the result of the requests that rows were sent in."""
    versions_N = list(chain.from_iterable(part.versions_N for part in parts))
    adapters = tuple(dict.fromkeys(version for version in versions_N if version is not None)) if by_row else ()
    index = {version: position for position, version in enumerate(adapters)}
    return Prediction(
        # This is a copy, because the caller may write to it, and received bytes are read-only.
        outputs=rows.answer(np.concatenate([part.values for part in parts], dtype=np.float32)),
        adapter=None if by_row else versions_N[0],
        adapters=adapters,
        row_adapters=tuple(None if version is None else index[version] for version in versions_N) if by_row else None,
        queue_ms=sum(part.queue_ms for part in parts),
        forward_ms=sum(part.forward_ms for part in parts),
        index=rows.index,
    )


def json_call(
    references: Sequence[str | None],
    x_NI: Float32,
    *,
    by_row: bool,
    options: Mapping[str, object],
    timeout: float | None,
) -> Call:
    """Return the call for outputs, or for what the options ask for, in JSON."""
    which = {"adapters": list(references)} if by_row else {"adapter": references[0]}
    body = {**which, "inputs": x_NI, **options}
    return Call("POST", "/predict", safe=True, headers=_limit(timeout), json=body, timeout=timeout)


def read_json(answer: Answer, *, has_labels: bool) -> Part:
    """Return outputs or classes; raise `BadAnswer`."""
    with answer.reading():
        value = json.loads(answer.content)
        if has_labels:
            pairs = zip(value["labels"], value["probabilities"], strict=True)
            values: Any = [[Label(*pair) for pair in zip(*row, strict=True)] for row in pairs]
        else:
            values = np.asarray(value["outputs"], np.float32)
        if "row_adapters" in value:
            versions = [reference(version) for version in value["adapters"]]
            # `index` raises if there is no such position.
            positions = range(len(versions))
            versions_N = [None if i is None else versions[positions.index(i)] for i in value["row_adapters"]]
        else:
            versions_N = [None if value["adapter"] is None else reference(value["adapter"])] * len(values)
    return Part(values, versions_N, *_times(answer))


def model_path(reference: str | None) -> str | None:
    """Return the path of a reference; None for an alias and for invalid references, which the protocol cannot name."""
    if reference is None:
        return f"/v2/models/{BASE_MODEL}/infer"
    name, at, version = reference.partition("@")
    if not NAME.fullmatch(name):
        return None
    if not at or version == "live":
        return path("v2", "models", name, "infer")
    return path("v2", "models", name, "versions", version, "infer") if _VERSION.fullmatch(version) else None


def binary_call(where: str, x_NI: Float32, *, timeout: float | None) -> Call:
    """Return the call for outputs in binary form."""
    tensor = x_NI.astype("<f4", copy=False).tobytes()
    shape, size = list(x_NI.shape), {"binary_data_size": len(tensor)}
    header = {
        "inputs": [{"name": "inputs", "shape": shape, "datatype": "FP32", "parameters": size}],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(head)), **_limit(timeout)}
    return Call("POST", where, safe=True, headers=headers, content=head + tensor, timeout=timeout)


def read_binary(answer: Answer) -> Part:
    """Return the outputs; raise `BadAnswer`."""
    with answer.reading():
        length = int(answer.headers[_HEADER_LENGTH.lower()])
        header: Any = json.loads(answer.content[:length])
        (output,) = header["outputs"]
        rows, columns = output["shape"]
        outputs_NO = np.frombuffer(answer.content, "<f4", offset=length).reshape(rows, columns)
        name, version = header["model_name"], int(header["model_version"])
    which = None if name == BASE_MODEL else AdapterRef(name, version)
    return Part(outputs_NO, [which] * len(outputs_NO), *_times(answer))


def _limit(timeout: float | None) -> dict[str, str]:
    """Return the header that limits the time that the request waits in the service."""
    return {} if timeout is None else {"X-Request-Timeout": f"{timeout:g}"}


def _times(answer: Answer) -> Iterable[float]:
    """Return the milliseconds of waiting and of computation."""
    times = dict(_TIMING.findall(answer.headers.get("server-timing", "")))
    return float(times.get("queue", 0)), float(times.get("forward", 0))
