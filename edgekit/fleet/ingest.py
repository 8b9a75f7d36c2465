"""From the broker into the store: acknowledged only after the commit, so that a crash loses nothing.

One thread speaks MQTT 5 over its own socket (:mod:`edgekit.fleet.packets`) and decodes; another takes what has come together,
writes it in one transaction and then has each message acknowledged. The session is persistent: while this server is away the
broker keeps what arrives. Order does not matter and what comes twice is one row.

The broker may have sent ``RECEIVE_MAXIMUM`` messages that are not acknowledged yet and no more: when the database is slow or
away, nothing is acknowledged, the rest waits in the broker, and the memory here stays bounded. Messages of QoS 0 have no such
limit, so above ``MAX_WAITING_BYTES`` the socket is not read until the database has caught up.

Several servers with one database share the subscriptions as a group, each under a client id of its own. ``status`` and ``rep``
are retained, and retained messages do not reach shared subscriptions: every server of the group gets all of those, and the
store has each once. A single server must not use a group: the broker goes on giving a share to the session of a member that
is gone, until it comes back under its name or the session ends after ``SESSION_SECONDS``.

A message that is malformed, or that the database can never hold, is counted for its device with the reason, acknowledged and
passed over: no device can hold up the others. When the database itself fails, it is tried again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.errors import ArtifactError, EnvironmentFault
from edgekit.fleet.admission import check_message
from edgekit.fleet.config import BrokerAddress
from edgekit.fleet.link import Link
from edgekit.fleet.packets import (
    ConnAck,
    ConnectOptions,
    Disconnect,
    Filter,
    Packet,
    PacketReader,
    Publish,
    SubAck,
    describe_reason,
    encode_connect,
    encode_disconnect,
    encode_pingreq,
    encode_puback,
    encode_subscribe,
)
from edgekit.fleet.store import Store
from edgekit.fleet.views import IngestStatus
from edgekit.fleet.writing import Fault, Received
from edgekit.schema.message import AnyMessage, Birth, Death, Event, Heartbeat, InputSample, Label, Reported, WindowBatch
from edgekit.telemetry.codec import decode
from edgekit.telemetry.topics import UPLINK, Verb, parse_topic, subscription

logger = logging.getLogger(__name__)

SHARED: tuple[Verb, ...] = ("w", "ev", "hb", "lb", "x")
"""Shared within a group."""
MAX_BATCH = 1000
MAX_BATCH_BYTES = 16 << 20
BATCH_SECONDS = 0.05
QUIET_SECONDS = 0.003
"""A batch is begun when nothing has arrived for so long."""
RETRY_SECONDS = 2.0
SESSION_SECONDS = 24 * 3600
RECEIVE_MAXIMUM = 2000
MAX_WAITING_BYTES = 64 << 20
MAX_PACKET_BYTES = 1 << 20
"""What the broker is asked not to exceed; it drops larger messages for us."""
MAX_READ_BYTES = 16 << 20
"""What a broker that does not care may send before we leave it."""
KEEP_ALIVE_SECONDS = 30
ANSWER_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 30.0
FIRST_BACKOFF_SECONDS = 0.5
LOG_SECONDS = 1.0
_TAKEN_OVER = 0x8E
_SUBSCRIBE_ID = 1
_jitter = random.Random()  # noqa: S311 - it spreads connections, and guards nothing
_KINDS: dict[str, tuple[type, ...]] = {
    "status": (Birth, Death),
    "hb": (Heartbeat,),
    "w": (WindowBatch,),
    "ev": (Event,),
    "rep": (Reported,),
    "lb": (Label,),
    "x": (InputSample,),
}


@dataclass(frozen=True, slots=True)
class _Queued:
    """A message to write, or why it is not (None: not even its topic is ours), with how to acknowledge it."""

    content: Received | Fault | None
    packet_id: int
    """0 with QoS 0."""
    connection: int
    """Which connection it came by: on another one its packet id means nothing."""
    size: int
    arrived: float


class _RefusedError(Exception):
    """The broker does not want us."""


def backoff_seconds(attempt: int) -> float:
    """How long to wait before connecting again: anything up to a limit that doubles, so that a fleet does not come at once."""
    return _jitter.uniform(0.0, min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt, 16)))


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
        self._client_id = client_id
        self._group = group
        self._follower = threading.Thread(target=self._follow, name="ingest-broker", daemon=True)
        self._writer = threading.Thread(target=self._write, name="ingest-writer", daemon=True)
        self._is_stopping = threading.Event()
        self._is_written = threading.Event()
        self._changed = threading.Condition()
        self._waiting: deque[_Queued] = deque()
        self._writing: list[_Queued] = []
        self._waiting_bytes = 0
        self._unacknowledged = 0
        self._acks = bytearray()
        self._connection = 0
        self._link: Link | None = None
        self._is_subscribed = False
        self._is_taken_over = False
        self._logged = 0.0
        self.received = 0
        self.malformed = 0
        self.last_malformed = ""
        self.last_error = ""

    def start(self) -> None:
        """Connect in the background, again and again until the broker is there."""
        self._writer.start()
        self._follower.start()

    def stop(self) -> None:
        """Write what is here, acknowledge it, and disconnect; the session stays at the broker."""
        self._is_stopping.set()
        with self._changed:
            self._changed.notify_all()
        self._wake()
        for thread in (self._writer, self._follower):
            if thread.is_alive():
                thread.join(timeout=10)

    def status(self) -> IngestStatus:
        """How it is doing."""
        with self._changed:
            waiting = [*self._writing[:1], *([self._waiting[0]] if self._waiting else [])]
            number, unacknowledged = len(self._writing) + len(self._waiting), self._unacknowledged
        return IngestStatus(
            is_broker_connected=self._is_subscribed,
            broker=str(self._broker),
            received=self.received,
            stored=self._store.stored,
            duplicates=self._store.duplicates,
            malformed=self.malformed,
            last_malformed=self.last_malformed,
            windows=self._store.windows,
            waiting=number,
            lag_s=max((time.monotonic() - item.arrived for item in waiting), default=0.0),
            is_held_back=unacknowledged >= RECEIVE_MAXIMUM or self._waiting_bytes > MAX_WAITING_BYTES,
            reconnects=max(0, self._connection - 1),
            last_error=self.last_error,
        )

    # the broker's side, in one thread

    def _follow(self) -> None:
        """Connect, and again after a while whenever the connection ends."""
        attempt = 0
        while not self._is_stopping.is_set():
            try:
                self._follow_once()
            except (OSError, ArtifactError, EnvironmentFault, _RefusedError) as error:
                attempt = 0 if self._is_subscribed else attempt + 1
                self._lose(str(error))
            if self._is_taken_over:
                attempt, self._is_taken_over = max(attempt, 6), False
            self._is_stopping.wait(backoff_seconds(attempt))

    def _lose(self, error: str) -> None:
        self._is_subscribed = False
        with self._changed:
            self._acks.clear()
            self._unacknowledged = 0
        self.last_error = f"{self._broker}: {error}"
        if not self._is_stopping.is_set():
            logger.warning("event=broker_lost broker=%s error=%r", self._broker, error)

    def _follow_once(self) -> None:
        """One connection, to its end."""
        link = Link(self._broker)
        try:
            with self._changed:
                self._connection += 1
                self._acks.clear()
                self._unacknowledged = 0
                self._link = link
            reader = PacketReader(max_bytes=MAX_READ_BYTES)
            rest = self._greet(link, reader)
            self._take(rest)
            self._run(link, reader)
            link.send(encode_disconnect())
        finally:
            with self._changed:
                self._link = None
            self._is_subscribed = self._is_subscribed and not self._is_stopping.is_set()
            link.close()

    def _greet(self, link: Link, reader: PacketReader) -> list[Packet]:
        """Connect and subscribe; what came after the answer."""
        options = ConnectOptions(
            client_id=self._client_id,
            is_clean_start=False,
            keep_alive_s=KEEP_ALIVE_SECONDS,
            session_s=SESSION_SECONDS,
            receive_maximum=RECEIVE_MAXIMUM,
            maximum_packet_bytes=MAX_PACKET_BYTES,
            username=self._broker.username,
            password=self._broker.password,
        )
        link.send(encode_connect(options))
        packets: list[Packet] = []
        deadline = time.monotonic() + ANSWER_SECONDS
        while not packets:
            if time.monotonic() > deadline or self._is_stopping.is_set():
                raise TimeoutError("no answer to the connect")
            packets += reader.feed(link.wait(0.2) or b"")
        answer, *rest = packets
        if not isinstance(answer, ConnAck):
            raise _RefusedError("it does not speak MQTT 5")
        if answer.reason:
            raise _RefusedError(f"refused: {describe_reason(answer.reason)} {answer.reason_text}".rstrip())
        logger.info("event=broker_connected broker=%s session=%s", self._broker, answer.is_session_present)
        # retained messages again at the first connect, since the database may be another one than the session knew
        again = self._connection == 1 or not answer.is_session_present
        link.send(encode_subscribe(_SUBSCRIBE_ID, self._filters(is_all_wanted=again)))
        return rest

    def _filters(self, *, is_all_wanted: bool) -> list[Filter]:
        return [
            Filter(
                pattern=subscription(verb, group=self._group if verb in SHARED else ""),
                qos=0 if verb == "hb" else 1,
                retain_handling=0 if is_all_wanted else 1,
            )
            for verb in UPLINK
        ]

    def _run(self, link: Link, reader: PacketReader) -> None:
        """Take messages and send acknowledgements, until we are stopping and everything is written."""
        heard = pinged = time.monotonic()
        while not self._is_written.is_set():
            with self._changed:
                acks, self._acks = bytes(self._acks), bytearray()
                is_reading = self._waiting_bytes <= MAX_WAITING_BYTES and not self._is_stopping.is_set()
            if acks:
                link.send(acks)
            data = link.wait(1.0, is_reading=is_reading)
            now = time.monotonic()
            if data:
                heard = now
                self._take(reader.feed(data))
            elif not is_reading:
                heard = now
            if now - pinged > KEEP_ALIVE_SECONDS / 2:
                link.send(encode_pingreq())
                pinged = now
            if now - heard > KEEP_ALIVE_SECONDS * 1.5:
                raise TimeoutError("nothing was heard of it")
        with self._changed:
            link.send(bytes(self._acks))
            self._acks.clear()

    def _take(self, packets: Sequence[Packet]) -> None:
        """What the broker sent."""
        for packet in packets:
            match packet:
                case Publish():
                    self._take_message(packet)
                case SubAck(packet_id=packet_id, reasons=reasons) if packet_id == _SUBSCRIBE_ID:
                    self._take_subscription(reasons)
                case Disconnect(reason=reason, reason_text=text):
                    self._is_taken_over = reason == _TAKEN_OVER
                    hint = f"; another client uses the id {self._client_id!r}" if self._is_taken_over else ""
                    raise _RefusedError(f"it ended the connection: {describe_reason(reason)} {text}".rstrip() + hint)
                case _:
                    pass

    def _take_subscription(self, reasons: Sequence[int]) -> None:
        refused = [
            f"{verb}: {describe_reason(reason)}" for verb, reason in zip(UPLINK, reasons, strict=False) if reason >= 0x80
        ]
        if refused:
            raise _RefusedError(f"subscriptions refused: {', '.join(refused)}")
        self._is_subscribed, self.last_error = True, ""

    def _take_message(self, packet: Publish) -> None:
        self.received += 1
        content: Received | Fault | None = None
        try:
            content = read_message(packet.topic, packet.payload, time.time_ns() // 1_000_000, is_retained=packet.is_retained)
        except ArtifactError as error:
            self._refused(packet.topic[:200], error.message)
        if isinstance(content, Fault):
            self._refused(packet.topic[:200], content.error)
        size = len(packet.payload)
        item = _Queued(content, packet.packet_id, self._connection, size, time.monotonic())
        with self._changed:
            self._waiting.append(item)
            self._waiting_bytes += size
            self._unacknowledged += packet.qos
            if len(self._waiting) == 1:
                self._changed.notify_all()

    def _refused(self, where: str, error: str) -> None:
        self.malformed += 1
        self.last_malformed = f"{where}: {error}"
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.warning("event=message_refused from=%r error=%r all=%d", where, error, self.malformed)

    def _wake(self) -> None:
        with self._changed:
            link = self._link
        if link is not None:
            link.wake()

    # the database's side, in another

    def _take_batch(self) -> list[_Queued]:
        """What has come together; empty when we are stopping and nothing is left."""
        with self._changed:
            while not self._waiting and not self._is_stopping.is_set():
                self._changed.wait(1.0)
            before = len(self._waiting)
        deadline = time.monotonic() + BATCH_SECONDS
        while before < MAX_BATCH and time.monotonic() < deadline and not self._is_stopping.is_set():
            time.sleep(QUIET_SECONDS)
            if len(self._waiting) == before:
                break
            before = len(self._waiting)
        batch: list[_Queued] = []
        size = 0
        with self._changed:
            while self._waiting and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
                batch.append(self._waiting.popleft())
                size += batch[-1].size
            self._writing = batch
        return batch

    def _write(self) -> None:
        try:
            while batch := self._take_batch():
                received = [item.content for item in batch if isinstance(item.content, Received)]
                faults = [item.content for item in batch if isinstance(item.content, Fault)]
                if not self._store_until_done(received, faults):
                    return
                self._acknowledge(batch)
        finally:
            self._is_written.set()
            self._wake()

    def _acknowledge(self, batch: Sequence[_Queued]) -> None:
        """Have the messages acknowledged that came by the connection that is open now."""
        with self._changed:
            self._writing = []
            self._waiting_bytes -= sum(item.size for item in batch)
            ours = [item.packet_id for item in batch if item.packet_id and item.connection == self._connection]
            self._acks += b"".join(map(encode_puback, ours))
            self._unacknowledged = max(0, self._unacknowledged - len(ours))
        self._wake()

    def _store_until_done(self, batch: Sequence[Received], faults: Sequence[Fault]) -> bool:
        """Write a batch, again after a while when the database fails; False when we are stopping first."""
        while batch or faults:
            try:
                self._store.apply(batch, faults)
            except EnvironmentFault as error:
                self.last_error = error.message
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
