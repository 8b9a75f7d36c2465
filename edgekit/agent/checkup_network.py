"""Who this agent must reach, and with which certificates: the reasons, where it does not."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edgekit.agent.config import AgentConfig, parse_broker
from edgekit.loopback import is_loopback

if TYPE_CHECKING:
    from edgekit.agent.checkup import Check
    from edgekit.schema.state import AgentStatus

SECONDS = 5.0


def _when(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC)


def _context(config: AgentConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=config.ca_file or None)
    if config.cert_file:
        context.load_cert_chain(config.cert_file, config.key_file or None)
    return context


def check_tls_files(config: AgentConfig) -> Iterator[Check]:
    """Certificates that lie on this device."""
    from edgekit.agent.checkup import fault, judge_expiry, note  # noqa: PLC0415 - it calls this module

    if config.ca_file:
        try:
            context = ssl.create_default_context(cafile=config.ca_file)
        except (OSError, ssl.SSLError) as error:
            yield fault("tls", f"ca_file {config.ca_file}: {error}", "give PEM certificates")
        else:
            dates = [_when(str(each["notAfter"])) for each in context.get_ca_certs() if "notAfter" in each]
            if dates:
                yield judge_expiry("tls", f"the first certificate of ca_file {config.ca_file}", min(dates), hint="renew it")
    if config.cert_file:
        try:
            _context(config)
            decoded = ssl._ssl._test_decode_cert(config.cert_file)  # type: ignore[attr-defined]  # noqa: SLF001 - nothing else reads a leaf
        except (OSError, ssl.SSLError) as error:
            yield fault("tls", f"cert_file {config.cert_file}: {error}", "give a PEM certificate that fits key_file")
        else:
            what = f"this device's certificate {config.cert_file}"
            yield judge_expiry("tls", what, _when(decoded["notAfter"]), hint="renew it: without it no broker lets it in")
    elif config.broker.startswith("mqtts"):
        yield note("tls", "no cert_file: this device is known to the broker by its password only, or not at all")


def check_network(config: AgentConfig, status: AgentStatus | None) -> Iterator[Check]:
    """Repository, broker, and the agent's own door."""
    yield from _check_repository(config)
    yield from _check_broker(config, status)
    yield from _check_socket(config, is_running=status is not None)


def _check_repository(config: AgentConfig) -> Iterator[Check]:
    from edgekit.agent.checkup import fault, judge_expiry, ok  # noqa: PLC0415 - it calls this module
    from edgekit.trust.transport import Transport, TransportError, TransportOptions  # noqa: PLC0415 - urllib3

    if not config.repository:
        return
    url = f"{config.repository.rstrip('/')}/metadata/timestamp.json"
    options = TransportOptions(
        ca_file=config.ca_file or None, client_cert_file=config.cert_file or None, client_key_file=config.key_file or None
    )
    transport = Transport(options)
    try:
        with transport.get(url, ok=frozenset({200})) as answer:
            size = sum(len(chunk) for chunk in answer.chunks(max_bytes=1 << 20))
        yield ok("repository", f"{config.repository} answers ({size} bytes of timestamp)")
    except (TransportError, OSError) as error:
        yield fault("repository", f"{config.repository}: {error}", "check the address, the network, a proxy, the certificates")
        return
    finally:
        transport.close()
    parts = urlsplit(config.repository)
    if parts.scheme == "https" and parts.hostname:
        _, expires = _handshake(parts.hostname, parts.port or 443, config)
        if expires is not None:
            yield judge_expiry("tls", f"the certificate of {parts.hostname}", expires, hint="its owner must renew it")


def _handshake(host: str, port: int, config: AgentConfig) -> tuple[str, datetime | None]:
    """Why TLS does not work there, empty when it does, and when the server's certificate expires."""
    try:
        with (
            socket.create_connection((host, port), timeout=SECONDS) as plain,
            _context(config).wrap_socket(plain, server_hostname=host) as secured,
        ):
            date = (secured.getpeercert() or {}).get("notAfter")
            return "", _when(str(date)) if date else None
    except (OSError, ssl.SSLError) as error:
        return str(error), None


def _check_broker(config: AgentConfig, status: AgentStatus | None) -> Iterator[Check]:
    from edgekit.agent.checkup import fault, judge_expiry, note, ok  # noqa: PLC0415 - it calls this module

    if not config.broker:
        yield note("broker", "none is set: no telemetry, no remote command")
        return
    broker, reason, expires = parse_broker(config), "", None
    if broker.is_tls:
        reason, expires = _handshake(broker.host, broker.port, config)
    else:
        try:
            socket.create_connection((broker.host, broker.port), timeout=SECONDS).close()
        except OSError as error:
            reason = error.strerror or str(error)
        if not is_loopback(broker.host):
            yield note("broker", f"{config.broker} is plain MQTT: everything can be read and forged on the way", "use mqtts://")
    if reason:
        yield fault("broker", f"{config.broker}: {reason}", "check the address, the network and the certificates")
    elif status is not None and not status.is_broker_connected:
        hint = 'the broker refuses this device: check user, password or certificate; "edgekit agent logs" has its words'
        yield fault("broker", f"{config.broker} can be reached and the agent is not connected", hint)
    else:
        yield ok("broker", f"{config.broker} {'is connected' if status else 'can be reached'}")
    if expires is not None:
        yield judge_expiry("tls", f"the certificate of {broker.host}", expires, hint="its owner must renew it")


def _check_socket(config: AgentConfig, *, is_running: bool) -> Iterator[Check]:
    from edgekit.agent.checkup import fault, ok  # noqa: PLC0415 - it calls this module

    path = getattr(config, "socket", "")
    if not path or not is_running:
        return
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except FileNotFoundError:
        yield fault("socket", f"{path} is not there", "start the agent again")
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        probe.settimeout(SECONDS)
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            yield fault("socket", f"{path}: {error.strerror}", "start the agent again")
            return
    yield (
        fault("socket", f"{path} has mode {mode:04o}", f"chmod 600 {path}") if mode & 0o007 else ok("socket", f"{path} answers")
    )
