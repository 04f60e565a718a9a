"""A client with a key: the argument, the environment, and that it is shown nowhere."""

import traceback

import pytest
from loraplex import errors

from adapters.access.keys import Scope
from app.settings import Auth
from tests.conftest import Serve
from tests.integration.client.conftest import Connect
from tests.support.keys import make_key


def test_a_client_sends_the_key_that_it_is_given_or_that_of_the_environment(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, service = serve(auth=Auth.KEYS)
    url = str(http.base_url)
    reads, predicts = (make_key(service.keys, "acme", scope).text for scope in (Scope.READ, Scope.PREDICT))
    assert connect(url, key=reads).base().in_features == 10
    monkeypatch.setenv("LORAPLEX_KEY", predicts)
    assert connect(url).predict(None, [[0.0] * 10]).outputs.shape == (1, 2)
    # What is said goes before the environment.
    assert connect(url, key=reads).base().in_features == 10
    assert connect(url, headers={"authorization": f"Bearer {reads}"}).base().in_features == 10
    with pytest.raises(errors.Forbidden, match="scope read") as forbidden:
        connect(url).base()
    assert forbidden.value.status == 403
    monkeypatch.delenv("LORAPLEX_KEY")
    with pytest.raises(errors.Unauthenticated) as missing:
        connect(url).base()
    assert (missing.value.status, missing.value.code) == (401, "unauthenticated")


def test_a_key_is_in_no_repr_and_in_no_error(serve: Serve, connect: Connect) -> None:
    http, service = serve(auth=Auth.KEYS)
    issued = make_key(service.keys, "acme", Scope.PREDICT)
    client = connect(str(http.base_url), key=issued.text)
    shown = [repr(client), repr(vars(client)), repr(vars(vars(client).get("_connection", client)))]
    service.keys.revoke(issued.key.id, tenant=None, by_operator=True)
    for key in (issued.text, issued.text[:-1]):
        with pytest.raises(errors.Unauthenticated) as caught:
            connect(str(http.base_url), key=key).base()
        shown += [*traceback.format_exception(caught.value), repr(caught.value), repr(vars(caught.value))]
    with pytest.raises(errors.InvalidInput) as unsendable:
        connect(str(http.base_url), key=f"{issued.text}\nx")
    shown += [str(unsendable.value), repr(vars(unsendable.value))]
    secret = issued.text.split("_")[2][:40]
    assert not [text for text in shown if secret in text]
