"""A small MQTT client on asyncio for bridges: connect with a will, subscribe, publish; it ends when the connection does.

>>> async with connect(address, options) as client:             # doctest: +SKIP
...     await client.subscribe([Filter(pattern="a/+")])
...     await client.publish("a/b", b"hello", qos=1)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from edgekit.errors import EnvironmentFault
from edgekit.fleet.config import BrokerAddress
from edgekit.fleet.packets import (
    ConnAck,
    ConnectOptions,
    Disconnect,
    Filter,
    PacketReader,
    PubAck,
    Publish,
    SubAck,
    Version,
    describe_reason,
    encode_connect,
    encode_disconnect,
    encode_pingreq,
    encode_puback,
    encode_publish,
    encode_subscribe,
)

ANSWER_S = 15.0
READ_BYTES = 1 << 16
FAILURE = 0x80
MAX_PACKET_ID = 65_535
MAX_UNCONFIRMED = 100


def broker_lost(address: BrokerAddress, why: str) -> EnvironmentFault:
    """The connection is gone, or never was."""
    return EnvironmentFault("broker.lost", f"{address}: {why}.", hint="Is the broker there, and does it let us in?")


class MqttClient:
    """One connection. Used from one event loop; messages wait in :attr:`messages` until they are read."""

    def __init__(
        self, address: BrokerAddress, version: Version, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.messages: asyncio.Queue[Publish] = asyncio.Queue()
        self.is_acknowledging = True
        """Acknowledge at once; else the reader calls :meth:`acknowledge`."""
        self._address, self._version = address, version
        self._reader, self._writer = reader, writer
        self._packets = PacketReader(version=version)
        self._packet_id = 0
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._welcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._places = asyncio.Semaphore(MAX_UNCONFIRMED)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended."""

    async def handshake(self, options: ConnectOptions) -> None:
        """Connect.

        Raises:
            EnvironmentFault: ``broker.lost``, also when the broker refuses.
        """
        self._write(encode_connect(options))
        reason = await self._wait(self._welcome)
        if reason:
            raise broker_lost(self._address, f"the broker refuses the connection: {describe_reason(reason)}")

    async def _wait(self, answer: asyncio.Future[int]) -> int:
        either: set[asyncio.Future[Any]] = {answer, self.lost}
        await asyncio.wait(either, timeout=ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise broker_lost(self._address, "the connection ended" if self.lost.done() else "no answer")
        return answer.result()

    async def subscribe(self, filters: Sequence[Filter]) -> None:
        """Subscribe, and wait until the broker confirms.

        Raises:
            EnvironmentFault: ``broker.lost``.
        """
        number, answer = self._ask()
        self._write(encode_subscribe(number, filters, version=self._version))
        reason = await self._wait(answer)
        if reason >= FAILURE:
            raise broker_lost(self._address, f"the broker refuses a subscription: {describe_reason(reason)}")

    async def publish(self, topic: str, payload: bytes, *, qos: int = 0, is_retained: bool = False) -> None:
        """Publish; with QoS 1 a place among ``MAX_UNCONFIRMED`` is waited for, the acknowledgement is not.

        Raises:
            EnvironmentFault: ``broker.lost``.
        """
        number = 0
        if qos:
            await self._places.acquire()
            number, answer = self._ask()
            answer.add_done_callback(lambda _answer: self._places.release())
        data = encode_publish(topic, payload, qos=qos, packet_id=number, is_retained=is_retained, version=self._version)
        self._write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def confirmed(self) -> None:
        """Wait until everything that was published with QoS 1 is acknowledged.

        Raises:
            EnvironmentFault: ``broker.lost``.
        """
        for answer in list(self._answers.values()):
            await self._wait(answer)

    def _ask(self) -> tuple[int, asyncio.Future[int]]:
        while True:
            self._packet_id = self._packet_id % MAX_PACKET_ID + 1
            if self._packet_id not in self._answers:
                break
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers[self._packet_id] = answer
        return self._packet_id, answer

    def _write(self, data: bytes) -> None:
        self.check()
        self._writer.write(data)

    async def read(self) -> None:
        """Read until the connection ends."""
        try:
            while data := await self._reader.read(READ_BYTES):
                for packet in self._packets.feed(data):
                    self._take(packet)
        except OSError:
            pass
        finally:
            if not self.lost.done():
                self.lost.set_result(None)

    def _take(self, packet: object) -> None:
        match packet:
            case ConnAck(reason=reason):
                if not self._welcome.done():
                    self._welcome.set_result(reason)
            case PubAck(packet_id=number, reason=reason):
                self._answer(number, reason)
            case SubAck(packet_id=number, reasons=reasons):
                self._answer(number, max(reasons, default=0))
            case Publish() as message:
                if self.is_acknowledging:
                    self.acknowledge(message)
                self.messages.put_nowait(message)
            case Disconnect():
                self._writer.close()
            case _:
                pass

    def acknowledge(self, message: Publish) -> None:
        """Tell the broker that a message is dealt with."""
        if message.qos and not self.lost.done():
            self._writer.write(encode_puback(message.packet_id))

    def _answer(self, number: int, reason: int) -> None:
        answer = self._answers.pop(number, None)
        if answer is not None and not answer.done():
            answer.set_result(reason)

    async def ping(self, each_s: float) -> None:
        """Keep the connection alive."""
        while True:
            await asyncio.sleep(each_s)
            self._write(encode_pingreq())

    def check(self) -> None:
        """Nothing while the connection stands.

        Raises:
            EnvironmentFault: ``broker.lost``.
        """
        if self.lost.done():
            raise broker_lost(self._address, "the connection ended")

    async def ended(self) -> None:
        """Wait for the end of the connection, and raise it."""
        await asyncio.shield(self.lost)
        self.check()

    async def close(self) -> None:
        """Say goodbye: the broker drops the will."""
        with contextlib.suppress(OSError, EnvironmentFault):
            self._write(encode_disconnect(version=self._version))
            await self._writer.drain()
        self._writer.close()

    def cut(self) -> None:
        """End without a goodbye: the broker publishes the will."""
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(address: BrokerAddress, options: ConnectOptions) -> AsyncIterator[MqttClient]:
    """A connection as long as the block lasts; user and password come from the address.

    Raises:
        EnvironmentFault: ``broker.lost``, ``broker.tls``.
    """
    context = address.tls_context()
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=context, server_hostname=address.host if context else None
            )
    except (OSError, TimeoutError) as error:
        raise broker_lost(address, str(error) or "no answer") from error
    client = MqttClient(address, options.version, reader, writer)
    tasks = [asyncio.ensure_future(client.read())]
    try:
        await client.handshake(_with_login(options, address))
        tasks.append(asyncio.ensure_future(client.ping(options.keep_alive_s / 2)))
        yield client
        await client.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer.close()


def _with_login(options: ConnectOptions, address: BrokerAddress) -> ConnectOptions:
    return ConnectOptions(**{**vars(options), "username": address.username, "password": address.password})
