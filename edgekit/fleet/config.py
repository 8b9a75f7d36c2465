"""Where the fleet server listens, which broker it follows, where it stores."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from edgekit.errors import UsageError
from edgekit.loopback import is_loopback

EMBEDDED = "embedded"
_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, kw_only=True)
class BrokerAddress:
    """A broker to connect to."""

    host: str
    port: int
    is_tls: bool
    username: str = ""
    password: str = ""
    ca_file: str = ""

    def __str__(self) -> str:
        return f"{'mqtts' if self.is_tls else 'mqtt'}://{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """The server's configuration; ``token`` guards it off loopback."""

    host: str = "127.0.0.1"
    port: int = 8420
    database: str = "edgekit-fleet.db"
    broker: str = EMBEDDED
    broker_port: int = 1883
    token: str = ""
    client_id: str = "edgekit-fleet"
    group: str = ""
    """Share the ingest with the other servers of this group; each needs its own ``client_id``."""
    ca_file: str = ""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the pages may be opened without a token, besides loopback's own."""


def parse_broker(text: str, *, ca_file: str = "", is_plain_allowed: bool = False) -> BrokerAddress:
    """A broker's address.

    Args:
        text: ``mqtt://[user:password@]host[:port]`` or ``mqtts://…``; user and password are percent-decoded.
        ca_file: certificates to trust instead of the system's.
        is_plain_allowed: accept ``mqtt`` (no TLS) off loopback.

    Raises:
        UsageError: ``config.broker``, or ``config.insecure`` for ``mqtt`` to another machine.
    """
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError as error:
        raise UsageError("config.broker", f"broker {text!r}: {error}.", hint="Give mqtts://host:port.") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise UsageError("config.broker", f"broker {shown!r}: not an address.", hint="Give mqtts://host:port, or embedded.")
    if parts.scheme == "mqtt" and not is_loopback(parts.hostname) and not is_plain_allowed:
        raise UsageError(
            "config.insecure",
            f"broker mqtt://{parts.hostname}: without TLS everything that devices report can be read and forged on the way.",
            hint="Use mqtts://, or --allow-insecure on a network that you trust.",
        )
    return BrokerAddress(
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        is_tls=parts.scheme == "mqtts",
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        ca_file=ca_file,
    )
