"""Calls that predict and classify."""

# N rows · I in_features · O out_features · T the most probable classes
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from loraplex.arrays import Encode, Float32, read_rows
from loraplex.calls.builders import NAME, encoded, path
from loraplex.calls.chunking import Part, in_parts, once_in_json
from loraplex.decode import reading, reference
from loraplex.effects import JSON, Answer, Call, Operation, Repeat, ask
from loraplex.errors import BadAnswer, LoraplexError, WrongShape
from loraplex.results import AdapterRef, Label, Prediction

# One adapter for all rows, or one for each row; None is the base layer.
Which = str | Sequence[str | None] | None
# Statuses that stand for several codes: an answer under `/v2` gives the code only in words.
# 500 and 503 are not among them: a service in trouble is not sent the same request again. They raise `InternalError`
# and `NotReady`.
_UNTOLD = (404, 409, 422)


def predict(which: Which, inputs: Any, *, encode: Encode | None, timeout: float | None) -> Operation[Prediction]:
    """Return the layer's outputs: in binary form if one adapter answers all rows, in JSON if each row has its own."""
    rows = yield from read_rows(inputs, encode)
    references, by_row = _references(which, len(rows.x_NI))
    as_json = by_row or model_path(references[0]) is None
    ask_part = partial(_numbers, by_row=by_row, timeout=timeout) if as_json else partial(_binary, timeout=timeout)
    part = yield from in_parts(references, rows.x_NI, ask_part, np.concatenate, as_json=as_json)
    adapters = tuple(each for each in part.which if each is not None)
    place = {each: index for index, each in enumerate(adapters)}
    by_choice = [None if each is None else place[each] for each in part.which]
    return Prediction(
        outputs=rows.answer(part.values),
        adapter=None if by_row else part.which[0],
        adapters=adapters if by_row else (),
        row_adapters=tuple(by_choice[choice] for choice in part.choice_N) if by_row else None,
        queue_ms=part.queue_ms,
        forward_ms=part.forward_ms,
    )


def classify(
    which: Which, inputs: Any, *, top_k: int, encode: Encode | None, timeout: float | None
) -> Operation[list[list[Label]]]:
    """Return the most probable classes of each row, in order of probability."""
    rows = yield from read_rows(inputs, encode)
    references, by_row = _references(which, len(rows.x_NI))
    ask_part = partial(_classes, by_row=by_row, top_k=top_k, timeout=timeout)
    part = yield from in_parts(references, rows.x_NI, ask_part, _chained, as_json=True)
    return part.values


def _chained(lists: list[list[list[Label]]]) -> list[list[Label]]:
    return list(chain.from_iterable(lists))


def _references(which: Which, rows: int) -> tuple[list[str | None], bool]:
    if which is None or isinstance(which, str):
        return [which] * rows, False
    if len(which) != rows:
        raise WrongShape(
            f"there are {len(which)} adapters for {rows} rows",
            field="adapters",
            given=f"{len(which)} adapters",
            expected="one adapter for all rows, or one a row",
        )
    return list(which), True


def _binary(references: Sequence[str | None], x_NI: Float32, *, timeout: float | None) -> Operation[Part[Float32]]:
    where = model_path(references[0])
    assert where is not None
    try:
        return (yield from ask(infer(where, x_NI, timeout=timeout)))
    except LoraplexError as error:
        if error.status not in _UNTOLD:
            raise
        untold = error
    # The same request in JSON is answered with the code.
    ask_part = partial(_numbers, by_row=False, timeout=timeout)
    try:
        yield from once_in_json(references, x_NI, ask_part, np.concatenate)
    except LoraplexError as told:
        if told.status == untold.status:
            raise told from None
    raise untold


def _numbers(
    references: Sequence[str | None], x_NI: Float32, *, by_row: bool, timeout: float | None
) -> Operation[Part[Float32]]:
    def read(answer: Answer) -> Part[Float32]:
        return reading(lambda value: _part(answer, value, np.asarray(value["outputs"], np.float32)))(answer)

    return ask(_question(references, x_NI, {}, read, by_row=by_row, timeout=timeout))


