"""Requests with more rows than the service accepts, split into parts.

An alias may change between two parts. Every part after the first therefore names the version that answered before.
"""

# N rows · I in_features
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from loraplex.arrays import Float32
from loraplex.calls.builders import get
from loraplex.effects import Operation, ask
from loraplex.errors import BadAnswer, InvalidInput, LoraplexError, OutOfRange
from loraplex.results import AdapterRef

V = TypeVar("V")
# Rows of one request, with the default settings of the service.
MAX_ROWS = 4096
# Bytes of the rows of one request: half of the service's default limit.
_BINARY_BYTES = 2**25
_JSON_BYTES = 3 * 2**20
_JSON_BYTES_A_NUMBER = 24


@dataclass(frozen=True, slots=True, eq=False)
class Part(Generic[V]):
    """Answer to some of the rows: `which[choice_N[n]]` answered row n."""

    values: V
    which: Sequence[AdapterRef | None]
    choice_N: Sequence[int]
    queue_ms: float
    forward_ms: float


AskPart = Callable[[Sequence[str | None], Float32], Operation[Part[V]]]


def in_parts(
    references: Sequence[str | None],
    x_NI: Float32,
    ask_part: AskPart[V],
    join: Callable[[list[V]], V],
    *,
    as_json: bool,
) -> Operation[Part[V]]:
    """Call `ask_part` for all rows, each with its reference, in as few requests as possible."""
    cuts = _cuts(*x_NI.shape, most_rows=MAX_ROWS, as_json=as_json)
    try:
        return (yield from _ask_all(references, x_NI, ask_part, join, cuts))
    except InvalidInput as error:
        # The service answers `out_of_range` for too many rows; the base class stands for an unknown code.
        if type(error) not in (InvalidInput, OutOfRange):
            raise
        most_rows = yield from _most_rows()
        if most_rows >= min(MAX_ROWS, len(x_NI)):
            raise
    cuts = _cuts(*x_NI.shape, most_rows=most_rows, as_json=as_json)
    return (yield from _ask_all(references, x_NI, ask_part, join, cuts))


def once_in_json(
    references: Sequence[str | None], x_NI: Float32, ask_part: AskPart[V], join: Callable[[list[V]], V]
) -> Operation[Part[V]]:
    """Call `ask_part` once for all rows in JSON; its errors are raised unchanged."""
    return _ask_all(references, x_NI, ask_part, join, _cuts(*x_NI.shape, most_rows=MAX_ROWS, as_json=True))


def _cuts(rows: int, columns: int, *, most_rows: int, as_json: bool) -> list[slice]:
    fit = _JSON_BYTES // (_JSON_BYTES_A_NUMBER * columns) if as_json else _BINARY_BYTES // (4 * columns)
    step = max(1, min(most_rows, fit))
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def _most_rows() -> Operation[int]:
    return ask(get("/v2/models/__base__/config", lambda value: int(value["max_batch_size"])))


def _ask_all(
    references: Sequence[str | None],
    x_NI: Float32,
    ask_part: AskPart[V],
    join: Callable[[list[V]], V],
    cuts: Sequence[slice],
) -> Operation[Part[V]]:
    pins: dict[str | None, str] = {}
    parts: list[Part[V]] = []
    for cut in cuts:
        now = references[cut]
        try:
            part = yield from ask_part([pins.get(reference, reference) for reference in now], x_NI[cut])
        except LoraplexError as error:
            _count_from(error, cut.start)
            raise
        if len(part.choice_N) != len(now) or len(part.values) != len(now):  # type: ignore[arg-type]
            raise BadAnswer(f"{len(now)} rows were asked for, and others answered", expected="an output for each row")
        for reference, choice in zip(now, part.choice_N, strict=True):
            which = part.which[choice]
            if which is not None:
                pins.setdefault(reference, str(which))
        parts.append(part)
    return parts[0] if len(parts) == 1 else _together(parts, join)


def _together(parts: Sequence[Part[V]], join: Callable[[list[V]], V]) -> Part[V]:
    places: dict[AdapterRef | None, int] = {}
    choice_N: list[int] = []
    for part in parts:
        own = [places.setdefault(which, len(places)) for which in part.which]
        choice_N += [own[choice] for choice in part.choice_N]
    return Part(
        join([part.values for part in parts]),
        tuple(places),
        choice_N,
        sum(part.queue_ms for part in parts),
        sum(part.forward_ms for part in parts),
    )


def _count_from(error: LoraplexError, begin: int) -> None:
    if begin and isinstance(error.row, int):
        error.row += begin
        # A part may be split again; the position that the service gave counts from the first row of its own request.
        said, counted_from = error.members.get("detail", error.title), error.row - error.members["row"]
        error.detail = f"{said} (counted from row {counted_from} on)"
        error.args = (error.detail,)
