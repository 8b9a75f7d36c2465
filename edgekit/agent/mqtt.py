"""The connection to the broker: MQTT 5 through paho in a thread of its own, one client object a connection.

The thread connects, waits with full jitter when it cannot, and hands what happens to the event loop. It keeps no message: the
outbox has them. The client id is stable, so that a broker never collects orphaned sessions; the session outlives a lost
connection by a little, so that a quick reconnect takes the last will back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgekit.agent.config import AgentConfig, parse_broker
from edgekit.agent.plan import backoff_s
from edgekit.errors import EnvironmentFault

logger = logging.getLogger(__name__)

KEEPALIVE_S = 30
CONNECT_SECONDS = 10.0
RECONNECT_BASE_S = 1.0
RECONNECT_CAP_S = 60.0
WILL_DELAY_S = 5
SESSION_EXPIRY_S = 30
MAX_IN_FLIGHT = 20
LOOP_SECONDS = 1.0
STABLE_SECONDS = 30.0
FAILURE_CODE = 0x80
_OUR_FAULT = frozenset({0x81, 0x82, 0x90, 0x93, 0x94, 0x95, 0x99})
"""Reasons of a broker's goodbye that speak of what we sent: malformed, too many, too large."""


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """One message that a broker delivered. ``response_topic`` and ``correlation`` are MQTT 5's request and response."""

    topic: str
    payload: bytes
    is_retained: bool = False
    response_topic: str = ""
    correlation: bytes = b""


@dataclass
class Handlers:
    """What the connection calls, in the event loop's thread."""

    on_connect: Callable[[], None]
    on_disconnect: Callable[[str], None]
    on_puback: Callable[[int, int, str], None]
    on_message: Callable[[Incoming], None] = lambda _message: None


