"""Host names in their one canonical form."""

import pytest

from app.http.host_policy import host_name, listening_host, parse_allowed_hosts


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("localhost.", "localhost"),
        ("localhost:", "localhost"),
        ("api_1.example:80", "api_1.example"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("[FE80::A]", "fe80::a"),
    ],
)
def test_a_host_has_one_form(authority: str, name: str) -> None:
    assert host_name(authority) == name


@pytest.mark.parametrize(
    "authority",
    [
        *("", ".", ":80", "[::1", "::1", "[::1]x", "[zz]", "[1.2]", "[127.0.0.1]", "[::1%25eth0]"),
        *("user@localhost", "localhost:80@evil", "localhost:80:80", "localhost:x", "localhost:123456"),
        *("localhost/", "localhost\\", "local host", "localhost\n", "localhost,evil", "http://localhost", "löcalhost"),
        *("\u0661:80", "localhost:\u0661", "*", "x" * 255),
    ],
)
def test_what_is_not_a_host_has_no_form(authority: str) -> None:
    assert host_name(authority) is None


@pytest.mark.parametrize(
    ("host", "name"),
    [
        *((wildcard, None) for wildcard in ("0.0.0.0", "::", "0:0::0", "")),
        ("10.0.0.7", "10.0.0.7"),
        ("Inference.Example", "inference.example"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_an_address_to_listen_on_has_a_name_unless_it_is_a_wildcard(host: str, name: str | None) -> None:
    assert listening_host(host) == name


def test_a_list_of_hosts_is_read_without_ports_spaces_and_empty_entries() -> None:
    assert parse_allowed_hosts("") == parse_allowed_hosts(" , ") == frozenset()
    listed = "api, Loraplex.Example.com:443,[::1]:8000,fe80::0:1,10.0.0.7.,"
    assert parse_allowed_hosts(listed) == {"api", "loraplex.example.com", "::1", "fe80::1", "10.0.0.7"}
    assert parse_allowed_hosts("*") == {"*"}


@pytest.mark.parametrize("entry", ["https://a.example", "a.example/", "*.example", "a b", "bücher.example", "u@a"])
def test_an_entry_that_is_not_a_host_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a host name") as refused:
        parse_allowed_hosts(f"api,{entry}")
    assert repr(entry) in str(refused.value)