def _classes(
    references: Sequence[str | None], x_NI: Float32, *, by_row: bool, top_k: int, timeout: float | None
) -> Operation[Part[list[list[Label]]]]:
    def labels(value: Any) -> list[list[Label]]:
        return [
            [Label(*pair) for pair in zip(*row, strict=True)]
            for row in zip(value["labels"], value["probabilities"], strict=True)
        ]

    def read(answer: Answer) -> Part[list[list[Label]]]:
        return reading(lambda value: _part(answer, value, labels(value)))(answer)

    wanted = {"return": ["labels", "probabilities"], "top_k": top_k}
    return ask(_question(references, x_NI, wanted, read, by_row=by_row, timeout=timeout))


def _question(
    references: Sequence[str | None],
    x_NI: Float32,
    wanted: Mapping[str, object],
    read: Any,
    *,
    by_row: bool,
    timeout: float | None,
) -> Call[Any]:
    which = {"adapters": list(references)} if by_row else {"adapter": references[0]}
    return Call(
        method="POST",
        path="/predict",
        read=read,
        repeats=Repeat.ALWAYS,
        headers={"Content-Type": JSON} | waiting(timeout),
        content=encoded({**which, "inputs": x_NI.tolist(), **wanted}),
        timeout=timeout,
    )


def _part(answer: Answer, value: Any, values: Any) -> Part[Any]:
    queue_ms, forward_ms = spent(answer)
    if "row_adapters" not in value:
        which = None if value["adapter"] is None else reference(value["adapter"])
        return Part(values, (which,), (0,) * len(values), queue_ms, forward_ms)
    adapters: list[AdapterRef | None] = [reference(each) for each in value["adapters"]]
    base = len(adapters)
    # `index` raises if there is no such position.
    choice_N = [base if place is None else range(base).index(place) for place in value["row_adapters"]]
    return Part(values, (*adapters, None), choice_N, queue_ms, forward_ms)


BASE_MODEL = "__base__"
_HEADER_LENGTH = "Inference-Header-Content-Length"
_LIVE = "live"
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_TIMING = re.compile(r"(queue|forward);dur=([0-9]+(?:\.[0-9]+)?)")


def model_path(reference: str | None) -> str | None:
    """Return the path of a reference; None for an alias and for invalid references, which the protocol cannot name."""
    if reference is None:
        return f"/v2/models/{BASE_MODEL}/infer"
    name, at, which = reference.partition("@")
    if not NAME.fullmatch(name):
        return None
    if not at or which == _LIVE:
        return path("v2", "models", name, "infer")
    return path("v2", "models", name, "versions", which, "infer") if _VERSION.fullmatch(which) else None


def infer(where: str, x_NI: Float32, *, timeout: float | None) -> Call[Part[Float32]]:
    """Send rows in binary form, and return the outputs."""
    tensor = x_NI.astype("<f4", copy=False).tobytes()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "inputs",
                    "shape": list(x_NI.shape),
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(tensor)},
                }
            ],
            "parameters": {"binary_data_output": True},
        },
        separators=(",", ":"),
    ).encode()
    return Call(
        method="POST",
        path=where,
        read=_read,
        repeats=Repeat.ALWAYS,
        headers={"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(header))} | waiting(timeout),
        content=header + tensor,
        timeout=timeout,
    )


def waiting(timeout: float | None) -> dict[str, str]:
    """Return the header that limits the time that the request waits in the service."""
    return {} if timeout is None else {"X-Request-Timeout": f"{timeout:g}"}


def spent(answer: Answer) -> tuple[float, float]:
    """Return the milliseconds of waiting and of computation."""
    found = dict(_TIMING.findall(answer.headers.get("server-timing", "")))
    return float(found.get("queue", 0)), float(found.get("forward", 0))


def _read(answer: Answer) -> Part[Float32]:
    try:
        length = int(answer.headers[_HEADER_LENGTH.lower()])
        header: Any = json.loads(answer.content[:length])
        (output,) = header["outputs"]
        rows, columns = output["shape"]
        outputs_NO = np.frombuffer(answer.content, "<f4", offset=length).reshape(rows, columns)
        name, version = header["model_name"], int(header["model_version"])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadAnswer(
            f"{answer.url} answered {answer.status} with something else than a tensor: {error!r}",
            status=answer.status,
            request_id=answer.request_id,
            expected="the address of a loraplex service",
        ) from error
    queue_ms, forward_ms = spent(answer)
    which = None if name == BASE_MODEL else AdapterRef(name, version)
    # A copy, because the caller may write to it, and the received bytes are read-only.
    return Part(outputs_NO.astype(np.float32), (which,), (0,) * len(outputs_NO), queue_ms, forward_ms)
