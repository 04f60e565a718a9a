"""Upload an adapter."""

from typing import Any

from loraplex import decode as reading
from loraplex.arrays import numbers
from loraplex.calls.builders import conditions, given, path, send_json
from loraplex.decode import reading as reading_json
from loraplex.effects import Call, Repeat, Steps, ask, work
from loraplex.errors import InvalidCombination
from loraplex.peft_files import read_source
from loraplex.results import Version

_ZIP = "application/zip"


def upload(
    name: str,
    source: Any,
    *,
    factors: dict[str, Any],
    if_match: str | None,
    if_none_match: str | None,
    timeout: float | None,
) -> Steps[Version]:
    """A new version from PEFT's files, or from `factors`: A, B and what goes with them, None where it is not given."""
    known = given(factors)
    if (source is None) == (not known):
        instead = "and not both" if known else "and neither is given"
        raise InvalidCombination(
            f"an adapter is uploaded from a source or from factors, {instead}",
            field="source",
            expected="a PEFT model, a folder or a zip; or A and B",
        )
    where, headers = path("adapters", name), conditions(if_match, if_none_match)
    if source is None:
        body = {key: _member(key, value) for key, value in known.items()}
        return (yield from ask(send_json("PUT", where, body, reading.version, headers=headers, timeout=timeout)))
    content = yield from work(lambda: read_source(source))
    call: Call[Version] = Call(
        method="PUT",
        path=where,
        read=reading_json(reading.version),
        repeats=Repeat.IF_REFUSED,
        headers={"Content-Type": _ZIP, **headers},
        content=content,
        timeout=timeout,
    )
    return (yield from ask(call))


def _member(key: str, value: Any) -> Any:
    # Labels as they are: an array of them would make text of a number, which the service refuses beside text.
    return value if key in ("alpha", "labels") else numbers(value, field=key).tolist()
