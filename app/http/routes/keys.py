"""Handlers of `/keys`: create, list and revoke keys."""

from typing import Annotated

from fastapi import Query, Request, Response

from adapters.access.keys import Scope, parse_scopes
from adapters.errors import KeysDisabled
from app.http.authentication import CallerOf
from app.http.bodies import object_of_body, read_as
from app.http.paging import Page, read_cursor
from app.http.schemas.keys import IssuedKeyBody, KeyBody, KeyPage, KeyRequest
from app.service import Service, ServiceOf


async def create_key(request: Request, response: Response, caller: CallerOf, service: ServiceOf) -> IssuedKeyBody:
    """Create a key, and show its text, which is not stored.

    Only an operator may create a key for another tenant, or another operator's key.
    """
    require_keys(service)
    body = read_as(KeyRequest, object_of_body(await service.json.read(request)))
    scopes, tenant = parse_scopes(body.scopes), caller.tenant if body.tenant is None else body.tenant
    if tenant != caller.tenant or Scope.OPERATOR in scopes:
        caller.require(Scope.OPERATOR)
    issued = await service.writes.run(
        service.keys.create,
        tenant=tenant,
        name=body.name,
        scopes=scopes,
        expires_at=body.expires_at,
        creates_tenant=caller.is_operator,
    )
    response.headers["Cache-Control"] = "no-store"
    key = issued.key
    return IssuedKeyBody(
        id=key.id, key=issued.text, tenant=key.tenant, scopes=list(key.scopes), expires_at=key.expires_at
    )


def list_keys(query: Annotated[Page, Query()], caller: CallerOf, service: ServiceOf) -> KeyPage:
    """List the tenant's keys in the order of their ids, with those that were revoked."""
    list_key = f"keys {caller.tenant}"
    after = read_cursor(list_key, query.cursor, str) or ""
    page = service.keys.list(tenant=caller.tenant, after=after, limit=query.limit + 1)
    return query.answer(KeyPage, list_key, map(KeyBody.of, page), "id")


async def revoke_key(key_id: str, caller: CallerOf, service: ServiceOf) -> Response:
    """Revoke a key. No request that is sent after the answer succeeds with it; its sessions end too."""
    await service.writes.run(service.keys.revoke, key_id, tenant=caller.tenant, by_operator=caller.is_operator)
    return Response(status_code=204)


def require_keys(service: Service) -> None:
    """Raise `KeysDisabled` if the service needs no keys."""
    if not service.grants.has_keys:
        raise KeysDisabled("this service needs no keys: start it with LORAPLEX_AUTH=keys to use them")
