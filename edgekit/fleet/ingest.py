"""From the broker into the store: acknowledged only after the commit, so that a crash loses nothing.

paho's network thread decodes and queues; one writer thread takes what has come together, writes it in one transaction and then
acknowledges each message. The session is persistent: while this server is away the broker keeps what arrives. Order does not
matter and what comes twice is one row, so several servers can share the subscriptions as a group. A single server must not: the
broker would go on giving a share to the session of a group's member that is gone.

A message that is malformed, or that the database can never hold, is counted for its device with the reason, acknowledged and
passed over: no device can hold up the others. When the database itself fails, nothing is acknowledged, and it is tried again.
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

from edgekit.errors import ArtifactError, EnvironmentFault
from edgekit.fleet.admission import check_message
from edgekit.fleet.config import BrokerAddress
from edgekit.fleet.store import Store
from edgekit.fleet.views import IngestStatus
from edgekit.fleet.writing import Fault, Received
from edgekit.schema.message import AnyMessage, Birth, Death, Event, Heartbeat, InputSample, Label, Reported, WindowBatch
from edgekit.telemetry.codec import decode
from edgekit.telemetry.topics import UPLINK, Verb, parse_topic, subscription

logger = logging.getLogger(__name__)

SHARED: tuple[Verb, ...] = ("w", "ev", "hb", "lb", "x")
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
    "lb": (Label,),
    "x": (InputSample,),
}


@dataclass(frozen=True)
class _Queued:
    """A message to write, or why it is not (None: not even its topic is ours), with its packet id and QoS."""

    content: Received | Fault | None
    mid: int
    qos: int


def _check_verb(message: AnyMessage, verb: Verb) -> None:
    if not isinstance(message, _KINDS.get(verb, ())):
        raise ArtifactError("telemetry.malformed", f"a {type(message).__name__} does not belong on this topic.")


def read_message(topic: str, payload: bytes, received_ms: int, *, is_retained: bool = False) -> Received | Fault:
    """A message from its topic and bytes, or why it is refused: malformed, out of range, or on another verb's topic.

    Raises:
        ArtifactError: ``telemetry.topic``.
    """
    site, device, verb = parse_topic(topic)
    try:
        message: AnyMessage = decode(payload)
        _check_verb(message, verb)
        check_message(message)
    except ArtifactError as error:
        return Fault(site=site, device=device, error=f"{verb}: {error.message}", received_ms=received_ms)
    return Received(site=site, device=device, message=message, received_ms=received_ms, is_retained=is_retained)


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
        content: Received | Fault | None = None
        try:
            payload, now_ms = bytes(message.payload), time.time_ns() // 1_000_000
            content = read_message(message.topic, payload, now_ms, is_retained=message.retain)
        except ArtifactError as error:
            self._refused(message.topic[:200], error.message)
        if isinstance(content, Fault):
            self._refused(message.topic[:200], content.error)
        self._queue.put(_Queued(content, message.mid, message.qos))

    def _refused(self, where: str, error: str) -> None:
        self.malformed += 1
        self.last_malformed = f"{where}: {error}"
        logger.warning("event=message_refused from=%r error=%r", where, error)

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
            received = [item.content for item in batch if isinstance(item.content, Received)]
            faults = [item.content for item in batch if isinstance(item.content, Fault)]
            if not self._store_until_done(received, faults):
                return
            for item in batch:
                if item.qos:
                    with contextlib.suppress(ValueError):
                        self._client.ack(item.mid, item.qos)

    def _store_until_done(self, batch: Sequence[Received], faults: Sequence[Fault]) -> bool:
        """Write a batch, again after a while when the database fails; False when we are stopping first."""
        while batch or faults:
            try:
                self._store.apply(batch, faults)
            except EnvironmentFault as error:
                logger.error("event=store_failed messages=%d error=%r", len(batch), error.message)  # noqa: TRY400 - it says all
                if self._is_stopping.wait(RETRY_SECONDS):
                    return False
            except Exception as error:
                if not batch:
                    logger.exception("event=fault_lost")
                    return True
                return self._store_one_by_one(batch, faults, error)
            else:
                return True
        return True

    def _store_one_by_one(self, batch: Sequence[Received], faults: Sequence[Fault], error: Exception) -> bool:
        """Find the message that cannot be stored, by halves, and note it as its device's fault."""
        if len(batch) > 1:
            middle = len(batch) // 2
            return self._store_until_done(batch[:middle], faults) and self._store_until_done(batch[middle:], ())
        item = batch[0]
        reason = f"{type(item.message).__name__}: {error}"
        self._refused(f"{item.site}/{item.device}", reason)
        if not isinstance(error, ArtifactError):
            logger.error("event=message_unstorable", exc_info=error)
        fault = Fault(site=item.site, device=item.device, error=reason, received_ms=item.received_ms)
        return self._store_until_done((), [*faults, fault])
