"""Usage and tenants through the client, and the tenant that an operator selects."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from loraplex import Limits, errors, to_pandas

from adapters.access.keys import Scope
from adapters.access.tenants import DEFAULT_TENANT
from app.settings import Auth
from tests.conftest import Serve
from tests.integration.client.conftest import Connect
from tests.support.keys import make_key

ROWS = [[0.0] * 10] * 3


def test_an_operator_makes_a_tenant_and_acts_for_it(serve: Serve, connect: Connect) -> None:
    http, service = serve(auth=Auth.KEYS)
    url, operator = str(http.base_url), make_key(service.keys, DEFAULT_TENANT, Scope.OPERATOR)
    client = connect(url, key=operator.text)
    with pytest.raises(errors.TenantNotFound):
        client.tenant("acme")
    made = client.put_tenant("acme", Limits(adapters=5, requests_per_second=0.5))
    assert (made.name, made.limits) == ("acme", Limits(adapters=5, requests_per_second=0.5))
    # All limits are replaced.
    assert client.put_tenant("acme", {"queued_jobs": 3}).limits == Limits(queued_jobs=3)
    assert client.tenant("acme").limits.queued_jobs == 3
    of_acme = connect(url, key=operator.text, tenant="acme")
    of_acme.upload("shared", A=[[1.0], [1.0]], B=[[1.0] * 10])
    assert [adapter.name for adapter in of_acme.adapters()] == ["shared"]
    assert list(client.adapters()) == []
    with pytest.raises(errors.TenantNotFound):
        connect(url, key=operator.text, tenant="nobody").base()
    own = make_key(service.keys, "acme", Scope.READ).text
    assert connect(url, key=own, tenant="acme").base().in_features == 10
    for call in (connect(url, key=own, tenant="globex").base, lambda: connect(url, key=own).tenant("acme")):
        with pytest.raises(errors.Forbidden):
            call()


def test_usage_is_what_the_client_has_sent(serve: Serve, connect: Connect) -> None:
    http, service = serve(auth=Auth.KEYS)
    key = make_key(service.keys, "acme", Scope.PREDICT, Scope.ADMIN)
    client = connect(str(http.base_url), key=key.text)
    for _ in range(2):
        client.predict(None, ROWS)
    service.observer.close()

    def sums(**query: Any) -> tuple[int, int]:
        hours = list(client.usage(**query))
        return sum(hour.requests for hour in hours), sum(hour.rows for hour in hours)

    now = datetime.now(UTC)
    assert sums() == sums(by="adapter") == sums(start=now - timedelta(hours=3), end=now.isoformat()) == (2, 6)
    assert sums(end=now - timedelta(days=1)) == sums(start=now + timedelta(hours=3)) == (0, 0)
    assert {hour.key for hour in client.usage(by="key")} == {key.key.id}
    assert {(hour.adapter, hour.key) for hour in client.usage(by="adapter")} == {(None, None)}
    assert to_pandas(client.usage(by="key"))["hour"].dt.minute.tolist() == [0] * len(list(client.usage()))
    assert len(list(client.usage(limit=0))) == 0
    with pytest.raises(errors.InvalidInput, match="no time zone"):
        client.usage(start=datetime(2030, 1, 1))  # noqa: DTZ001 - the point of the test


def test_the_audit_log_has_what_the_client_has_changed(serve: Serve, connect: Connect) -> None:
    http, service = serve(auth=Auth.KEYS)
    key = make_key(service.keys, "acme", Scope.WRITE, Scope.ADMIN)
    client, began = connect(str(http.base_url), key=key.text), datetime.now(UTC)
    version = client.upload("a", A=[[1.0], [1.0]], B=[[1.0] * 10])
    client.delete("a")
    deleted, published = client.audit(since=began)
    assert (deleted.action, deleted.digest_before, deleted.digest_after) == ("adapter.delete", version.digest, None)
    assert (published.action, published.key_id, published.tenant) == ("adapter.publish", key.key.id, "acme")
    assert [entry.action for entry in client.audit(limit=1)] == ["adapter.delete"]
    assert list(client.audit(actor=key.key.id, resource="adapters/a")) == [deleted, published]
    assert list(client.audit(resource="adapters/b")) == list(client.audit(since=began + timedelta(days=1))) == []
