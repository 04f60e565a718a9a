"""The document, and a service that it is held against."""

from collections.abc import Iterator

import pytest

from adapters.access.keys import Scope
from adapters.access.tenants import DEFAULT_TENANT
from app.settings import Auth, Settings
from tests.integration.openapi.example_calls import World, furnish
from tests.support.service import serving


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A service with the bundled base layer, on which every call of the document works."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("openapi") / "data", auth=Auth.KEYS, replica_name="east-1")
    with serving(settings, trainer=True) as (client, service):
        operator = service.keys.create(tenant=DEFAULT_TENANT, name="tests", scopes=[Scope.OPERATOR])
        yield furnish(client, operator.text)
