"""Host names as `Host` and `Origin` headers, URLs and the setting `ALLOWED_HOSTS` write them."""

import ipaddress
import re
from contextlib import suppress

ANY_HOST = "*"
"""The entry of `ALLOWED_HOSTS` that allows every host."""
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]{1,254}))(?::[0-9]{0,5})?")


def host_name(authority: str) -> str | None:
    """Return the host of `host[:port]` in its one canonical form, or None if it is malformed.

    The form is lower case, without the port, the brackets of an IPv6 address and the final dot of a domain name.
    User information (`user@host`) is malformed here: neither header may have it.
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

    Empty entries are left out, and so are ports, which are not compared.
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
