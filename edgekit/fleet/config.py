"""Where the fleet server listens, which broker it follows, where it stores."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

from edgekit.errors import EnvironmentFault, UsageError
from edgekit.loopback import is_loopback

EMBEDDED = "embedded"
DEFAULT_GRACE_S = 120.0
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
    cert_file: str = ""
    key_file: str = ""

    def __str__(self) -> str:
        return f"{'mqtts' if self.is_tls else 'mqtt'}://{self.host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """How to speak to it, read from the files anew each time, so that a renewed certificate counts; None without TLS.

        Raises:
            EnvironmentFault: ``broker.tls`` when a file cannot be used.
        """
        if not self.is_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file or None)
        except OSError as error:  # ssl's errors are among them
            files = ", ".join(filter(None, (self.ca_file, self.cert_file, self.key_file)))
            text = f"{files}: cannot be used for TLS to the broker: {error}."
            raise EnvironmentFault("broker.tls", text, hint="Give PEM files without a password.") from error
        return context


Role = Literal["all", "web", "ingest"]
"""What a server does of it all: ``web`` ingests nothing, ``ingest`` nothing else."""


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
    role: Role = "all"
    ca_file: str = ""
    repository: str = ""
    """The update repository's URL, for releases and reference profiles; empty: the server knows what devices report only."""
    repository_root: str = ""
    """Its provisioned root metadata, a file."""
    data_dir: str = ""
    """Cache of the repository's metadata; beside the database by default."""
    rules: str = ""
    """Alert rules, a TOML file; empty: those that come with edgekit."""
    public_url: str = ""
    """Where people open the dashboard: for links in messages."""
    is_private_webhook_allowed: bool = False
    """Webhooks may go to addresses of this server's own networks."""
    cert_file: str = ""
    key_file: str = ""
    """This server's certificate and key for the broker."""
    authority: str = ""
    """Folder of the fleet's certificate authority; empty: devices are enrolled elsewhere."""
    broker_dir: str = ""
    """Folder in which the broker finds its revocation list and access rules; empty: they are not written."""
    device_broker: str = ""
    device_repository: str = ""
    """What a device is told at its enrolment."""
    tls_cert: str = ""
    tls_key: str = ""
    """With both the pages and the API are served over TLS."""
    client_ca: str = ""
    crl: str = ""
    """With TLS: only clients with a certificate of these authorities, that is on none of these lists."""
    oidc: str = ""
    """Settings of a login provider, a TOML file; empty: people log in with passwords, or not at all."""
    watch_grace_s: float = DEFAULT_GRACE_S
    """An interval of the watch is judged so long after its end; windows that come later are added to it then."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the pages may be opened without a token, besides loopback's own."""


def parse_broker(
    text: str, *, ca_file: str = "", cert_file: str = "", key_file: str = "", is_plain_allowed: bool = False
) -> BrokerAddress:
    """A broker's address.

    Args:
        text: ``mqtt://[user:password@]host[:port]`` or ``mqtts://…``; user and password are percent-decoded.
        ca_file: certificates to trust instead of the system's.
        cert_file: the certificate to log in with.
        key_file: its key.
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
        cert_file=cert_file,
        key_file=key_file,
    )
