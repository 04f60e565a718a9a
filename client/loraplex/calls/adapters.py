"""The catalogue: adapters and their versions."""

from pathlib import Path

from loraplex import decode as reading
from loraplex.calls.builders import conditions, get, given, pages, path, send_json
from loraplex.effects import Answer, Call, Repeat, Steps, ask, work
from loraplex.peft_files import unpack
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
