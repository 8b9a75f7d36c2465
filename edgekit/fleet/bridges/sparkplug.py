"""An edge node of Sparkplug B 3.0, without I/O: one site of the fleet, whose devices are its Sparkplug devices.

It implements what the specification asks of an edge node that reports and takes no commands but the rebirth: a will as death
certificate with ``bdSeq``, births before data, ``seq`` from 0 to 255, aliases, data by exception, waiting for a primary host.
MQTT 3.1.1, clean sessions, QoS 0 for births and data as the specification wants it: a host that misses one asks for a rebirth.

>>> node = EdgeNode(group="plant", name="lab", software="edgekit 0.1.0")
>>> node.connecting().will.topic
'spBv1.0/plant/NDEATH/lab'
>>> [message.topic for message in node.update([], now_ms=1)], node.is_born
([], False)
>>> [message.topic for message in node.connected(now_ms=2)]
['spBv1.0/plant/NBIRTH/lab']
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgekit.errors import ArtifactError, UsageError
from edgekit.fleet.bridges.payload import DataType, Metric, Payload, Value, decode_payload, encode_payload
from edgekit.fleet.bridges.source import BridgedDevice
from edgekit.fleet.packets import ConnectOptions, Filter, Will

logger = logging.getLogger(__name__)

NAMESPACE = "spBv1.0"
MAX_SEQ = 256
REBIRTH = "Node Control/Rebirth"
BDSEQ = "bdSeq"
KEEP_ALIVE_S = 30
DEVICE_METRICS: tuple[tuple[str, DataType, str], ...] = (
    ("State", DataType.STRING, "state"),
    ("Model/Name", DataType.STRING, "model"),
    ("Model/Version", DataType.STRING, "version"),
    ("Model/Digest", DataType.STRING, "model_digest"),
    ("Model/Refused", DataType.INT32, "refused"),
    ("Model/Drift", DataType.DOUBLE, "drift"),
    ("Inference/Latency p50 ms", DataType.DOUBLE, "latency_p50_ms"),
    ("Inference/Latency p99 ms", DataType.DOUBLE, "latency_p99_ms"),
    ("Inference/Per Second", DataType.DOUBLE, "throughput_per_s"),
    ("Host/CPU Percent", DataType.DOUBLE, "cpu_percent"),
    ("Host/Memory MB", DataType.DOUBLE, "rss_mb"),
    ("Host/Architecture", DataType.STRING, "arch"),
    ("Agent/Version", DataType.STRING, "agent_version"),
    ("Agent/Outbox", DataType.INT64, "outbox"),
    ("Agent/Last Error", DataType.STRING, "last_error"),
)
"""Name, type, and the field of :class:`BridgedDevice`; the same for every device, all of them in its birth."""
STATES = ("online", "stale", "offline")


class Outgoing(NamedTuple):
    """A message to publish, QoS 0 and not retained."""

    topic: str
    payload: bytes


def check_id(text: str, what: str) -> str:
    """A Sparkplug id: not empty, without ``+``, ``/`` and ``#``.

    Raises:
        UsageError: ``sparkplug.id``.
    """
    if not text or any(sign in text for sign in "+/#"):
        raise UsageError("sparkplug.id", f"{what} {text!r}: must not be empty, nor hold +, / or #.")
    return text


@dataclass
class _Born:
    """A device whose birth was published: its aliases and the values that were told last."""

    aliases: dict[str, int]
    values: dict[str, Value | None]


@dataclass
class EdgeNode:
    """See the module. Times are Unix milliseconds, UTC."""

    group: str
    name: str
    software: str
    primary_host: str = ""
    is_connected: bool = False
    is_born: bool = False
    must_reconnect: bool = False
    """The primary host went away: publish the death certificate, disconnect, connect again."""
    _bd_seq: int = -1
    _seq: int = 0
    _aliases: int = 0
    _node_aliases: dict[str, int] = field(default_factory=dict)
    _node_values: dict[str, Value | None] = field(default_factory=dict)
    _born: dict[str, _Born] = field(default_factory=dict)
    _devices: dict[str, BridgedDevice] = field(default_factory=dict)
    _is_host_online: bool = False
    _host_timestamp: int = -1

    def __post_init__(self) -> None:
        check_id(self.group, "group id")
        check_id(self.name, "edge node id")
        if self.primary_host:
            check_id(self.primary_host, "host application id")

    # the session

    @property
    def client_id(self) -> str:
        """Stable, and different for each edge node."""
        return f"edgekit-sparkplug.{self.group}.{self.name}"

    def topic(self, verb: str, device: str = "") -> str:
        """The topic of a message type, with the device for those of devices."""
        return f"{NAMESPACE}/{self.group}/{verb}/{self.name}{f'/{device}' if device else ''}"

    @property
    def host_topic(self) -> str:
        """Where the primary host says whether it is there."""
        return f"{NAMESPACE}/STATE/{self.primary_host}"

    @property
    def filters(self) -> tuple[Filter, ...]:
        """What it subscribes to, before it publishes anything."""
        wanted = [Filter(pattern=self.topic("NCMD"), qos=1)]
        return (*wanted, Filter(pattern=self.host_topic, qos=1)) if self.primary_host else tuple(wanted)

    def connecting(self) -> ConnectOptions:
        """The next connect: a clean session, and a death certificate with the next ``bdSeq`` as its will."""
        self._bd_seq = (self._bd_seq + 1) % MAX_SEQ
        self.is_connected = self.is_born = self.must_reconnect = False
        self._is_host_online = False
        will = Will(topic=self.topic("NDEATH"), payload=self._death(), qos=1, is_retained=False)
        return ConnectOptions(client_id=self.client_id, version=4, is_clean_start=True, keep_alive_s=KEEP_ALIVE_S, will=will)

    def connected(self, *, now_ms: int) -> list[Outgoing]:
        """The session stands and the subscriptions are confirmed; the births, unless a primary host must come first."""
        self.is_connected = True
        return self._birth(now_ms) if self._may_publish else []

    @property
    def _may_publish(self) -> bool:
        return self.is_connected and (not self.primary_host or self._is_host_online)

    def leaving(self) -> Outgoing:
        """The death certificate, to be published before an intended disconnect."""
        self.is_connected = self.is_born = False
        return Outgoing(self.topic("NDEATH"), self._death())

    def _death(self) -> bytes:
        metric = Metric(name=BDSEQ, datatype=DataType.INT64, value=self._bd_seq)
        return encode_payload(Payload(metrics=(metric,)))

    # saying

    def _next_seq(self) -> int:
        self._seq = (self._seq + 1) % MAX_SEQ
        return self._seq

    def _next_alias(self) -> int:
        self._aliases += 1
        return self._aliases

    def _birth(self, now_ms: int) -> list[Outgoing]:
        """The whole sequence: the node's birth with ``seq`` 0, then the births of the devices that are there."""
        self._seq, self._aliases, self.is_born = 0, 0, True
        self._born.clear()
        self._node_values = self._count_states()
        self._node_aliases = {name: self._next_alias() for name in self._node_values}
        metrics = [
            Metric(name=BDSEQ, timestamp=now_ms, datatype=DataType.INT64, value=self._bd_seq),
            Metric(name=REBIRTH, timestamp=now_ms, datatype=DataType.BOOLEAN, value=False),
            Metric(
                name="Properties/Software",
                alias=self._next_alias(),
                timestamp=now_ms,
                datatype=DataType.STRING,
                value=self.software,
            ),
        ]
        metrics += [
            Metric(name=name, alias=self._node_aliases[name], timestamp=now_ms, datatype=DataType.INT32, value=value)
            for name, value in self._node_values.items()
        ]
        payload = Payload(timestamp=now_ms, metrics=tuple(metrics), seq=0)
        births = [Outgoing(self.topic("NBIRTH"), encode_payload(payload))]
        return [*births, *(self._device_birth(each, now_ms) for each in self._devices.values() if _is_alive(each))]

    def _device_birth(self, device: BridgedDevice, now_ms: int) -> Outgoing:
        values = _values(device)
        aliases = {name: self._next_alias() for name in values}
        self._born[device.device] = _Born(aliases=aliases, values=values)
        metrics = [
            Metric(name=name, alias=aliases[name], timestamp=now_ms, datatype=datatype, value=values[name])
            for name, datatype, _field in DEVICE_METRICS
        ]
        payload = Payload(timestamp=now_ms, metrics=tuple(metrics), seq=self._next_seq())
        return Outgoing(self.topic("DBIRTH", device.device), encode_payload(payload))

    def _device_death(self, device: str, now_ms: int) -> Outgoing:
        del self._born[device]
        return Outgoing(self.topic("DDEATH", device), encode_payload(Payload(timestamp=now_ms, seq=self._next_seq())))

    def update(self, devices: Iterable[BridgedDevice], *, now_ms: int) -> list[Outgoing]:
        """The site's devices as they are now; what there is to say of it.

        Args:
            devices: all of the site.
            now_ms: the time.
        """
        self._devices = {device.device: device for device in devices}
        if not self.is_born:
            return []
        gone = [name for name in self._born if name not in self._devices or not _is_alive(self._devices[name])]
        told = [self._device_death(name, now_ms) for name in gone]
        for device in self._devices.values():
            if not _is_alive(device):
                continue
            born = self._born.get(device.device)
            if born is None:
                told.append(self._device_birth(device, now_ms))
            elif (changed := _changes(born.values, _values(device))) is not None:
                born.values |= changed
                told.append(self._data("DDATA", device.device, changed, born.aliases, now_ms))
        counts = _changes(self._node_values, self._count_states())
        if counts is not None:
            self._node_values |= counts
            told.append(self._data("NDATA", "", counts, self._node_aliases, now_ms))
        return told

    def _data(
        self, verb: str, device: str, changed: Mapping[str, Value | None], aliases: Mapping[str, int], now_ms: int
    ) -> Outgoing:
        types = {name: datatype for name, datatype, _field in DEVICE_METRICS}
        metrics = tuple(
            Metric(
                alias=aliases[name],
                timestamp=now_ms,
                datatype=types.get(name, DataType.INT32),
                value=value,
                has_type=False,
            )
            for name, value in changed.items()
        )
        payload = Payload(timestamp=now_ms, metrics=metrics, seq=self._next_seq())
        return Outgoing(self.topic(verb, device), encode_payload(payload))

    def _count_states(self) -> dict[str, Value | None]:
        states = [device.state for device in self._devices.values()]
        return {f"Devices/{state.capitalize()}": states.count(state) for state in STATES}

    # hearing

    def hear(self, topic: str, payload: bytes, *, now_ms: int) -> list[Outgoing]:
        """A message arrived; what there is to say now."""
        if self.primary_host and topic == self.host_topic:
            return self._hear_host(payload, now_ms)
        if topic != self.topic("NCMD") or not self.is_born:
            return []
        try:
            asked = decode_payload(payload).metrics
        except ArtifactError as error:
            logger.warning("event=command_refused node=%s error=%r", self.name, error.message)
            return []
        if any(metric.name == REBIRTH and metric.value is True for metric in asked):
            return self._birth(now_ms)
        names: Sequence[str] = [metric.name or str(metric.alias) for metric in asked]
        logger.warning("event=command_refused node=%s metrics=%s", self.name, ",".join(names)[:200])
        return []

    def _hear_host(self, payload: bytes, now_ms: int) -> list[Outgoing]:
        """The primary host's state; one that is older than the last is of no account."""
        try:
            state = json.loads(payload)
            is_online, timestamp = state["online"], state["timestamp"]
        except (ValueError, KeyError, TypeError):
            logger.warning("event=host_state_refused node=%s", self.name)
            return []
        if type(is_online) is not bool or type(timestamp) is not int or timestamp < self._host_timestamp:
            return []
        self._host_timestamp, self._is_host_online = timestamp, is_online
        if is_online:
            return self._birth(now_ms) if self.is_connected and not self.is_born else []
        self.must_reconnect = self.is_born
        return []


def _is_alive(device: BridgedDevice) -> bool:
    return device.state != "offline"


def _values(device: BridgedDevice) -> dict[str, Value | None]:
    return {name: getattr(device, source) for name, _datatype, source in DEVICE_METRICS}


def _changes(before: Mapping[str, Value | None], now: Mapping[str, Value | None]) -> dict[str, Value | None] | None:
    """What is different; None when nothing is."""
    return {name: value for name, value in now.items() if before.get(name) != value} or None
