"""Calls of the client for administrators and operators: usage, the audit log, and tenants with their limits."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime

from loraplex import decode
from loraplex._async.connection import AsyncConnection
from loraplex.calls import Call, given, path, time_text
from loraplex.frames import AsyncListing
from loraplex.tenants import AuditEntry, HourlyUsage, Limits, Tenant


class AsyncAdministration:
    """The part of a client that needs a key with the scope `admin` or `operator`."""

    _connection: AsyncConnection

    def usage(
        self,
        *,
        start: str | datetime | None = None,
        end: str | datetime | None = None,
        by: str | None = None,
        limit: int | None = None,
    ) -> AsyncListing[HourlyUsage]:
        """Iterate over the hours of the tenant's usage, oldest first: the predictions that were answered.

        The hours begin from `start` on (by default, 24 hours ago) and before `end`; both are RFC 3339 or a datetime
        with its time zone. `by` splits each hour: `adapter` or `key`.
        """
        query = {"from": time_text(start, field="start"), "to": time_text(end, field="end"), "by": by}
        return self._connection.pages("/usage", decode.hourly_usage, query, limit=limit)

    def audit(
        self,
        *,
        since: str | datetime | None = None,
        actor: str | None = None,
        resource: str | None = None,
        limit: int | None = None,
    ) -> AsyncListing[AuditEntry]:
        """Iterate over the changes of the tenant's data, newest first.

        `since` is RFC 3339 or a datetime with its time zone. `actor` is the id of a key, `cli` or `service`, and
        `resource` a path such as `adapters/acme`.
        """
        query = {"since": time_text(since, field="since"), "actor": actor, "resource": resource}
        return self._connection.pages("/audit", decode.audit_entry, query, limit=limit)

    async def tenant(self, name: str) -> Tenant:
        """Return a tenant and its limits. Only an operator may."""
        return await self._connection.get(path("tenants", name), decode.tenant)

    async def put_tenant(self, name: str, limits: Limits | Mapping[str, float | None] | None = None) -> Tenant:
        """Create a tenant, or replace all of its limits. Only an operator may."""
        members = asdict(limits) if isinstance(limits, Limits) else limits or {}
        call = Call("PUT", path("tenants", name), json={"limits": given(members)})
        return await self._connection.fetch(call, decode.tenant)
