"""Predict and classify."""

# N rows · I in_features · O out_features · T the most probable classes
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from loraplex.arrays import Float32
from loraplex.calls.builders import encoded
from loraplex.calls.chunking import Part, in_parts, once_in_json
from loraplex.calls.infer import infer, model_path, spent, waiting
from loraplex.decode import reading, reference
from loraplex.effects import JSON, Answer, Call, Repeat, Steps, ask
from loraplex.encoding import Encode, read_rows
from loraplex.errors import LoraplexError, WrongShape
from loraplex.results import AdapterRef, Label, Prediction

Which = str | Sequence[str | None] | None
"""One adapter for all rows, or one a row; None is the base layer."""
_UNTOLD = (404, 409, 422)
"""Statuses of several codes: under `/v2` an answer says which only in words.

So have 500 and 503, which stay `InternalError` and `NotReady` there whatever the words say (that the catalogue is busy,
or that the request's time is up): a service in trouble is not asked the same again.
"""


def predict(which: Which, inputs: Any, *, encode: Encode | None, timeout: float | None) -> Steps[Prediction]:
    """The layer's outputs: as bytes where one adapter answers, as JSON where each row has its own."""
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
) -> Steps[list[list[Label]]]:
    """The most probable classes of each row, that one first."""
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


def _binary(references: Sequence[str | None], x_NI: Float32, *, timeout: float | None) -> Steps[Part[Float32]]:
    where = model_path(references[0])
    assert where is not None
    try:
        return (yield from ask(infer(where, x_NI, timeout=timeout)))
    except LoraplexError as error:
        if error.status not in _UNTOLD:
            raise
        untold = error
    # The same question in JSON is answered with the code.
    ask_part = partial(_numbers, by_row=False, timeout=timeout)
    try:
        yield from once_in_json(references, x_NI, ask_part, np.concatenate)
    except LoraplexError as told:
        if told.status == untold.status:
            raise told from None
    raise untold


def _numbers(
    references: Sequence[str | None], x_NI: Float32, *, by_row: bool, timeout: float | None
) -> Steps[Part[Float32]]:
    def read(answer: Answer) -> Part[Float32]:
        return reading(lambda value: _part(answer, value, np.asarray(value["outputs"], np.float32)))(answer)

    return ask(_question(references, x_NI, {}, read, by_row=by_row, timeout=timeout))


def _classes(
    references: Sequence[str | None], x_NI: Float32, *, by_row: bool, top_k: int, timeout: float | None
) -> Steps[Part[list[list[Label]]]]:
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
    # `index` raises where there is no such place.
    choice_N = [base if place is None else range(base).index(place) for place in value["row_adapters"]]
    return Part(values, (*adapters, None), choice_N, queue_ms, forward_ms)
