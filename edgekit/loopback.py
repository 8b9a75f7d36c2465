"""Which hosts are this machine itself: what stays on loopback needs no TLS.

>>> is_loopback("127.0.0.2"), is_loopback("127.0.0.1.example.org")
(True, False)
"""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own; a name counts only when it is ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
