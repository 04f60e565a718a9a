"""Commands `serve`, `trainer` and `keys`, which the client's command line loads as plugins."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.child_process import stop_on_signals
from adapters.errors import LoraplexError
from app.observability import logs
from app.processes.store_guard import guarded_store, opened_database
from app.settings import description_of, exit_if_unusable, load_settings

if TYPE_CHECKING:
    from adapters.access.keys import Key, Keys

# Exit status of a command that was refused.
_REFUSED = 1


def _option(name: str) -> Any:
    return typer.Option(help=description_of(name))


Base = Annotated[str | None, _option("base")]
DataDir = Annotated[Path | None, _option("data_dir")]
AcceptCatalog = Annotated[
    bool,
    typer.Option(
        "--accept-catalog",
        help="Start although the catalogue and the blobs do not belong together: take the catalogue as it is, make it "
        "if it is missing, and move the blobs that it does not refer to into quarantine.",
    ),
]


def serve(
    base: Base = None,
    data_dir: DataDir = None,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    workers: Annotated[int | None, _option("workers")] = None,
    trainers: Annotated[int | None, _option("trainers")] = None,
    tls_cert: Annotated[Path | None, _option("tls_cert")] = None,
    tls_key: Annotated[Path | None, _option("tls_key")] = None,
    accept_catalog: AcceptCatalog = False,
) -> None:
    """Answer requests and train, until SIGTERM. Every other setting is an environment variable."""
    from app.processes.supervisor import serve as run  # imported late, because `loraplex --help` loads this module

    options = {"base": base, "data_dir": data_dir, "host": host, "port": port, "workers": workers, "trainers": trainers}
    options |= {"tls_cert": tls_cert, "tls_key": tls_key}
    with exit_if_unusable():
        settings = load_settings(options)
        logs.configure(settings.log_format, process="supervisor")
        with guarded_store(settings, accept_catalog=accept_catalog):
            status = run(settings)
    sys.exit(status)


def trainer(base: Base = None, data_dir: DataDir = None, accept_catalog: AcceptCatalog = False) -> None:
    """Only train, until SIGTERM: for a service that runs `serve --trainers 0` on the same data folder."""
    with exit_if_unusable():
        settings = load_settings({"base": base, "data_dir": data_dir})
        logs.configure(settings.log_format, process="trainer")
        with guarded_store(settings, accept_catalog=accept_catalog):
            # Imported late, because it loads torch, and a start that is refused need not wait for it.
            from app.processes.trainer import run_trainer

            run_trainer(settings, stop_on_signals())


keys = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Create, list and revoke keys, in the data folder itself."
)


@keys.command("create")
def create_key(
    scope: Annotated[
        list[str],
        typer.Option(
            *("--scope", "--scopes"),
            help="What the key may do: predict, read, metrics, write, train, admin or operator. Several: repeat it.",
        ),
    ],
    tenant: Annotated[str, typer.Option(help="Tenant of the key, which is created if it is missing.")] = "default",
    name: Annotated[str, typer.Option(help="What the key is for.")] = "made on the command line",
    expires_at: Annotated[
        str | None, typer.Option(help="Time after which it is refused, such as 2030-01-31T12:00:00Z.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Create a key, and print its text, which is shown only this once."""
    scopes = [part for text in scope for part in text.split(",")]
    with _open_keys(data_dir) as opened:
        issued = opened.create(tenant=tenant, name=name, scopes=scopes, expires_at=expires_at, creates_tenant=True)
    key = issued.key
    _print({"id": key.id, "key": issued.text, "tenant": key.tenant, "scopes": key.scopes, "expires_at": key.expires_at})


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only the keys of this tenant.")] = None, data_dir: DataDir = None
) -> None:
    """List keys, also those that were revoked, without their texts."""
    with _open_keys(data_dir) as opened:
        found: list[Key] = []
        while page := opened.list(tenant=tenant, after=found[-1].id if found else ""):
            found += page
    _print(list(map(_key_as_json, found)))


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, which is the part after lpx_.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke a key. No request that is sent afterwards succeeds with it."""
    with _open_keys(data_dir) as opened:
        key = opened.revoke(key_id, tenant=None, by_operator=True)
    _print(_key_as_json(key))


@contextmanager
def _open_keys(data_dir: Path | None) -> Iterator["Keys"]:
    """Open the keys in the data folder; report a refusal, and exit."""
    # Imported late, because `loraplex --help` loads this module.
    from adapters.access.audit import COMMAND_LINE, acting_as
    from adapters.access.keys import Keys

    try:
        with (
            exit_if_unusable(),
            opened_database(load_settings({"data_dir": data_dir})) as database,
            acting_as(COMMAND_LINE),
        ):
            yield Keys(database, now=time.time)
    except LoraplexError as error:
        expected = f" (expected {error.expected})" if error.expected else ""
        print(f"loraplex: {error.detail}{expected}", file=sys.stderr)
        raise typer.Exit(_REFUSED) from None


def _key_as_json(key: "Key") -> dict[str, Any]:
    return {name: getattr(key, name) for name in key.__dataclass_fields__}


def _print(value: object) -> None:
    print(json.dumps(value, indent=2))
