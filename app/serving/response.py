"""`POST /predict`, from its bytes to its answer."""

# N rows · O out_features
import asyncio
from collections.abc import Sequence
from functools import lru_cache

import orjson

from adapters.arrays import Float32
from adapters.catalog.versions import Version
from adapters.lora.base_layer import BaseLayer
from adapters.names import MAX_REFERENCE_CHARACTERS
from app.http.bodies import LEAST_LIMIT_BYTES, NUMBER_BYTES
from app.service import Service
from app.serving.fast_json import count_lists
from app.serving.queue_entry import Outcome
from app.serving.request import Question, question_of, read_quickly

NUMBERS_AT_ONCE = 2**15
"""About a millisecond of writing, which holds up everything else."""
BYTES_AT_ONCE = 2**18
"""About half a millisecond of parsing: more is done by a thread."""
MOST_QUICK_BYTES = 2**24
"""The fast parser holds the interpreter lock for some 60 ms of this: more is read by another process."""
_OUTPUTS = b'{"outputs":%b,%b'
MEMBERS = b"{%b,%b"
"""The form of an answer whose members are written already."""
_NOBODY = orjson.dumps({"adapter": None})


async def read_question(service: Service, body: bytes) -> Question:
    """What a body asks; raises the `InvalidInput` or `NotJson` that says what is wrong with it."""
    base, max_rows = service.base, service.settings.max_rows
    if len(body) <= BYTES_AT_ONCE:
        question = read_quickly(body, base, max_rows=max_rows, parser=service.parser)
    elif len(body) <= MOST_QUICK_BYTES:
        question = await asyncio.to_thread(_read_on_thread, body, base, max_rows=max_rows)
    else:
        question = None
    if question is None:
        value = await service.json.parse(body, longest=max_rows)
        question = await asyncio.to_thread(question_of, value, base, max_rows=max_rows)
    return question


def _read_on_thread(body: bytes, base: BaseLayer, *, max_rows: int) -> Question | None:
    # The rows, the list of them, and the adapters. A text with more lists would only hold up others in the parser.
    if count_lists(body) > max_rows + 2:
        return None
    return read_quickly(body, base, max_rows=max_rows)


def most_json_bytes(service: Service) -> int:
    """Return how long the JSON of a predict or infer request may be: what its shapes can need, or the setting."""
    settings = service.settings
    numbers = settings.max_rows * service.base.in_features
    needed = LEAST_LIMIT_BYTES + numbers * NUMBER_BYTES + settings.max_rows * MAX_REFERENCE_CHARACTERS
    return min(settings.max_predict_json_bytes, needed)


def write_answer(question: Question, outcome: Outcome, written: bytes, form: bytes = _OUTPUTS) -> bytes:
    """The body of the answer, with its numbers as `write_numbers` has them, or its `MEMBERS` as `write_wanted` has."""
    if question.by_row:
        described = [None if version is None else _describe(version) for version in outcome.versions]
        which = orjson.dumps(_by_row(described, outcome.choice_N))
    else:
        version = outcome.versions[0]
        which = _NOBODY if version is None else _alone(version.adapter, version.version, version.digest)
    return form % (written, which[1:])


def write_numbers(numbers: Float32) -> bytes:
    """An array as JSON."""
    return orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)


async def write_many_numbers(numbers: Float32) -> bytes:
    """The same; between the parts of a large array, others get their turn."""
    if numbers.size <= NUMBERS_AT_ONCE:
        return write_numbers(numbers)
    step = max(1, NUMBERS_AT_ONCE * len(numbers) // numbers.size)
    parts = []
    for begin in range(0, len(numbers), step):
        parts.append(write_numbers(numbers[begin : begin + step])[1:-1])
        await asyncio.sleep(0)
    return b"[%b]" % b",".join(parts)


def _describe(version: Version) -> dict[str, object]:
    return {"name": version.adapter, "version": version.version, "digest": version.digest}


@lru_cache(2**14)
def _alone(name: str, version: int, digest: str) -> bytes:
    return orjson.dumps({"adapter": {"name": name, "version": version, "digest": digest}})


def _by_row(described: list[dict[str, object] | None], choice_N: Sequence[int]) -> dict[str, object]:
    # `acme` and `acme@3` may be the same version: the distinct ones are told apart by their contents.
    keys = [None if entry is None else (entry["name"], entry["version"]) for entry in described]
    distinct = {key: entry for key, entry in zip(keys, described, strict=True) if key is not None}
    place: dict[object, int] = {key: index for index, key in enumerate(distinct)}
    row_adapters = [place.get(keys[choice]) for choice in choice_N]
    return {"adapters": list(distinct.values()), "row_adapters": row_adapters}
