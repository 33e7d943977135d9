"""Which addresses only this machine can reach: what listens elsewhere needs a key or certificates."""

import contextlib
from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own loopback; names other than localhost are not looked up.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "0.0.0.0", "example.org")]
    [True, True, True, False, False, False]
    """
    with contextlib.suppress(ValueError):
        return ip_address(host.strip("[]")).is_loopback
    return host == "localhost"
