"""One device's connection to the broker: MQTT 5 on an asyncio transport, without a task or a thread of its own.

The device says what goes next; at most twenty messages are on the way; what a lost connection took with it is given back to the
device and goes again. Like the agent's courier, it takes "no matching subscribers" for no delivery: the message waits.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from edgekit.fleet.packets import (
    ConnAck,
    ConnectOptions,
    Disconnect,
    Filter,
    Packet,
    PacketError,
    PacketReader,
    PubAck,
    Publish,
    SubAck,
    Will,
    describe_reason,
    encode_connect,
    encode_disconnect,
    encode_pingreq,
    encode_puback,
    encode_publish,
    encode_subscribe,
)
from edgekit.fleet.simulator.behaviour import Outgoing, SimulatedDevice
from edgekit.fleet.simulator.ledger import Ledger
from edgekit.telemetry.topics import ROOT

if TYPE_CHECKING:
    from edgekit.fleet.config import BrokerAddress

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 20
KEEP_ALIVE_S = 60
SESSION_S = 30
WILL_DELAY_S = 5
NOBODY_LISTENS = 0x10
FAILURE = 0x80
UNHEARD_S = 2.0
BACKOFF_BASE_S, BACKOFF_CAP_S = 1.0, 30.0
_MAX_PACKET_ID = 65_535


@dataclass
class Counters:
    """What all connections of a process did."""

    connected: int = 0
    connects: int = 0
    lost_connections: int = 0
    refused: int = 0
    sent: int = 0
    """Messages, each counted once however often it had to go."""
    resent: int = 0
    acknowledged: int = 0
    windows: int = 0
    """Acknowledged."""
    heartbeats: int = 0
    in_flight: int = 0
    unheard: int = 0
    rejected: int = 0
    desired: int = 0
    sent_bytes: int = 0
    last_error: str = ""


@dataclass
class Shared:
    """What the connections of a process have in common."""

    address: BrokerAddress
    context: ssl.SSLContext | None
    ledger: Ledger | None
    clock_ms: Callable[[], int]
    """The simulation's time."""
    on_heard: Callable[[SimulatedDevice], None] = lambda _device: None
    """A device's agenda may have changed."""
    counters: Counters = field(default_factory=Counters)
    is_stopping: bool = False