@dataclass
class Connection:
    """The thread."""

    config: AgentConfig
    will_topic: str
    will_payload: bytes
    handlers: Handlers
    max_packet_bytes: int = 0
    """What the broker takes, as it said; 0: it did not say."""
    is_blamed: bool = False
    """Whether the last connection ended because of what we sent, as far as one can know."""
    receive_maximum: int = MAX_IN_FLIGHT
    """How many messages without a PUBACK the broker bears."""
    _client: paho.Client | None = None
    _halt: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _is_leaving: bool = False

    def start(self) -> None:
        """Begin to connect.

        Raises:
            EnvironmentFault: ``broker.tls`` when a certificate file cannot be used.
        """
        loop = asyncio.get_running_loop()
        self._tls_context()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="mqtt", daemon=True)
        self._thread.start()

    def _tls_context(self) -> ssl.SSLContext | None:
        """Made anew for each connection: the certificate may have been renewed since the last one."""
        config = self.config
        if not parse_broker(config).is_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=config.ca_file or None)
            if config.cert_file:
                context.load_cert_chain(config.cert_file, config.key_file or None)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (config.ca_file, config.cert_file, config.key_file)))
            raise EnvironmentFault(
                "broker.tls", f"{files}: cannot be used for TLS: {error}.", hint="Check the files."
            ) from error
        return context

    def _make_client(self, loop: asyncio.AbstractEventLoop, context: ssl.SSLContext | None) -> paho.Client:
        config, handlers = self.config, self.handlers
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"ek.{config.site}.{config.device}",
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.max_queued_messages_set(MAX_IN_FLIGHT)
        client.connect_timeout = CONNECT_SECONDS
        will = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
        will.WillDelayInterval = WILL_DELAY_S
        client.will_set(self.will_topic, self.will_payload, qos=1, retain=True, properties=will)
        if context is not None:
            client.tls_set_context(context)
        if config.broker_username:
            password = Path(config.broker_password_file).read_text().strip() if config.broker_password_file else None
            client.username_pw_set(config.broker_username, password)

        def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
            if not reason.is_failure:
                self.max_packet_bytes = int(getattr(properties, "MaximumPacketSize", 0) or 0)
                self.receive_maximum = int(getattr(properties, "ReceiveMaximum", 0) or MAX_IN_FLIGHT)
                loop.call_soon_threadsafe(handlers.on_connect)
            else:
                logger.warning("event=broker_refused reason=%r", str(reason))

        def on_publish(_client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
            loop.call_soon_threadsafe(handlers.on_puback, mid, int(reason.value), str(reason))

        def on_message(_client: Any, _data: Any, message: Any) -> None:
            given = message.properties
            incoming = Incoming(
                topic=message.topic,
                payload=bytes(message.payload),
                is_retained=bool(message.retain),
                response_topic=str(getattr(given, "ResponseTopic", "") or ""),
                correlation=bytes(getattr(given, "CorrelationData", b"") or b""),
            )
            loop.call_soon_threadsafe(handlers.on_message, incoming)

        # also called, with "protocol error", for an answer that paho cannot read, as a PUBACK with a reason that there is not
        def on_disconnect(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            self.is_blamed = self.is_blamed or int(getattr(reason, "value", 0)) in _OUR_FAULT

        client.on_connect = on_connect
        client.on_disconnect = on_disconnect
        client.on_message = on_message
        client.on_publish = on_publish
        # With this set, publish() only queues and wakes the thread: two threads that write could mix up their bytes.
        client.on_socket_register_write = lambda *_: None
        return client

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        failures = 0
        while not self._halt.is_set():
            reason, has_lasted = self._hold(loop)
            if self._halt.is_set() or self._is_leaving:
                break
            failures = 1 if has_lasted else failures + 1
            if failures == 1 or failures % 20 == 0:
                logger.warning("event=broker_unreachable broker=%s reason=%r failures=%d", self.config.broker, reason, failures)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.handlers.on_disconnect, reason)
            self._halt.wait(backoff_s(failures, base_s=RECONNECT_BASE_S, cap_s=RECONNECT_CAP_S, draw=random.random))

    def _hold(self, loop: asyncio.AbstractEventLoop) -> tuple[str, bool]:
        """Connect and stay connected as long as it lasts.

        Returns:
            Why it ended, and whether the connection had lasted: one that ends at once is a failure, too.
        """
        broker = parse_broker(self.config)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        connected_at, has_lasted, self.is_blamed = 0.0, False, False
        try:
            client = self._client = self._make_client(loop, self._tls_context())
            client.connect(broker.host, broker.port, keepalive=KEEPALIVE_S, clean_start=False, properties=properties)
            code = MQTTErrorCode.MQTT_ERR_SUCCESS
            while code == MQTTErrorCode.MQTT_ERR_SUCCESS and not (self._halt.is_set() and not client.want_write()):
                code = client.loop(timeout=LOOP_SECONDS)
                if client.is_connected():
                    connected_at = connected_at or time.monotonic()
                    has_lasted = time.monotonic() - connected_at >= STABLE_SECONDS
        except (OSError, ValueError, EnvironmentFault) as error:
            return str(error) or type(error).__name__, has_lasted
        return paho.error_string(code), has_lasted

    def subscribe(self, topic_filter: str) -> None:
        """Ask for messages, QoS 1; retained ones come each time."""
        if self._client is not None:
            self._client.subscribe(topic_filter, qos=1)

    def publish(
        self, topic: str, payload: bytes, *, qos: int, is_retained: bool, correlation: bytes = b"", expiry_s: int = 0
    ) -> int | None:
        """Send one message; its number for the PUBACK, or None when that is not possible now.

        Args:
            topic: where to.
            payload: the message.
            qos: 0 or 1.
            is_retained: whether the broker keeps it.
            correlation: MQTT 5's correlation data, for an answer.
            expiry_s: seconds after which the broker may forget it; 0 for never.
        """
        if self._client is None:
            return None
        properties = None
        if correlation or expiry_s:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            if correlation:
                properties.CorrelationData = correlation
            if expiry_s:
                properties.MessageExpiryInterval = expiry_s
        info = self._client.publish(topic, payload, qos=qos, retain=is_retained, properties=properties)
        return info.mid if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def stop(self) -> None:
        """Say goodbye and end the thread. Without the goodbye the broker would publish the will."""
        self._is_leaving = True
        if self._client is not None and self._client.is_connected():
            self._client.disconnect()
        self._halt.set()
        if self._thread is not None:
            self._thread.join(timeout=LOOP_SECONDS + 1.0)
