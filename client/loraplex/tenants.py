"""Results of the calls for administrators and operators: tenants, their limits, their usage and their audit log."""

from dataclasses import dataclass

from loraplex.frames import Tabular


@dataclass(frozen=True, slots=True, kw_only=True)
class HourlyUsage(Tabular):
    """Predictions that were answered in one hour."""

    hour: str
    """Begin of the hour."""
    requests: int
    rows: int
    adapter: str | None = None
    """Name of the adapter; None for the bare base layer. Only if the usage is split by adapter."""
    key: str | None = None
    """Id of the key; None without keys. Only if the usage is split by key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry(Tabular):
    """One change of one resource, and who made it."""

    time: str
    key_id: str | None
    """Id of the key; `cli` for a command on the data folder, `service` for the service itself, None without a key."""
    tenant: str
    action: str
    resource: str
    digest_before: str | None
    digest_after: str | None
    request_id: str | None
    client_address: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(Tabular):
    """Limits of a tenant; None for no limit."""

    requests_per_second: float | None = None
    rows_per_second: float | None = None
    concurrent_jobs: int | None = None
    queued_jobs: int | None = None
    adapters: int | None = None
    stored_bytes: int | None = None
    dataset_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant(Tabular):
    """Owner of adapters, data sets, jobs and keys."""

    name: str
    created_at: str
    limits: Limits