class DeviceLink(asyncio.Protocol):
    """See the module."""

    __slots__ = (
        "_failures",
        "_flight",
        "_is_connecting",
        "_packet_id",
        "_pause",
        "_reader",
        "_restarts",
        "_retry",
        "_topics",
        "_transport",
        "_wrote_at",
        "device",
        "is_connected",
        "shared",
    )

    def __init__(self, device: SimulatedDevice, shared: Shared) -> None:
        self.device, self.shared = device, shared
        self.is_connected = False
        self._topics = f"{ROOT}/{device.site}/{device.name}/"
        self._flight: dict[int, Outgoing] = {}
        self._packet_id = 0
        self._failures = 0
        self._restarts = device.restarts
        self._transport: asyncio.Transport | None = None
        self._reader = PacketReader()
        self._pause: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._wrote_at = 0.0
        self._is_connecting = False

    @property
    def in_flight(self) -> int:
        """Messages that wait for their acknowledgement."""
        return len(self._flight)

    # connecting

    def update(self) -> None:
        """Be connected if the device wants to be, and send what it has."""
        device = self.device
        if self._restarts != device.restarts:  # the process that had this connection is gone
            self._restarts = device.restarts
            self.cut()
        if not device.is_wanted_online or self.shared.is_stopping:
            self.cut()
        elif self._transport is None:
            if not self._is_connecting and self._retry is None:
                self._is_connecting = True
                asyncio.ensure_future(self._open())  # noqa: RUF006 - it ends by itself, and sets the flag
        elif self.is_connected:
            self.pump()

    async def _open(self) -> None:
        loop, shared = asyncio.get_running_loop(), self.shared
        address = shared.address
        try:
            async with asyncio.timeout(30):
                await loop.create_connection(
                    lambda: self,
                    address.host,
                    address.port,
                    ssl=shared.context,
                    server_hostname=address.host if shared.context else None,
                )
        except (OSError, TimeoutError) as error:
            shared.counters.last_error = str(error) or type(error).__name__
            self._again()
        finally:
            self._is_connecting = False

    def _again(self) -> None:
        """Try later, with full jitter."""
        if self.shared.is_stopping or self._retry is not None:
            return
        span = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(self._failures, 10))
        self._failures += 1

        def retry() -> None:
            self._retry = None
            self.update()

        self._retry = asyncio.get_running_loop().call_later(random.uniform(0.05, span), retry)  # noqa: S311 - a pause

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say who connects."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._reader = PacketReader()
        device, address = self.device, self.shared.address
        options = ConnectOptions(
            client_id=f"ek.{device.site}.{device.name}",
            is_clean_start=False,
            keep_alive_s=KEEP_ALIVE_S,
            session_s=SESSION_S,
            username=address.username,
            password=address.password,
            will=Will(topic=self._topics + "status", payload=device.will, is_retained=True, delay_s=WILL_DELAY_S),
        )
        self._write(encode_connect(options))

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what was on the way."""
        counters = self.shared.counters
        if exc is not None:
            counters.last_error = str(exc) or type(exc).__name__
        self._lose()
        self._transport = None
        self._return_flight()
        if self.device.is_wanted_online:
            self._again()

    def _lose(self) -> None:
        if self.is_connected:
            self.is_connected = False
            self.shared.counters.connected -= 1
            self.shared.counters.lost_connections += 1

    def _return_flight(self) -> None:
        counters, flight = self.shared.counters, list(self._flight.values())
        counters.in_flight -= len(flight)
        counters.sent -= len(flight)
        counters.resent += len(flight)
        self._flight.clear()
        self.device.give_back(flight)

    def cut(self) -> None:
        """Drop the connection without a goodbye, as a power cut does."""
        self._lose()
        if self._transport is not None:
            self._transport.abort()

    # receiving

    def data_received(self, data: bytes) -> None:
        """Read what the broker says."""
        try:
            packets = self._reader.feed(data)
        except PacketError as error:
            self.shared.counters.last_error = error.message
            self.cut()
            return
        for packet in packets:
            self._take(packet)

    def _take(self, packet: Packet) -> None:
        counters = self.shared.counters
        match packet:
            case PubAck(packet_id=packet_id, reason=reason):
                self._acknowledged(packet_id, reason)
            case Publish(topic=topic, payload=payload, packet_id=packet_id, qos=qos):
                if qos:
                    self._write(encode_puback(packet_id))
                if topic == self._topics + "des":
                    counters.desired += 1
                    self.device.hear(payload, now_ms=self.shared.clock_ms(), clock=datetime.now(UTC))
                    self.shared.on_heard(self.device)
                    self.pump()
            case ConnAck(reason=0):
                self._welcome()
            case ConnAck(reason=reason) | Disconnect(reason=reason):
                counters.refused += 1
                counters.last_error = describe_reason(reason)
                self.cut()
            case SubAck(reasons=reasons):
                if any(reason >= FAILURE for reason in reasons):
                    counters.last_error = f"subscription refused: {describe_reason(max(reasons))}"
            case _:
                pass

    def _welcome(self) -> None:
        counters = self.shared.counters
        counters.connected += 1
        counters.connects += 1
        self.is_connected, self._failures = True, 0
        if self.device.keys:
            self._write(encode_subscribe(self._take_id(), [Filter(pattern=self._topics + "des", qos=1)]))
        self.device.connected(self.shared.clock_ms())
        self.pump()

    def _acknowledged(self, packet_id: int, reason: int) -> None:
        message = self._flight.pop(packet_id, None)
        if message is None:
            return
        shared = self.shared
        shared.counters.in_flight -= 1
        if reason == NOBODY_LISTENS and not message.is_retained:
            shared.counters.unheard += 1
            self._hold(message)
        elif reason >= FAILURE:
            shared.counters.rejected += 1
            shared.counters.last_error = f"{message.verb}: {describe_reason(reason)}"
            self._hold(message)
        else:
            shared.counters.acknowledged += 1
            if message.kind == "w":
                shared.counters.windows += len(message.seqs)
            if shared.ledger is not None:
                shared.ledger.acknowledged(self.device.site, self.device.name, message)
        if self._pause is None:
            self.pump()

    def _hold(self, message: Outgoing) -> None:
        """The broker did not deliver it: it goes again after a pause."""
        self.shared.counters.sent -= 1
        self.shared.counters.resent += 1
        self.device.give_back([message])
        if self._pause is None:

            def resume() -> None:
                self._pause = None
                self.pump()

            self._pause = asyncio.get_running_loop().call_later(UNHEARD_S, resume)

    # sending

    def pump(self) -> None:
        """Send as much as may be on the way at once."""
        if not self.is_connected or self._pause is not None or self._transport is None:
            return
        shared, device = self.shared, self.device
        counters = shared.counters
        parts = []
        while len(self._flight) < MAX_IN_FLIGHT:
            message = device.next_message(shared.clock_ms())
            if message is None:
                break
            packet_id = 0
            if message.qos:
                packet_id = self._take_id()
                self._flight[packet_id] = message
                counters.in_flight += 1
                counters.sent += 1
                if shared.ledger is not None:
                    shared.ledger.sent(device.site, device.name, message)
            else:
                counters.heartbeats += 1
            parts.append(
                encode_publish(
                    self._topics + message.verb,
                    message.payload,
                    qos=message.qos,
                    packet_id=packet_id,
                    is_retained=message.is_retained,
                )
            )
        if parts:
            self._write(b"".join(parts))

    def _take_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % _MAX_PACKET_ID + 1
            if self._packet_id not in self._flight:
                return self._packet_id

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self.shared.counters.sent_bytes += len(data)
            self._wrote_at = asyncio.get_running_loop().time()
            self._transport.write(data)

    def keep_alive(self, now: float) -> None:
        """Ping when nothing was sent for half the keep-alive time."""
        if self.is_connected and now - self._wrote_at > KEEP_ALIVE_S / 2:
            self._write(encode_pingreq())

    def leave(self) -> None:
        """Say a clean goodbye and close."""
        if self._transport is not None and self.is_connected:
            death = self.device.goodbye(self.shared.clock_ms())
            goodbye = encode_publish(self._topics + "status", death, qos=1, packet_id=self._take_id(), is_retained=True)
            self._transport.write(goodbye + encode_disconnect())
            self.is_connected = False
            self.shared.counters.connected -= 1
            self._transport.close()
