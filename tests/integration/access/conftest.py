"""A service that requires keys, and keys of every kind."""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import httpx
import pytest

from adapters.access.keys import IssuedKey, Keys, Scope
from adapters.access.tenants import DEFAULT_TENANT
from app.service import Service
from app.settings import Auth, Settings
from tests.conftest import NewFolder
from tests.support.keys import ALL_OF_A_TENANT, bearer, checksum, make_key
from tests.support.service import serving

I = 4
TENANT, OTHER = "acme", "globex"


class World(NamedTuple):
    """A worker, and the headers of requests with each kind of key."""

    client: httpx.Client
    service: Service
    refused: Mapping[str, Mapping[str, str]]
    """Those that are 401 everywhere."""
    scoped: Mapping[Scope, IssuedKey]
    """Keys of one tenant with one scope each."""
    other: IssuedKey
    """A key of another tenant, with every scope that a tenant's key can have."""
    operator: IssuedKey


@pytest.fixture(scope="package")
def world(new_folder: NewFolder) -> Iterator[World]:
    """A worker that requires keys."""
    settings = Settings(data_dir=new_folder("keys"), base=f"random:{I},2,3", auth=Auth.KEYS)
    with serving(settings) as (client, service):
        keys = service.keys
        # A clock of yesterday makes a key that has expired since.
        yesterday = Keys(service.catalog.database, now=lambda: time.time() - 86_400)
        hour_ago = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600))
        expired = make_key(yesterday, TENANT, *ALL_OF_A_TENANT, expires_at=hour_ago)
        revoked, unknown = (make_key(keys, TENANT, *ALL_OF_A_TENANT) for _ in range(2))
        keys.revoke(revoked.key.id, tenant=None, by_operator=True)
        # Well-formed, with a checksum that fits, and of an id that does not exist.
        elsewhere = make_key(Keys(service.catalog.database, now=time.time), TENANT, Scope.READ)
        refused = {
            "none": {},
            "another scheme": {"Authorization": "Basic bHB4Og=="},
            "malformed": bearer("lpx_nonsense"),
            "mistyped": bearer(unknown.text[:-1] + ("a" if unknown.text[-1] != "a" else "b")),
            "unknown": bearer(_with_other_id(elsewhere.text)),
            "another secret": bearer(_with_other_id(elsewhere.text, key_id=unknown.key.id)),
            "revoked": bearer(revoked),
            "expired": bearer(expired),
            "a session that never was": {"Cookie": "loraplex_session=nonsense"},
        }
        yield World(
            client,
            service,
            refused,
            {scope: make_key(keys, TENANT, scope) for scope in ALL_OF_A_TENANT},
            make_key(keys, OTHER, *ALL_OF_A_TENANT),
            make_key(keys, DEFAULT_TENANT, Scope.OPERATOR),
        )


def _with_other_id(text: str, key_id: str = "0123456789abcdef") -> str:
    """The text of a key with another id, and the checksum that fits."""
    prefix, _, rest = text.split("_")
    body = f"{prefix}_{key_id}_{rest[:43]}"
    return body + checksum(body)
