"""The two clients have one face."""

import inspect
from typing import Any

import loraplex
import pytest
from loraplex import AsyncClient, AsyncJob, Client, InvalidInput, Job


def is_property(member: object) -> bool:
    return isinstance(member, property)


def face(kind: type[Any]) -> dict[str, tuple[list[tuple[str, Any, Any]], str]]:
    """Name → (parameters, docstring) of everything public."""
    found = {}
    for name, member in inspect.getmembers(kind, lambda member: inspect.isfunction(member) or is_property(member)):
        if not name.startswith("_"):
            parameters = [] if is_property(member) else inspect.signature(member).parameters.values()
            found[name] = ([(each.name, each.default, each.kind) for each in parameters], str(member.__doc__))
    return found


@pytest.mark.parametrize(("blocking", "other"), [(Client, AsyncClient), (Job, AsyncJob)])
def test_both_have_the_same_names_and_arguments(blocking: type[Any], other: type[Any]) -> None:
    expected = {name: (of, doc.replace("`Job.", "`AsyncJob.")) for name, (of, doc) in face(blocking).items()}
    assert face(other) == expected
    assert len(expected) >= 6


def test_what_waits_is_awaited() -> None:
    for name in face(Client):
        member = getattr(AsyncClient, name)
        if isinstance(member, property):
            assert not inspect.iscoroutinefunction(member.fget)
            continue
        lists = str(inspect.signature(member).return_annotation)
        # `make_base` calls no service.
        assert (
            inspect.iscoroutinefunction(member)
            or "AsyncIterator" in lists
            or "AsyncListing" in lists
            or name == "make_base"
        )


def test_everything_public_is_described() -> None:
    for name in loraplex.__all__:
        assert getattr(loraplex, name).__doc__


def test_the_address_comes_from_the_environment_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPLEX_URL", raising=False)
    with Client() as client:
        assert client.url == "http://127.0.0.1:8000"
    monkeypatch.setenv("LORAPLEX_URL", "https://lora.example/api/")
    with Client() as client:
        assert client.url == "https://lora.example/api"
    with Client("http://other:1") as client:
        assert client.url == "http://other:1"


@pytest.mark.parametrize(
    "arguments",
    [{"url": "localhost:8000"}, {"url": "ftp://x"}, {"url": "http://"}, {"timeout": 0}, {"retries": -1}],
    ids=str,
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_that_could_not_work_is_not_made(kind: type[Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        kind(**arguments)
