"""The catalogue: adapters and their versions."""

from pathlib import Path
from typing import Any

from loraplex import decode as reading
from loraplex.arrays import numbers
from loraplex.calls.builders import conditions, get, given, pages, path, send_json
from loraplex.decode import reading as reading_json
from loraplex.effects import Answer, Attempt, Call, Repeat, Steps, ask, work
from loraplex.errors import InvalidCombination, LoraplexError
from loraplex.peft_files import read_source, unpack
from loraplex.results import Adapter, Base, Version


def show_base() -> Steps[Base]:
    """The frozen layer."""
    return ask(get("/base", reading.base))


def list_adapters(*, prefix: str | None, limit: int | None) -> Steps[None]:
    """Tell adapters in byte order of name."""
    return pages("/adapters", reading.adapter, query={"prefix": prefix}, limit=limit)


def show_adapter(name: str) -> Steps[Adapter]:
    """One adapter."""
    return ask(get(path("adapters", name), reading.adapter))


def list_versions(name: str, *, limit: int | None) -> Steps[None]:
    """Tell an adapter's versions, newest first."""
    return pages(path("adapters", name, "versions"), reading.version, limit=limit)


def show_version(name: str, number: int) -> Steps[Version]:
    """One version."""
    return ask(get(path("adapters", name, "versions", number), reading.version))


def roll_back(name: str, version: int, *, if_match: str | None) -> Steps[Adapter]:
    """Let the bare name mean another version."""
    where, body = path("adapters", name, "aliases", "live"), {"version": version}
    return ask(send_json("PUT", where, body, reading.adapter, headers=conditions(if_match, None)))


def delete(name: str, *, if_match: str | None) -> Steps[None]:
    """Delete an adapter with all its versions."""
    return ask(remove(path("adapters", name), if_match))


def remove(where: str, if_match: str | None) -> Call[None]:
    """A call that deletes."""
    return Call(
        method="DELETE",
        path=where,
        read=reading.nothing,
        repeats=Repeat.IF_REFUSED,
        headers=conditions(if_match, None),
    )


def download(name: str, folder: Path, *, version: int | None, module: str | None, timeout: float | None) -> Steps[Path]:
    """A version's PEFT files in a folder."""
    call: Call[bytes] = Call(
        method="GET",
        path=path("adapters", name, "download"),
        read=_content,
        repeats=Repeat.ALWAYS,
        query=given({"version": version, "module": module}),
        timeout=timeout,
    )
    archive = yield from ask(call)
    return (yield from work(lambda: unpack(archive, folder)))


def _content(answer: Answer) -> bytes:
    return answer.content


def ready(seconds: float) -> Steps[bool]:
    """Whether it says that it can serve: asked once, since its saying no is the answer."""
    try:
        answer = yield Attempt(get("/readyz", bool), seconds)
    except LoraplexError:
        return False
    return bool(answer.status == 200)


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
