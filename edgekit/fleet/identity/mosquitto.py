"""Mosquitto's configuration for a fleet, as text: two listeners, who may say and hear what, and bounds other than its defaults.

Devices have a listener of their own. There the certificate's common name, ``site/device``, is user name and client id at once
(``use_identity_as_username``, ``use_username_as_clientid``), so that nobody takes another's session; a pattern puts it into the
topics that it may use. The fleet's servers have the other listener, which knows the servers' authority only: on it a server may
hold several connections under one certificate, which the first listener would take for one client.

Why not the defaults: a queue of 1,000 messages is dropped silently when the ingest is away for a minute; sessions never end;
with settings per listener what a broker kept over its own restart belongs to no listener, and is denied to everyone.

>>> print(make_acl(("edgekit-fleet",), (("lab", "cam-7"),)).splitlines()[1])
pattern write ek/1/%u/status
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgekit.errors import UsageError
from edgekit.schema.identity import common_name
from edgekit.telemetry.topics import ROOT, UPLINK

DEVICE_PORT, SERVER_PORT = 8883, 8884
MAX_PACKET_BYTES = 4 << 20
MAX_QUEUED_MESSAGES = 500_000
MAX_QUEUED_BYTES = 1 << 30
MAX_IN_FLIGHT = 1000
LOCAL_RULES = "acl.local"
"""An operator's own rules lie in this file beside ``acl``, which is written anew now and then."""
_FORBIDDEN = frozenset(" \t\r\n\"'")


@dataclass(frozen=True, kw_only=True)
class BrokerSettings:
    """What the configuration says; paths are as the broker sees them."""

    folder: str = "/etc/mosquitto/edgekit"
    data: str = "/var/lib/mosquitto"
    address: str = ""
    """Where it listens; empty for all of the machine's addresses."""
    device_port: int = DEVICE_PORT
    server_port: int = SERVER_PORT
    server_address: str = ""
    max_connections: int = -1
    user: str = ""
    """Whom Mosquitto becomes when root started it; empty for its default."""
    log: str = "stderr"


def make_acl(servers: Sequence[str], shut_out: Iterable[tuple[str, str]] = (), *, more: str = "") -> str:
    """The access rules.

    Args:
        servers: user names of the fleet's servers: common names of their certificates.
        shut_out: site and device of those that were revoked: one that is connected stays so until it reconnects, and can
            neither say nor hear anything.
        more: further rules, in Mosquitto's words, for example for topics on which models are asked.
    """
    for name in servers:
        if not name or set(name) & (_FORBIDDEN | set("/+#")):
            raise UsageError(
                "identity.name", f"{name!r}: not a server's name.", hint="Give the common name of its certificate."
            )
    lines = ["# devices: the common name of their certificate, site/device, is %u"]
    lines += [f"pattern write {ROOT}/%u/{verb}" for verb in (*UPLINK, "rsp")]
    lines += [f"pattern read {ROOT}/%u/{verb}" for verb in ("des", "cmd")]
    lines += ["", "# the fleet's servers"]
    for name in servers:
        lines += [f"user {name}", f"topic readwrite {ROOT}/#", "topic read $SYS/#", ""]
    if more.strip():
        lines += [f"# {LOCAL_RULES}", more.strip(), ""]
    lines += ["# revoked"]
    for site, device in shut_out:
        lines += [f"user {common_name(site, device)}", "topic deny #", ""]
    return "\n".join(lines).rstrip() + "\n"


def make_config(settings: BrokerSettings) -> str:
    """``mosquitto.conf``."""
    folder = settings.folder.rstrip("/")
    for path in (folder, settings.data, settings.address, settings.server_address):
        if set(path) & {"\n", "\r"}:
            raise UsageError("identity.broker", f"{path!r}: a line end cannot stand in mosquitto.conf.")
    head = [
        "# made by: edgekit fleet broker-config",
        *([f"user {settings.user}"] if settings.user else []),
        f"log_dest {settings.log}",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_type information",
        "connection_messages false",
        f"pid_file {settings.data.rstrip('/')}/mosquitto.pid",
        "",
        "# one set of rules for both listeners: what is kept over a restart would else belong to none of them",
        "per_listener_settings false",
        "allow_anonymous false",
        f"acl_file {folder}/acl",
        "",
        "persistence true",
        f"persistence_location {settings.data.rstrip('/')}/",
        "autosave_interval 60",
        "persistent_client_expiration 14d",
        "",
        f"max_queued_messages {MAX_QUEUED_MESSAGES}",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        f"max_inflight_messages {MAX_IN_FLIGHT}",
        f"max_packet_size {MAX_PACKET_BYTES}",
        "max_keepalive 600",
        "",
    ]
    devices = _listener(settings.device_port, settings.address, folder, "devices.pem", settings.max_connections)
    servers = _listener(settings.server_port, settings.server_address or settings.address, folder, "ca.pem", -1)
    return "\n".join(
        [
            *head,
            "# devices",
            *devices,
            "use_username_as_clientid true",
            "",
            "# the fleet's servers",
            *servers,
            "use_username_as_clientid false",
            "",
        ]
    )


def _listener(port: int, address: str, folder: str, clients: str, max_connections: int) -> list[str]:
    return [
        f"listener {port} {address}".rstrip(),
        f"cafile {folder}/{clients}",
        f"certfile {folder}/broker.pem",
        f"keyfile {folder}/broker.key",
        f"crlfile {folder}/crl.pem",
        "tls_version tlsv1.2",
        f"max_connections {max_connections}",
        "require_certificate true",
        "use_identity_as_username true",
    ]
