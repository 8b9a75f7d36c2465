"""Bridges at work: read the fleet again and again, publish what has changed, connect again when a connection is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from edgekit import __version__
from edgekit.errors import ArtifactError, EdgekitError
from edgekit.fleet.bridges.homeassistant import HomeAssistant
from edgekit.fleet.bridges.mqtt import MqttClient, connect
from edgekit.fleet.bridges.source import BridgedDevice, Fetch, read_devices
from edgekit.fleet.bridges.sparkplug import EdgeNode, Outgoing
from edgekit.fleet.bridges.telegraf import WindowReader, encode_line
from edgekit.fleet.config import BrokerAddress
from edgekit.fleet.packets import ConnectOptions, Filter, Publish
from edgekit.telemetry.codec import decode
from edgekit.telemetry.topics import parse_topic, subscription

logger = logging.getLogger(__name__)

BACKOFF_BASE_S, BACKOFF_CAP_S = 1.0, 30.0
STABLE_S = 30.0
SESSION_S = 3600
RECEIVE_MAXIMUM = 200


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass
class Fleet:
    """The newest reading of the fleet, for those who wait for a new one."""

    fetch: Fetch
    every_s: float
    devices: tuple[BridgedDevice, ...] = ()
    is_read: bool = False
    error: str = ""
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _readings: int = 0

    async def follow(self) -> None:
        """Read for ever; while the server does not answer, what was read last stands."""
        while True:
            try:
                self.devices = await asyncio.to_thread(read_devices, self.fetch)
            except EdgekitError as error:
                if error.message != self.error:
                    logger.warning("event=fleet_unread error=%r", error.message)
                self.error = error.message
            else:
                self.error, self.is_read = "", True
                async with self._news:
                    self._readings += 1
                    self._news.notify_all()
            await asyncio.sleep(self.every_s)

    async def newer(self, than: int) -> int:
        """Wait for a reading; its number."""
        async with self._news:
            await self._news.wait_for(lambda: self._readings > than)
            return self._readings


async def _forever(name: str, session: Callable[[], Awaitable[None]]) -> None:
    """A session after the other, with full jitter between those that fail."""
    failures = 0
    while True:
        began = time.monotonic()
        try:
            await session()
            failures = 0
        except EdgekitError as error:
            failures = 1 if time.monotonic() - began > STABLE_S else failures + 1
            if failures == 1 or failures % 20 == 0:
                logger.warning("event=bridge_lost bridge=%s failures=%d error=%r", name, failures, error.message)
            span = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(failures, 10))
            await asyncio.sleep(random.uniform(0.1, span))  # noqa: S311 - a pause


async def _first_of(client: MqttClient, *waits: Awaitable[object]) -> None:
    """Wait until one of them is done, then end them all.

    Raises:
        EnvironmentFault: ``broker.lost`` when the connection ended.
    """
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(each) for each in waits]
    try:
        await asyncio.wait({*tasks, client.lost}, return_when=asyncio.FIRST_COMPLETED)
        client.check()
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Sparkplug


@dataclass
class SparkplugBridge:
    """One connection an edge node, since each needs a will of its own."""

    fleet: Fleet
    address: BrokerAddress
    group: str
    primary_host: str = ""
    _nodes: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    sessions: dict[str, EdgeNode] = field(default_factory=dict)

    async def run(self) -> None:
        """Start an edge node for each site that appears; for ever."""
        reader = asyncio.ensure_future(self.fleet.follow())
        number = 0
        try:
            while True:
                number = await self.fleet.newer(number)
                for site in sorted({device.site for device in self.fleet.devices}):
                    if site not in self._nodes:
                        self._nodes[site] = asyncio.ensure_future(self._run_node(site))
        finally:
            tasks = [reader, *self._nodes.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_node(self, site: str) -> None:
        node = EdgeNode(group=self.group, name=site, software=f"edgekit {__version__}", primary_host=self.primary_host)
        self.sessions[site] = node
        await _forever(f"sparkplug/{site}", lambda: self._session(node))

    async def _session(self, node: EdgeNode) -> None:
        """From the connect to the end of the connection; returns when the primary host sent it away."""
        async with connect(self.address, node.connecting()) as client:
            await client.subscribe(node.filters)
            node.update(self._of(node), now_ms=now_ms())
            await _say(client, node.connected(now_ms=now_ms()))
            try:
                await _first_of(client, self._tell(node, client), self._hear(node, client))
            finally:
                if not client.lost.done():
                    await _say(client, [node.leaving()])
                    await client.close()

    def _of(self, node: EdgeNode) -> list[BridgedDevice]:
        return [device for device in self.fleet.devices if device.site == node.name]

    async def _tell(self, node: EdgeNode, client: MqttClient) -> None:
        number = 0
        while True:
            number = await self.fleet.newer(number)
            await _say(client, node.update(self._of(node), now_ms=now_ms()))

    @staticmethod
    async def _hear(node: EdgeNode, client: MqttClient) -> None:
        while not node.must_reconnect:
            message = await client.messages.get()
            await _say(client, node.hear(message.topic, message.payload, now_ms=now_ms()))


async def _say(client: MqttClient, messages: list[Outgoing]) -> None:
    for message in messages:
        await client.publish(message.topic, message.payload)


# Home Assistant


@dataclass
class HomeAssistantBridge:
    """One connection for the fleet."""

    fleet: Fleet
    address: BrokerAddress
    assistant: HomeAssistant
    client_id: str = "edgekit-homeassistant"

    async def run(self) -> None:
        """For ever."""
        reader = asyncio.ensure_future(self.fleet.follow())
        try:
            await self.fleet.newer(0)
            await _forever("homeassistant", self._session)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _session(self) -> None:
        async with connect(self.address, self.assistant.connecting(self.client_id)) as client:
            await self._publish(client)
            await client.subscribe(self.assistant.filters)
            try:
                await _first_of(client, self._tell(client), self._hear(client))
            finally:
                if not client.lost.done():
                    gone = self.assistant.leaving()
                    await client.publish(gone.topic, gone.payload, qos=1, is_retained=True)
                    await client.confirmed()
                    await client.close()

    async def _publish(self, client: MqttClient) -> None:
        for topic, payload in self.assistant.update(self.fleet.devices):
            await client.publish(topic, payload, qos=1, is_retained=True)

    async def _tell(self, client: MqttClient) -> None:
        number = 0
        while True:
            number = await self.fleet.newer(number)
            await self._publish(client)

    async def _hear(self, client: MqttClient) -> None:
        while True:
            message = await client.messages.get()
            for topic, payload in self.assistant.hear(message.topic, message.payload):
                await client.publish(topic, payload, qos=1, is_retained=True)


# windows as JSON


@dataclass
class JsonBridge:
    """Reads the devices' broker and publishes each window as JSON; a session at the broker keeps what comes meanwhile."""

    address: BrokerAddress
    target: BrokerAddress
    prefix: str = "edgekit-json"
    client_id: str = "edgekit-json"
    told: int = 0
    refused: int = 0
    is_connected: bool = False
    """Whether it is subscribed."""
    reader: WindowReader = field(default_factory=WindowReader)

    async def run(self) -> None:
        """For ever."""
        await _forever("json", self._session)

    async def _session(self) -> None:
        source = ConnectOptions(
            client_id=self.client_id,
            is_clean_start=False,
            session_s=SESSION_S,
            receive_maximum=RECEIVE_MAXIMUM,
            keep_alive_s=30,
        )
        async with (
            connect(self.target, ConnectOptions(client_id=f"{self.client_id}-out", keep_alive_s=30)) as target,
            connect(self.address, source) as client,
        ):
            client.is_acknowledging = False
            await client.subscribe([Filter(pattern=subscription("status"), qos=1), Filter(pattern=subscription("w"), qos=1)])
            self.is_connected = True
            try:
                await _first_of(client, self._copy(client, target), target.ended())
            finally:
                self.is_connected = False

    async def _copy(self, client: MqttClient, target: MqttClient) -> None:
        while True:
            message = await client.messages.get()
            await self._tell(message, target)
            client.acknowledge(message)

    async def _tell(self, message: Publish, target: MqttClient) -> None:
        try:
            site, device, _verb = parse_topic(message.topic)
            lines = self.reader.take(site, device, decode(message.payload))
        except ArtifactError as error:
            self.refused += 1
            logger.debug("event=message_refused topic=%s error=%r", message.topic, error.message)
            return
        for line in lines:
            await target.publish(f"{self.prefix}/{site}/{device}", encode_line(line), qos=1)
            self.told += 1
        await target.confirmed()


def run_bridge(bridge: SparkplugBridge | HomeAssistantBridge | JsonBridge) -> None:
    """Run one until SIGINT or SIGTERM; it says goodbye then."""

    async def whole() -> None:
        task = asyncio.ensure_future(bridge.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(whole())
