"""Host policy: which requests are refused because a web page elsewhere may have sent them.

A page can give its own name the service's address (DNS rebinding), and then it reads and writes as the service's own
page does. Its requests carry its name in `Host`, so a name that is not the service's is refused. A page can also send
requests to the service's own name without reading the answers. Those carry another host in `Origin`, or say that they
are cross-site, and are refused if they could change or compute something.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from adapters.errors import LoraplexError, shorten

ALWAYS_ALLOWED = frozenset({"localhost", "127.0.0.1", "::1"})
# Entry of the setting `ALLOWED_HOSTS` that allows every host.
ANY_HOST = "*"
# Methods that neither change nor compute anything here.
SAFE_METHODS = frozenset({"GET", "HEAD"})
_HEALTH_PATHS = frozenset({"/healthz", "/readyz"})
HEALTH_PREFIX = "/v2/health/"
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(.*)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]{1,254}))(?::[0-9]{0,5})?")
_HEADERS_READ = frozenset({b"host", b"origin", b"sec-fetch-site"})
_MAX_REMEMBERED = 1024
_LONGEST_REMEMBERED = 300
_EXPECTED_HOST = "localhost, 127.0.0.1, [::1] or a host in LORAPLEX_ALLOWED_HOSTS"

Headers = Sequence[tuple[bytes, bytes]]


# These two errors are here, because `app.settings` imports this module, which must not load the web framework.
class HostNotAllowed(LoraplexError):
    """The request is addressed to a host that is not this service's."""


class CrossSite(LoraplexError):
    """A web page of another host may not change or compute anything here."""


class HostPolicy:
    """Decision, from the head of a request, whether it may be answered.

    `listen_host` is the setting `HOST`, and `allowed_hosts` the setting `ALLOWED_HOSTS`, which raises `ValueError` if
    it is malformed.
    """

    def __init__(self, listen_host: str, allowed_hosts: str | None) -> None:
        names = ALWAYS_ALLOWED | parse_allowed_hosts(allowed_hosts or "")
        listening = listening_host(listen_host)
        self._names = names if listening is None else names | {listening}
        self._allows_any = ANY_HOST in names
        # `Host` values that were accepted, as they came: parsing one takes longer than the rest of the decision.
        self.accepted: set[bytes | None] = set()

    def accepts(self, host: bytes | None) -> bool:
        """Return whether a request with this one `Host` value is addressed to the service; None means no header."""
        if host in self.accepted:
            return True
        if host is None or not (self._allows_any or host_name(_text(host)) in self._names):
            return False
        # Clients choose these values, so their number and length are bounded.
        if len(self.accepted) < _MAX_REMEMBERED and len(host) <= _LONGEST_REMEMBERED:
            self.accepted.add(host)
        return True

    def check(self, scope: Mapping[str, Any]) -> None:
        """Raise `HostNotAllowed` or `CrossSite` for a request, as an ASGI scope, that may not be answered.

        `target_authority` in its state is the `host:port` of a target in absolute form (`GET http://host:port/path`).
        """
        method, path = scope["method"], scope["path"]
        headers = [header for header in scope["headers"] if header[0] in _HEADERS_READ]
        hosts = _values(headers, b"host")
        target = scope["state"].get("target_authority")
        is_health = path in _HEALTH_PATHS or path.startswith(HEALTH_PREFIX)
        if not (self._allows_any or (method in SAFE_METHODS and is_health)):
            # HTTP/1.0 has no Host header.
            if len(hosts) != 1 and (hosts or scope["http_version"] != "1.0"):
                raise _not_allowed(f"the request has {len(hosts) or 'no'} Host headers; it needs exactly one", hosts)
            for host in [*hosts, *([] if target is None else [target])]:
                if not self.accepts(host):
                    detail = f"the service does not answer to the host '{shorten(_text(host))}'; if that is its name,"
                    raise _not_allowed(f"{detail} add it to LORAPLEX_ALLOWED_HOSTS", [host])
        if method not in SAFE_METHODS:
            _check_origin(headers, hosts if target is None else [*hosts, target])


def host_name(authority: str) -> str | None:
    """Return the host of `host[:port]` in canonical form, or None if it is malformed.

    The form is lower case, without the port, the brackets of an IPv6 address and the final dot of a domain name.
    User information (`user@host`) is malformed here: neither `Host` nor `Origin` may have it.
    """
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return None
    if match[1] is None:
        return match[2].lower().removesuffix(".") or None
    with suppress(ValueError):
        return str(ipaddress.IPv6Address(match[1]))
    return None


def listening_host(host: str) -> str | None:
    """Return the canonical name of the address to listen on, or None if it is a wildcard or malformed."""
    address = host.partition("%")[0]  # an IPv6 address may name its interface
    with suppress(ValueError):
        if ipaddress.ip_address(address).is_unspecified:
            return None
    return host_name(f"[{address}]" if ":" in address else address)


def parse_allowed_hosts(setting: str) -> frozenset[str]:
    """Return the canonical names in a comma-separated list; raise `ValueError` for an entry that is not a host.

    Empty entries and ports are ignored.
    """
    names = set()
    for entry in filter(None, map(str.strip, setting.split(","))):
        is_bare_ipv6 = entry.count(":") > 1 and not entry.startswith("[")
        name = ANY_HOST if entry == ANY_HOST else host_name(f"[{entry}]" if is_bare_ipv6 else entry)
        if name is None:
            raise ValueError(
                f"{entry!r} is not a host name: list names or addresses such as loraplex.example.com,10.0.0.7 without "
                "a scheme or path (international names as xn--…), or * for any host"
            )
        names.add(name)
    return frozenset(names)


def authority_of(target: bytes) -> bytes | None:
    """Return the `host:port` of a request target in absolute form, or None for the other forms."""
    _, separator, rest = target.partition(b"://")
    return re.split(rb"[/?#]", rest, maxsplit=1)[0] if separator else None


def _check_origin(headers: Headers, hosts: Sequence[bytes]) -> None:
    for site in _values(headers, b"sec-fetch-site"):
        if site.strip().lower() == b"cross-site":
            detail, expected = "the request comes from a page of another site", "same-origin, same-site or none"
            raise CrossSite(detail, field="Sec-Fetch-Site", given=_text(site), expected=expected)
    for origin in map(_text, _values(headers, b"origin")):
        # Scheme and port are not compared: a proxy that ends TLS changes the one and may leave the other out of `Host`.
        match = _ORIGIN.fullmatch(origin)
        name = None if match is None else host_name(match[1])
        if name is None or {host_name(_text(host)) for host in hosts} != {name}:
            detail = f"the request comes from a page of {shorten(origin)}, which is not the host that it is addressed"
            detail += " to; a proxy in front has to pass the client's Host on"
            raise CrossSite(detail, field="Origin", given=origin, expected="the host of the Host header")


def _not_allowed(detail: str, hosts: Sequence[bytes]) -> HostNotAllowed:
    return HostNotAllowed(detail, field="Host", given=", ".join(map(_text, hosts)), expected=_EXPECTED_HOST)


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _text(value: bytes) -> str:
    return value.decode("latin-1").strip(" \t")
