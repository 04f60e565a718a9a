"""Calls for adapters and their versions: list, show, upload, download, roll back, delete."""

from pathlib import Path
from typing import Any

from loraplex import decode as reading
from loraplex.arrays import numbers
from loraplex.calls.builders import conditions, get, given, pages, path, send_json
from loraplex.decode import reading as reading_json
from loraplex.effects import Answer, Attempt, Call, Operation, Repeat, ask, work
from loraplex.errors import InvalidCombination, LoraplexError
from loraplex.peft_files import read_source, unpack
from loraplex.results import Adapter, Base, Version


def show_base() -> Operation[Base]:
    """Return the call that reads the base layer."""
    return ask(get("/base", reading.base))


def list_adapters(*, prefix: str | None, limit: int | None) -> Operation[None]:
    """Emit adapters in byte order of their names."""
    return pages("/adapters", reading.adapter, query={"prefix": prefix}, limit=limit)


def show_adapter(name: str) -> Operation[Adapter]:
    """Return the call that reads one adapter."""
    return ask(get(path("adapters", name), reading.adapter))


def list_versions(name: str, *, limit: int | None) -> Operation[None]:
    """Emit the versions of an adapter, newest first."""
    return pages(path("adapters", name, "versions"), reading.version, limit=limit)


def show_version(name: str, number: int) -> Operation[Version]:
    """Return the call that reads one version."""
    return ask(get(path("adapters", name, "versions", number), reading.version))


def roll_back(name: str, version: int, *, if_match: str | None) -> Operation[Adapter]:
    """Return the call that makes another version live."""
    where, body = path("adapters", name, "aliases", "live"), {"version": version}
    return ask(send_json("PUT", where, body, reading.adapter, headers=conditions(if_match, None)))


def delete(name: str, *, if_match: str | None) -> Operation[None]:
    """Return the call that deletes an adapter with all its versions."""
    return ask(remove(path("adapters", name), if_match))


def remove(where: str, if_match: str | None) -> Call[None]:
    """Return a DELETE call."""
    return Call(
        method="DELETE", path=where, read=reading.nothing, repeats=Repeat.IF_REFUSED, headers=conditions(if_match, None)
    )


def download(
    name: str, folder: Path, *, version: int | None, module: str | None, timeout: float | None
) -> Operation[Path]:
    """Write the PEFT files of a version to a folder."""
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


def ready(seconds: float) -> Operation[bool]:
    """Return whether the service is ready. The call is not retried, because "not ready" is a result."""
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
) -> Operation[Version]:
    """Upload an adapter from PEFT files, or from `factors`: A, B and optional fields, None if not given."""
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
    # Labels are not converted: an array would turn numbers beside texts into texts, which the service refuses.
    return value if key in ("alpha", "labels") else numbers(value, field=key).tolist()
