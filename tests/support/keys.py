"""Keys for the tests of a service that requires them."""

import string
import zlib
from collections.abc import Mapping

import httpx

from adapters.access.keys import IssuedKey, Keys, Scope

ALL_OF_A_TENANT = [scope for scope in Scope if scope is not Scope.OPERATOR]


def make_key(keys: Keys, tenant: str, *scopes: Scope, expires_at: str | None = None) -> IssuedKey:
    """A new key of a tenant, which is made if it is missing."""
    return keys.create(tenant=tenant, name="a test", scopes=scopes, expires_at=expires_at, creates_tenant=True)


def bearer(key: IssuedKey | str) -> Mapping[str, str]:
    """The header of a request with this key."""
    return {"Authorization": f"Bearer {key if isinstance(key, str) else key.text}"}


def checksum(body: str) -> str:
    """The last six characters of a key: the CRC-32 of the rest in base 62, with digits before capitals."""
    digits, number, text = (
        string.digits + string.ascii_uppercase + string.ascii_lowercase,
        zlib.crc32(body.encode()),
        "",
    )
    for _ in range(6):
        number, digit = divmod(number, 62)
        text = digits[digit] + text
    return text


def told(answer: httpx.Response) -> tuple[int, list[tuple[str, str]], bytes]:
    """All of an answer that does not vary from one request to the next."""
    varying = {"date", "server-timing", "x-request-id"}
    headers = sorted((name, value) for name, value in answer.headers.multi_items() if name not in varying)
    return answer.status_code, headers, answer.content
