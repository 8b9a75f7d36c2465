"""The embedded MQTT broker: rumqttd from the ``iotcore`` wheel, MQTT 5, on loopback, in a child process.

It is for one machine and for demonstrations; a fleet in the field uses Mosquitto, EMQX or another MQTT 5 broker with TLS and
access rules, by ``--broker mqtts://host``. It keeps sessions and messages in memory: what it has confirmed to a device and the
ingest has not written yet is lost when it is killed (the gap ledger counts it as missing). When it is stopped, the ingest still
writes what it has been given.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import tempfile
from pathlib import Path
from typing import Any

from edgekit.errors import EnvironmentFault

logger = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 1 << 20
MAX_INFLIGHT = 100
_CONFIG = """
id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {payload}
max_inflight_count = {inflight}
"""


def check_port(port: int, *, what: str, option: str, host: str = "127.0.0.1") -> None:
    """Refuse a port that something listens on, or that may not be listened on.

    Raises:
        EnvironmentFault: ``port.in_use`` or ``port.unavailable``, naming the port and the option that changes it.
    """
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise EnvironmentFault(
                "port.in_use",
                f"port {port} for the {what} is in use on {host}.",
                hint=f"Stop what listens there, or give another port with {option}.",
            ) from error
        raise EnvironmentFault(
            "port.unavailable",
            f"{host} port {port} for the {what}: {error.strerror or error}.",
            hint=f"Give an address of this machine, and a port from 1024 on with {option}.",
        ) from error


class EmbeddedBroker:
    """A broker that lives as long as this object; the child ends by itself when this process is gone."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._broker: Any = None
        self._config: Path | None = None

    def start(self) -> None:
        """Start it and wait until it accepts connections.

        Raises:
            EnvironmentFault: ``port.in_use``, ``broker.missing`` or ``broker.failed``.
        """
        check_port(self.port, what="MQTT broker", option="--broker-port")
        try:
            import iotcore  # noqa: PLC0415 - 14 MB that an external broker does not need
        except ImportError as error:
            raise EnvironmentFault(
                "broker.missing", "the embedded broker (iotcore) is not installed.", hint="pip install 'edgekit[fleet]'"
            ) from error
        with tempfile.NamedTemporaryFile("w", suffix=".toml", prefix="edgekit-broker-", delete=False) as file:
            file.write(_CONFIG.format(port=self.port, payload=MAX_PAYLOAD_BYTES, inflight=MAX_INFLIGHT))
        self._config = Path(file.name)
        self._broker = iotcore.Broker(config_path=file.name, port=self.port, listen="127.0.0.1")
        try:
            self._broker.start()
        except (OSError, RuntimeError) as error:
            self.stop()
            raise EnvironmentFault(
                "broker.failed", f"the embedded broker did not start: {error}.", hint="Use another port with --broker-port."
            ) from error
        logger.info("event=broker_started port=%d", self.port)

    def stop(self) -> None:
        """End it and free its port."""
        if self._broker:
            self._broker.stop()
            self._broker = None
        if self._config:
            with contextlib.suppress(OSError):
                self._config.unlink()
            self._config = None
