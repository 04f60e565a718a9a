"""Handlers of `/tenants`: show a tenant, create it and set its limits."""

from fastapi import Request, Response

from adapters.access.tenants import Limits, check_tenant
from app.http.bodies import object_of_body, read_as
from app.http.schemas.tenants import TenantBody, TenantRequest
from app.service import ServiceOf


def show_tenant(name: str, service: ServiceOf) -> TenantBody:
    """Show a tenant and its limits."""
    return TenantBody.of(service.tenants.get(check_tenant(name)))


async def put_tenant(name: str, request: Request, response: Response, service: ServiceOf) -> TenantBody:
    """Create a tenant (201), or replace its limits (200). A limit that is left out, or null, does not apply."""
    check_tenant(name)
    body = read_as(TenantRequest, object_of_body(await service.json.read(request)))
    limits = Limits(**body.limits.model_dump())
    tenant, is_new = await service.writes.run(service.tenants.put, name, limits)
    response.status_code = 201 if is_new else 200
    return TenantBody.of(tenant)
