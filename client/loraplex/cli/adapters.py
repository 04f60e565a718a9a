"""Commands `adapters`, `adapter`, `upload`, `download`, `rollback`, `delete` and `undelete`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.job_summary import headline
from loraplex.cli.output import Table, pairs, when
from loraplex.cli.session import Session, Yes, argument, command, complete_adapter, confirm, option
from loraplex.errors import AdapterNotLive, VersionNotFound
from loraplex.results import Adapter, Version

PANEL = "Adapters"
_DIGEST = 19

app = typer.Typer()
Name = Annotated[str, argument("NAME", "Name of the adapter.", autocompletion=complete_adapter)]


@command(app, "adapters", panel=PANEL)
def list_adapters(
    session: Session,
    prefix: Annotated[str, argument("PREFIX", "Prefix of the names.")] = "",
    *,
    limit: Annotated[int | None, option("Maximum number.", min=1)] = None,
) -> None:
    """List the adapters in order of their names."""
    adapters = list(session.client.adapters(prefix=prefix, limit=limit))
    none = "There are none. To train one: loraplex train FILE --name NAME --target COLUMN"
    session.give(adapters, _adapter_table(adapters) if adapters else none)


@command(app, "adapter", panel=PANEL)
def show_adapter(session: Session, name: Name) -> None:
    """Show the versions of an adapter, newest first, with their metrics."""
    adapter = session.client.adapter(name)
    versions = list(session.client.versions(name))
    about = {"adapter": adapter.name, "live": None if adapter.live is None else adapter.live.reference}
    if adapter.problem is not None:
        about["problem"] = adapter.problem
    table = _version_table(versions, adapter.live)
    session.give({"adapter": adapter, "versions": versions}, pairs(about), "", table)


@command(app, "upload", panel=PANEL)
def upload(
    session: Session,
    name: Name,
    source: Annotated[Path, argument("SOURCE", "A folder that PEFT saved, or a zip of it.")],
) -> None:
    """Upload an adapter in the format of PEFT as a new live version."""
    version = session.client.upload(name, source)
    session.give(version, f"{version.reference} is live (rank {version.rank}, {version.digest})")


@command(app, "download", panel=PANEL)
def download(
    session: Session,
    name: Name,
    folder: Annotated[Path, argument("FOLDER", "Target folder; created if it does not exist.")],
    *,
    version: Annotated[int | None, option("Number of the version.", min=1, show_default="the live one")] = None,
    module: Annotated[
        str | None,
        option("Path of the linear layer in the model that loads it.", show_default="the uploaded one's, or linear"),
    ] = None,
) -> None:
    """Download an adapter as a folder that PEFT loads."""
    path = session.client.download(name, folder, version=version, module=module)
    session.give({"folder": path}, f"{name} is in {path}")


@command(app, "rollback", panel=PANEL)
def rollback(
    session: Session,
    name: Name,
    version: Annotated[
        int | None, argument("VERSION", "Number of the version.", min=1, show_default="the one before the live one")
    ] = None,
) -> None:
    """Make another version of an adapter live."""
    before = session.client.adapter(name)
    number = version if version is not None else _before_live(session, before)
    after = session.client.roll_back(name, number)
    was = "none" if before.live is None else before.live.version
    session.give(after, f"{name}@{number} is live (before: {was})")


@command(app, "delete", panel=PANEL)
def delete(
    session: Session,
    name: Name,
    *,
    purge: Annotated[bool, option("Remove the bytes at once, so that it cannot be restored.", "--purge")] = False,
    yes: Yes = False,
) -> None:
    """Delete an adapter with all its versions; `undelete` brings it back for some days."""
    confirm(f"Delete the adapter {name} with all its versions{' for good' if purge else ''}?", yes=yes)
    session.client.delete(name, purge=purge)
    session.give({"deleted": name}, f"deleted {name}")


@command(app, "undelete", panel=PANEL)
def undelete(session: Session, name: Name) -> None:
    """Bring back a deleted adapter with all its versions."""
    adapter = session.client.restore_adapter(name)
    live = "none" if adapter.live is None else adapter.live.reference
    session.give(adapter, f"restored {name} (live: {live})")


def _adapter_table(adapters: Sequence[Adapter]) -> Table:
    # The column is shown only if it has a value.
    problems = ["problem"] if any(adapter.problem for adapter in adapters) else []
    rows = []
    for adapter in adapters:
        version, *about = _about(adapter.live) if adapter.live else (None, None, None, None)
        rows.append((adapter.name, version, *([adapter.problem] if problems else []), adapter.versions, *about))
    headings = ("name", "live", *problems, "versions", "rank", "how good", "made")
    return Table(headings, rows, right=("live", "versions", "rank"), least=("versions", "rank", "made"))


def _about(version: Version) -> tuple[object, ...]:
    return f"@{version.version}", version.rank, headline(version.metrics), when(version.created_at)


def _version_table(versions: Sequence[Version], live: Version | None) -> Table:
    rows = []
    for version in versions:
        mark = " (live)" if live is not None and version.version == live.version else ""
        change, digest = version.effect.get("relative_norm"), version.digest[:_DIGEST]
        _, rank, metric, created = _about(version)
        rows.append((f"{version.version}{mark}", rank, version.source, metric, change, created, digest))
    return Table(
        ("version", "rank", "from", "how good", "change", "made", "digest"),
        rows,
        right=("version", "rank", "change"),
        least=("digest", "change", "from", "rank"),
    )


def _before_live(session: Session, adapter: Adapter) -> int:
    if adapter.live is None:
        raise AdapterNotLive(f"{adapter.name} has no live version to go back from: say which one to make live")
    for version in session.client.versions(adapter.name):
        if version.version < adapter.live.version:
            return version.version
    raise VersionNotFound(f"{adapter.live.reference} is the first version of {adapter.name}: there is none before it")
