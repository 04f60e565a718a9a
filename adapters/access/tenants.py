"""Tenants: the owners of adapters, data sets and jobs, the syntax of their names, and their limits."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.audit import Action, Change, record
from adapters.clock import rfc3339
from adapters.errors import InvalidName, TenantNotFound
from adapters.storage.database import Database
from adapters.storage.schema import catalog, tenants

# Tenant of a caller that names none. It always exists, and has everything that older releases stored.
DEFAULT_TENANT = "default"
TENANT_RULE = "1 to 63 characters of a-z 0-9 -, the first a letter or digit"
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one tenant; None for no limit. `rates` and `quotas` enforce them."""

    requests_per_second: float | None = None
    """Requests of any kind, except those that need the scope `operator`."""
    rows_per_second: float | None = None
    """Rows of predict and infer requests."""
    concurrent_jobs: int | None = None
    """Jobs that run at the same time."""
    queued_jobs: int | None = None
    """Jobs that wait for a trainer."""
    adapters: int | None = None
    """Adapters, without those in the trash."""
    stored_bytes: int | None = None
    """Bytes of versions, with those in the trash."""
    dataset_bytes: int | None = None
    """Bytes of the versions of data sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Owner of adapters, data sets, jobs and keys."""

    name: str
    created_at: str
    limits: Limits = field(default_factory=Limits)


class Tenants:
    """Tenants of one catalogue. Safe to use from any thread and from several processes."""

    def __init__(self, database: Database, *, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def get(self, name: str) -> Tenant:
        """Return a tenant; raise `TenantNotFound`."""
        with self._database.read() as connection:
            return get_tenant(connection, name)

    def put(self, name: str, limits: Limits) -> tuple[Tenant, bool]:
        """Create a tenant, or replace the limits of one; return it and whether it is new. Raises `InvalidName`."""
        with self._database.write() as connection:
            is_new = not tenant_exists(connection, name)
            if is_new:
                make_tenant(connection, name, created_at=rfc3339(self._now()))
            elif get_tenant(connection, name).limits == limits:
                return get_tenant(connection, name), False
            values = {"limits": {limit: value for limit, value in asdict(limits).items() if value is not None}}
            connection.execute(sa.update(tenants).where(tenants.c.name == name).values(values))
            increment_access_revision(connection)
            if not is_new:
                record(connection, [Change(Action.TENANT_UPDATE, f"tenants/{name}")], tenant=name)
            return get_tenant(connection, name), is_new


def increment_access_revision(connection: Connection) -> None:
    """Increment the access revision, so that every process reads again what it has cached of keys and limits."""
    connection.execute(sa.update(catalog).values(access_revision=catalog.c.access_revision + 1))


def check_tenant(name: str, *, field: str = "name") -> str:
    """Return the name of a tenant if it is valid; raise `InvalidName` if not."""
    if not _TENANT.fullmatch(name):
        raise InvalidName(f"{field} must be {TENANT_RULE}", field=field, given=name, expected=TENANT_RULE)
    return name


def tenant_exists(connection: Connection, name: str) -> bool:
    """Return whether there is a tenant of this name."""
    statement = sa.select(tenants.c.name).where(tenants.c.name == name)
    return _TENANT.fullmatch(name) is not None and connection.execute(statement).one_or_none() is not None


def require_tenant(connection: Connection, name: str, *, field: str = "tenant") -> None:
    """Raise `TenantNotFound` if there is no tenant of this name."""
    if not tenant_exists(connection, name):
        raise TenantNotFound(f"there is no tenant {name!r}", field=field, given=name)


def get_tenant(connection: Connection, name: str, *, field: str = "name") -> Tenant:
    """Return a tenant, in a transaction that may use its limits; raise `TenantNotFound`."""
    row = connection.execute(sa.select(tenants).where(tenants.c.name == name)).one_or_none()
    if row is None:
        raise TenantNotFound(f"there is no tenant {name!r}", field=field, given=name)
    return Tenant(name=row.name, created_at=row.created_at, limits=Limits(**row.limits))


def make_tenant(connection: Connection, name: str, *, created_at: str) -> None:
    """Create a tenant without limits, unless there is one of this name; raise `InvalidName`."""
    if not tenant_exists(connection, check_tenant(name, field="tenant")):
        connection.execute(sa.insert(tenants).values(name=name, created_at=created_at, limits={}))
        record(connection, [Change(Action.TENANT_CREATE, f"tenants/{name}")], tenant=name)
