"""Commands `usage`, `audit`, `tenants show` and `tenants set`."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from loraplex.cli.errors import WrongUsage
from loraplex.cli.output import Table, pairs, when
from loraplex.cli.session import Session, argument, command, option
from loraplex.errors import TenantNotFound
from loraplex.tenants import Limits, Tenant

PANEL = "The service"
_SPLITS = {"adapter", "key"}
_NO_LIMIT = "none"
_LIMIT_PANEL = f"Limits ('{_NO_LIMIT}' removes one)"

app = typer.Typer(no_args_is_help=True, help="Tenants and their limits, for operators: show, set.")
reports_app = typer.Typer()
Name = Annotated[str, argument("NAME", "Name of the tenant.")]


@command(reports_app, "usage", panel=PANEL)
def usage(
    session: Session,
    *,
    start: Annotated[
        str | None, option("Hours that begin from then on, such as 2030-01-31T00:00:00Z.", "--from", metavar="TIME")
    ] = None,
    end: Annotated[str | None, option("Hours that begin before then.", "--to", metavar="TIME")] = None,
    by: Annotated[str | None, option("Split each hour by adapter or by key.", metavar="adapter|key")] = None,
) -> None:
    """Show how many predictions were answered in each hour, and their rows; by default, in the last 24 hours."""
    hours = list(session.client.usage(start=start, end=end, by=by))
    names = [by] if by else []
    rows = [
        (when(hour.hour), *(_name(getattr(hour, name)) for name in names), f"{hour.requests:,}", f"{hour.rows:,}")
        for hour in hours
    ]
    table = Table(("hour", *names, "requests", "rows"), rows, right=("requests", "rows"))
    # As in the API: a null says that there is no adapter or no key only if the hours are split by it.
    members = [{name: value for name, value in asdict(hour).items() if name not in _SPLITS - {by}} for hour in hours]
    session.give(members, table if hours else "No prediction was answered in this time.")


@command(reports_app, "audit", panel=PANEL)
def audit(
    session: Session,
    *,
    since: Annotated[str | None, option("Changes from then on, such as 2030-01-31T00:00:00Z.", metavar="TIME")] = None,
    actor: Annotated[str | None, option("Changes of the key with this id, or of cli or service.", metavar="ID")] = None,
    resource: Annotated[str | None, option("Changes of this resource, such as adapters/acme.", metavar="PATH")] = None,
    limit: Annotated[int, option("Maximum number of changes to list.", min=1)] = 100,
) -> None:
    """Show who changed what, newest first."""
    entries = list(session.client.audit(since=since, actor=actor, resource=resource, limit=limit))
    rows = [
        (when(entry.time), _name(entry.key_id), entry.action, entry.resource, _name(entry.client_address))
        for entry in entries
    ]
    table = Table(("time", "key", "action", "resource", "from"), rows)
    session.give(entries, table if entries else "There are none.")


@command(app, "show")
def show(session: Session, name: Name) -> None:
    """Show a tenant and its limits."""
    _give(session, session.client.tenant(name))


@dataclass(frozen=True)
class _LimitOptions:
    """Options for limits."""

    requests_per_second: Annotated[str | None, option("Predict and infer requests.", panel=_LIMIT_PANEL)] = None
    rows_per_second: Annotated[str | None, option("Rows of these requests.", panel=_LIMIT_PANEL)] = None
    concurrent_jobs: Annotated[str | None, option("Jobs that run at the same time.", panel=_LIMIT_PANEL)] = None
    queued_jobs: Annotated[str | None, option("Jobs that wait for a trainer.", panel=_LIMIT_PANEL)] = None
    adapters: Annotated[str | None, option("Adapters, without those in the trash.", panel=_LIMIT_PANEL)] = None
    stored_bytes: Annotated[str | None, option("Bytes of versions, with the trash.", panel=_LIMIT_PANEL)] = None
    dataset_bytes: Annotated[str | None, option("Bytes of data sets.", panel=_LIMIT_PANEL)] = None


@command(app, "set")
def set_limits(session: Session, name: Name, *, limits: _LimitOptions) -> None:
    """Create a tenant, or change its limits. Limits that are not given stay as they are."""
    try:
        present = session.client.tenant(name).limits
    except TenantNotFound:
        present = Limits()
    new = {limit: _number(limit, text) for limit, text in asdict(limits).items() if text is not None}
    _give(session, session.client.put_tenant(name, asdict(present) | new))


def _number(limit: str, text: str) -> int | float | None:
    if text == _NO_LIMIT:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise WrongUsage(f"--{limit.replace('_', '-')} is a number, or '{_NO_LIMIT}' for no limit.") from None


def _name(name: str | None) -> str:
    return "–" if name is None else name


def _give(session: Session, tenant: Tenant) -> None:
    limits = {limit.replace("_", " "): _shown(value) for limit, value in asdict(tenant.limits).items()}
    session.give(tenant, pairs({"tenant": tenant.name, "made": when(tenant.created_at), **limits}))


def _shown(limit: float | None) -> str:
    return "no limit" if limit is None else f"{limit:,}"
