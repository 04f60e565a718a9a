"""Authentication: the caller of a request, from its key or its session, and the tenant that it selects."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import cookie_parser
from starlette.types import Scope as AsgiScope

from adapters.access.grants import OPEN_GRANT, OPERATOR, Caller, Credential, Grant, Grants
from adapters.access.keys import Scope
from adapters.access.tenants import DEFAULT_TENANT, require_tenant
from adapters.errors import CatalogBusy, Forbidden, InvalidCombination, Unauthenticated
from adapters.storage.database import CatalogWatch, Database

SESSION_COOKIE = "loraplex_session"
TENANT_HEADER = "X-Tenant"
_TENANT = TENANT_HEADER.lower().encode()
_EXPECTED = "Authorization: Bearer <key>"
_LONGEST_LOCK_SECONDS = 5.0
_LOCK_RETRY_SECONDS = 0.001


class Authenticator:
    """Reads and verifies the keys and sessions of requests. One per worker, for the event loop only."""

    def __init__(self, grants: Grants, database: Database, watch: CatalogWatch) -> None:
        self._grants = grants
        self._database = database
        self._watch = watch
        # Tenants are never removed.
        self._tenants = {DEFAULT_TENANT}

    async def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Grant:
        """Return the grant of a request; raise `Unauthenticated`, or `Forbidden` or `TenantNotFound` for its tenant."""
        named: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            named.setdefault(name, []).append(value)
        grant = await self._grant(named) if self._grants.has_keys else OPEN_GRANT
        tenants = named.get(_TENANT)
        return grant if tenants is None else await self._select(grant, tenants)

    async def _grant(self, named: Mapping[bytes, list[bytes]]) -> Grant:
        """Return the grant of the header `Authorization`, or of the session if there is none."""
        values = named.get(b"authorization", [])
        if len(values) > 1:
            raise Unauthenticated("the request has several Authorization headers", expected=_EXPECTED)
        if not values:
            token = session_token(named.get(b"cookie", []))
            if token is None:
                raise Unauthenticated("the request has no key", expected=_EXPECTED)
            return await run_in_threadpool(self._grants.verify, Credential(token, is_session=True))
        await self._read_revision()
        grant = self._grants.of_header(values[0])
        if grant is None or not self._grants.is_current(grant):
            grant = await run_in_threadpool(self._grants.verify, _bearer(values[0]))
            self._grants.remember(values[0], grant)
        return grant

    async def while_granted(self, grant: Grant, parts: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        """Yield the parts of a long answer until the key of its request is revoked or expires."""
        async with aclosing(parts):
            async for part in parts:
                try:
                    grant = await self.renew(grant)
                except Unauthenticated:
                    return
                yield part

    async def renew(self, grant: Grant) -> Grant:
        """Return a grant that holds now, of the same key; raise `Unauthenticated` if it may not be used any more."""
        if grant.revision is None:
            return grant
        if not grant.credential.is_session:
            await self._read_revision()
            if self._grants.is_current(grant) and grant.ends > time.time():
                return grant
        renewed = await run_in_threadpool(self._grants.verify, grant.credential)
        return renewed._replace(caller=grant.caller)  # with the tenant that `X-Tenant` selects

    async def _read_revision(self) -> None:
        """Read the revision after every commit that was acknowledged before this call; raise `CatalogBusy`."""
        give_up = time.monotonic() + _LONGEST_LOCK_SECONDS
        while True:
            try:
                reading = self._watch.begin_read()
                if reading is None:
                    self._watch.revision()
                else:
                    # Others may wait for it too, and must not be cancelled with this request.
                    await asyncio.shield(reading)
                return
            except CatalogBusy:
                if time.monotonic() >= give_up:
                    raise
            await asyncio.sleep(_LOCK_RETRY_SECONDS)

    async def _select(self, grant: Grant, tenants: list[bytes]) -> Grant:
        """Return the grant for the tenant in the header `X-Tenant`; raise `Forbidden` or `TenantNotFound`."""
        if len(tenants) > 1:
            detail = f"the request has several {TENANT_HEADER} headers"
            raise InvalidCombination(detail, field=TENANT_HEADER, expected="one of it")
        tenant, caller = tenants[0].decode("latin-1"), grant.caller
        if tenant == caller.tenant:
            return grant
        if not caller.is_operator:
            detail = f"the key {caller.key_id} is of another tenant, and does not have the scope {Scope.OPERATOR}"
            raise Forbidden(detail, field=TENANT_HEADER, expected="no header, or the key's own tenant")
        if tenant not in self._tenants:
            await run_in_threadpool(self._require_tenant, tenant)
            self._tenants.add(tenant)
        return grant._replace(caller=replace(caller, tenant=tenant))

    def _require_tenant(self, tenant: str) -> None:
        with self._database.read() as connection:
            require_tenant(connection, tenant, field=TENANT_HEADER)


def session_token(cookies: Iterable[bytes]) -> str | None:
    """Return the token of a session among the `Cookie` headers of a request; None if there is none."""
    tokens = (cookie_parser(value.decode("latin-1")).get(SESSION_COOKIE) for value in cookies)
    return next(filter(None, tokens), None)


def _bearer(header: bytes) -> Credential:
    """Return the key in a header `Authorization`; raise `Unauthenticated` if it has another scheme."""
    scheme, _, text = header.decode("latin-1").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the Authorization header does not have the scheme Bearer", expected=_EXPECTED)
    return Credential(text.strip(" "))


def caller_of(scope: AsgiScope) -> Caller:
    """Return the caller of a request, which the middleware has put into the state of its scope."""
    return cast(Caller, scope["state"]["grant"].caller)


def _caller(request: Request) -> Caller:
    return caller_of(request.scope)


# The caller as a parameter of a handler.
CallerOf = Annotated[Caller, Depends(_caller)]

__all__ = ["OPERATOR", "Authenticator", "Caller", "CallerOf", "caller_of"]
