"""From the broker into the store: acknowledged only after the commit, so that a crash loses nothing.

paho's network thread decodes and queues; one writer thread takes what has come together, writes it in one transaction and then
acknowledges each message. The session is persistent: while this server is away the broker keeps what arrives. Order does not
matter and what comes twice is one row, so several servers can share the subscriptions as a group. A single server must not: the
broker would go on giving a share to the session of a group's member that is gone.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgekit.errors import ArtifactError, EdgekitError
from edgekit.fleet.config import BrokerAddress
from edgekit.fleet.store import Store
from edgekit.fleet.views import IngestStatus
from edgekit.fleet.writing import Received
from edgekit.schema.message import AnyMessage, Birth, Death, Event, Heartbeat, Reported, WindowBatch
from edgekit.telemetry.codec import decode
from edgekit.telemetry.topics import UPLINK, Verb, parse_topic, subscription

logger = logging.getLogger(__name__)

SHARED: tuple[Verb, ...] = ("w", "ev", "hb")
"""Shared within a group; ``status`` and ``rep`` are retained, and retained messages do not reach shared subscriptions."""
MAX_BATCH = 500
BATCH_SECONDS = 0.05
RETRY_SECONDS = 2.0
SESSION_SECONDS = 24 * 3600
RECEIVE_MAXIMUM = 100
KEEP_ALIVE_SECONDS = 30
_KINDS: dict[str, tuple[type, ...]] = {
    "status": (Birth, Death),
    "hb": (Heartbeat,),
    "w": (WindowBatch,),
    "ev": (Event,),
    "rep": (Reported,),
}


@dataclass(frozen=True)
class _Queued:
    """A message to write (None: malformed, only to acknowledge), with its packet id and QoS."""

    received: Received | None
    mid: int
    qos: int


def read_message(topic: str, payload: bytes, received_ms: int) -> Received:
    """A message from its topic and bytes.

    Raises:
        ArtifactError: ``telemetry.topic`` or ``telemetry.malformed``, also when the message does not belong to its verb.
    """
    site, device, verb = parse_topic(topic)
    message: AnyMessage = decode(payload)
    if not isinstance(message, _KINDS.get(verb, ())):
        raise ArtifactError("telemetry.malformed", f"{topic}: a {type(message).__name__} does not belong on this topic.")
    return Received(site=site, device=device, message=message, received_ms=received_ms)


class Ingest:
    """One connection to the broker and one writer thread."""

    def __init__(self, store: Store, broker: BrokerAddress, *, client_id: str, group: str = "") -> None:
        self._store = store
        self._broker = broker
        self._group = group
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._client = self._make_client(client_id)
        self._writer = threading.Thread(target=self._write, name="ingest-writer", daemon=True)
        self._is_stopping = threading.Event()
        self.received = 0
        self.malformed = 0
        self.last_malformed = ""

    def _make_client(self, client_id: str) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=mqtt.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=True,
        )
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.reconnect_delay_set(min_delay=1, max_delay=30)
        if self._broker.username:
            client.username_pw_set(self._broker.username, self._broker.password)
        if self._broker.is_tls:
            client.tls_set_context(ssl.create_default_context(cafile=self._broker.ca_file or None))
        return client

    def start(self) -> None:
        """Connect in the background, again and again until the broker is there."""
        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_SECONDS
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        self._writer.start()
        self._client.connect_async(
            self._broker.host, self._broker.port, keepalive=KEEP_ALIVE_SECONDS, clean_start=False, properties=properties
        )
        self._client.loop_start()

    def stop(self) -> None:
        """Write what is queued, acknowledge it, and disconnect; the session stays at the broker."""
        self._is_stopping.set()
        self._queue.put(None)
        if self._writer.is_alive():
            self._writer.join(timeout=10)
        self._client.disconnect()
        self._client.loop_stop()

    def status(self) -> IngestStatus:
        """How it is doing."""
        return IngestStatus(
            is_broker_connected=self._client.is_connected(),
            broker=str(self._broker),
            received=self.received,
            stored=self._store.stored,
            duplicates=self._store.duplicates,
            malformed=self.malformed,
            last_malformed=self.last_malformed,
        )

    def _on_connect(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            logger.warning("event=broker_refused reason=%r", str(reason))
            return
        logger.info("event=broker_connected broker=%s", self._broker)
        filters = [
            (subscription(verb, group=self._group if verb in SHARED else ""), 0 if verb == "hb" else 1) for verb in UPLINK
        ]
        client.subscribe(filters)

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not self._is_stopping.is_set():
            logger.warning("event=broker_lost reason=%r", str(reason))

    def _on_message(self, _client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        self.received += 1
        try:
            received: Received | None = read_message(message.topic, bytes(message.payload), time.time_ns() // 1_000_000)
        except EdgekitError as error:
            self.malformed += 1
            self.last_malformed = f"{message.topic[:200]}: {error.message}"
            logger.warning("event=message_refused topic=%r error=%r", message.topic[:200], error.message)
            received = None
        self._queue.put(_Queued(received, message.mid, message.qos))

    def _take(self) -> tuple[list[_Queued], bool]:
        """What has come together, and whether the end was asked for."""
        first = self._queue.get()
        if first is None:
            return [], True
        batch, deadline = [first], time.monotonic() + BATCH_SECONDS
        while len(batch) < MAX_BATCH:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    def _write(self) -> None:
        is_last = False
        while not is_last:
            batch, is_last = self._take()
            if not self._store_until_done([item.received for item in batch if item.received]):
                return
            for item in batch:
                if item.qos:
                    with contextlib.suppress(ValueError):
                        self._client.ack(item.mid, item.qos)

    def _store_until_done(self, batch: Sequence[Received]) -> bool:
        """Write a batch, again after a while when the database refuses; False when we are stopping first."""
        while batch:
            try:
                self._store.apply(batch)
            except EdgekitError as error:
                logger.error("event=store_failed messages=%d error=%r", len(batch), error.message)  # noqa: TRY400 - it says all
                if self._is_stopping.wait(RETRY_SECONDS):
                    return False
            else:
                return True
        return True
