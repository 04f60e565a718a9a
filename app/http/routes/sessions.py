"""Handlers of `/session`: sign in to the page with a key, and sign out."""

from typing import Any

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from adapters.access.grants import Credential
from adapters.access.rates import Rate
from adapters.access.sessions import MAX_SESSION_SECONDS
from app.http.authentication import SESSION_COOKIE, session_token
from app.http.bodies import object_of_body, read_as
from app.http.routes.keys import require_keys
from app.http.schemas.keys import SessionRequest
from app.service import ServiceOf


async def sign_in(request: Request, service: ServiceOf) -> Response:
    """Open a session with a key: the cookie of the answer counts as the key, and ends with it or after seven days."""
    require_keys(service)
    body = read_as(SessionRequest, object_of_body(await service.json.read(request)))
    grant = await run_in_threadpool(service.grants.verify, Credential(body.key.strip()))
    assert grant.caller.key_id is not None
    # The middleware counts a request by its key, and this one has it in its body.
    await service.rates.refresh_now()
    service.rates.take(grant.caller.tenant, Rate.REQUESTS)
    token = await service.writes.run(service.sessions.open, grant.caller.key_id)
    answer = Response(status_code=204, headers={"Cache-Control": "no-store"})
    _set_cookie(answer, request, token, max_age=MAX_SESSION_SECONDS)
    return answer


async def sign_out(request: Request, service: ServiceOf) -> Response:
    """End the session of the request's cookie, if it has one."""
    token = session_token(value for name, value in request.scope["headers"] if name == b"cookie")
    if token is not None:
        await service.writes.run(service.sessions.close, token)
    answer = Response(status_code=204)
    _set_cookie(answer, request, "", max_age=0)
    return answer


def _set_cookie(answer: Response, request: Request, token: str, *, max_age: int) -> None:
    # A proxy that ends TLS speaks plain HTTP to the service, and only the browser says which scheme its page has.
    is_secure = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
    strict: Any = "Strict"
    answer.set_cookie(SESSION_COOKIE, token, max_age=max_age, httponly=True, samesite=strict, secure=is_secure)
