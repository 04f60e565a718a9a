"""Which requests are refused for their host or their origin."""

import pytest

from adapters.errors import LoraplexError
from app.http.host_policy import HostPolicy, authority_of

LOCAL = HostPolicy("127.0.0.1", None)
OWN_HOST = ("host", "127.0.0.1:8000")


def code_of(
    policy: HostPolicy,
    *headers: tuple[str, str],
    method: str = "POST",
    path: str = "/predict",
    version: str = "1.1",
    target: bytes | None = None,
) -> str | None:
    """The code of the refusal, or None."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    state = {"target_authority": target} if target else {}
    scope = {"method": method, "path": path, "headers": raw, "http_version": version, "state": state}
    try:
        policy.check(scope)
    except LoraplexError as error:
        return error.code
    return None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "[::1]:8000", "LOCALHOST.:8000", "\tlocalhost "])
def test_loopback_s_names_areaccepted(host: str) -> None:
    assert code_of(LOCAL, ("host", host)) is None
    assert LOCAL.accepts(host.encode())


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "127.0.0.2", "", "a@localhost", "*", "é"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_every_other_host_is_refused(host: str, method: str) -> None:
    assert code_of(LOCAL, ("host", host), method=method) == "host_not_allowed"
    assert not LOCAL.accepts(host.encode("latin-1"))


def test_one_host_is_needed_except_by_http_1_0() -> None:
    assert code_of(LOCAL) == "host_not_allowed"
    assert code_of(LOCAL, version="1.0") is None
    assert not LOCAL.accepts(None)
    assert code_of(LOCAL, OWN_HOST, OWN_HOST) == "host_not_allowed"
    assert code_of(LOCAL, ("host", "evil.example"), version="1.0") == "host_not_allowed"


@pytest.mark.parametrize(
    ("target", "authority"),
    [
        (b"/predict", None),
        (b"*", None),
        (b"http://evil.example/predict", b"evil.example"),
        (b"http://evil.example:80?a=/b", b"evil.example:80"),
        (b"http://a@localhost#/", b"a@localhost"),
    ],
)
def test_a_target_in_absolute_form_has_a_host(target: bytes, authority: bytes | None) -> None:
    assert authority_of(target) == authority


def test_the_host_of_the_target_counts_too() -> None:
    assert code_of(LOCAL, OWN_HOST, target=b"evil.example") == "host_not_allowed"
    assert code_of(LOCAL, ("host", "evil.example"), target=b"127.0.0.1") == "host_not_allowed"
    assert code_of(LOCAL, OWN_HOST, target=b"127.0.0.1") is None
    assert code_of(LOCAL, version="1.0", target=b"evil.example") == "host_not_allowed"


def test_the_settings_add_hosts() -> None:
    policy = HostPolicy("10.0.0.7", "api,loraplex.example.com")
    for host in ("localhost", "10.0.0.7:8000", "api:8000", "Loraplex.Example.com"):
        assert code_of(policy, ("host", host)) is None
    assert code_of(policy, ("host", "10.0.0.8")) == "host_not_allowed"
    assert code_of(HostPolicy("0.0.0.0", None), ("host", "0.0.0.0:8000")) == "host_not_allowed"


def test_a_star_allows_any_host_and_no_other_origin() -> None:
    policy = HostPolicy("0.0.0.0", "api,*")
    assert policy.accepts(b"evil.example")
    assert code_of(policy, ("host", "evil.example")) is None
    assert code_of(policy, ("host", "evil.example"), target=b"other.example") is None
    assert code_of(policy, ("host", "own.example"), ("origin", "http://evil.example")) == "cross_site"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_health_is_shown_to_every_host(path: str) -> None:
    assert code_of(LOCAL, ("host", "10.1.2.3:8000"), method="GET", path=path) is None
    assert code_of(LOCAL, ("host", "10.1.2.3:8000"), method="POST", path=path) == "host_not_allowed"
    assert code_of(LOCAL, ("host", "10.1.2.3:8000"), method="GET", path=f"/adapters{path}") == "host_not_allowed"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("origin", "http://evil.example"),
        ("origin", "http://localhost:8000"),
        ("origin", "null"),
        ("origin", ""),
        ("origin", "127.0.0.1:8000"),
        ("origin", "http://127.0.0.1:8000/"),
        ("origin", "http://127.0.0.1:8000 http://evil.example"),
        ("origin", "http://127.0.0.1@evil.example"),
        ("origin", "file://"),
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", " Cross-Site"),
    ],
)
def test_a_page_of_another_host_may_only_read(header: str, value: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        assert code_of(LOCAL, OWN_HOST, (header, value), method=method) == "cross_site"
    for method in ("GET", "HEAD"):
        assert code_of(LOCAL, OWN_HOST, (header, value), method=method) is None


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("origin", "http://127.0.0.1:8000"),
        ("origin", "https://127.0.0.1"),  # behind a proxy that ends TLS
        ("origin", "http://127.0.0.1:3000"),
        *(("sec-fetch-site", site) for site in ("same-origin", "same-site", "none")),
    ],
)
def test_the_service_s_own_page_may_do_everything(header: str, value: str) -> None:
    assert code_of(LOCAL, OWN_HOST, (header, value)) is None


def test_every_origin_and_every_host_of_a_request_counts() -> None:
    own, other = ("origin", "http://127.0.0.1:8000"), ("origin", "http://evil.example")
    assert code_of(LOCAL, OWN_HOST, own, other) == "cross_site"
    assert code_of(LOCAL, OWN_HOST, ("sec-fetch-site", "none"), ("sec-fetch-site", "cross-site")) == "cross_site"
    assert code_of(LOCAL, own, version="1.0") == "cross_site"
    assert code_of(LOCAL, OWN_HOST, own, target=b"localhost") == "cross_site"


def test_the_hosts_that_are_remembered_are_bounded() -> None:
    policy = HostPolicy("127.0.0.1", None)
    for port in range(3000):
        assert policy.accepts(b"localhost:%d" % port)
    assert policy.accepts(b"localhost" + b" " * 1000)
    assert len(policy.accepted) <= 1024
    assert not any(host is not None and len(host) > 300 for host in policy.accepted)
