"""Sparkplug payloads by an independent implementation of protobuf, and an edge node that goes through a whole session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from edgekit.fleet.bridges.source import BridgedDevice
from edgekit.fleet.bridges.sparkplug import EdgeNode, Outgoing
from edgekit.fleet.packets import ConnectOptions

T0 = 1_790_000_000_000
_KINDS = descriptor_pb2.FieldDescriptorProto


def _make_payload_class() -> Any:
    """The part of the schema of Sparkplug B (specification 3.0, section 6.4.1) that edge nodes of ours and hosts exchange."""
    file = descriptor_pb2.FileDescriptorProto(name="sparkplug_test.proto", package="test.sparkplug", syntax="proto2")
    payload = file.message_type.add(name="Payload")
    metric = payload.nested_type.add(name="Metric")
    metric.oneof_decl.add(name="value")
    plain = (
        ("name", 1, _KINDS.TYPE_STRING),
        ("alias", 2, _KINDS.TYPE_UINT64),
        ("timestamp", 3, _KINDS.TYPE_UINT64),
        ("datatype", 4, _KINDS.TYPE_UINT32),
        ("is_historical", 5, _KINDS.TYPE_BOOL),
        ("is_transient", 6, _KINDS.TYPE_BOOL),
        ("is_null", 7, _KINDS.TYPE_BOOL),
    )
    values = (
        ("int_value", 10, _KINDS.TYPE_UINT32),
        ("long_value", 11, _KINDS.TYPE_UINT64),
        ("float_value", 12, _KINDS.TYPE_FLOAT),
        ("double_value", 13, _KINDS.TYPE_DOUBLE),
        ("boolean_value", 14, _KINDS.TYPE_BOOL),
        ("string_value", 15, _KINDS.TYPE_STRING),
        ("bytes_value", 16, _KINDS.TYPE_BYTES),
    )
    for name, number, kind in plain:
        metric.field.add(name=name, number=number, type=kind, label=_KINDS.LABEL_OPTIONAL)
    for name, number, kind in values:
        metric.field.add(name=name, number=number, type=kind, label=_KINDS.LABEL_OPTIONAL, oneof_index=0)
    payload.field.add(name="timestamp", number=1, type=_KINDS.TYPE_UINT64, label=_KINDS.LABEL_OPTIONAL)
    payload.field.add(
        name="metrics",
        number=2,
        type=_KINDS.TYPE_MESSAGE,
        type_name=".test.sparkplug.Payload.Metric",
        label=_KINDS.LABEL_REPEATED,
    )
    payload.field.add(name="seq", number=3, type=_KINDS.TYPE_UINT64, label=_KINDS.LABEL_OPTIONAL)
    payload.field.add(name="uuid", number=4, type=_KINDS.TYPE_STRING, label=_KINDS.LABEL_OPTIONAL)
    payload.field.add(name="body", number=5, type=_KINDS.TYPE_BYTES, label=_KINDS.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.sparkplug.Payload"))


PAYLOAD = _make_payload_class()


def parse(data: bytes) -> Any:
    """A payload, refusing what the schema does not know."""
    found = PAYLOAD()
    assert found.ParseFromString(data) == len(data)
    assert found.SerializeToString(deterministic=True) == data
    return found


def value_of(metric: Any) -> Any:
    return None if metric.is_null else getattr(metric, metric.WhichOneof("value"))


def by_name(payload: Any) -> dict[str, Any]:
    return {metric.name: metric for metric in payload.metrics}


def rebirth_request(value: bool = True, name: str = "Node Control/Rebirth") -> bytes:
    request = PAYLOAD(timestamp=T0)
    request.metrics.add(name=name, datatype=11, boolean_value=value, timestamp=T0)
    return request.SerializeToString()


def device(name: str, *, site: str = "lab", **fields) -> BridgedDevice:
    plain = BridgedDevice(
        site=site,
        device=name,
        state="online",
        last_seen_ms=T0,
        model="kws",
        version="2.0.0",
        model_digest="ab" * 6,
        latency_p50_ms=4.5,
        latency_p99_ms=9.25,
        throughput_per_s=12.0,
        cpu_percent=31.5,
        rss_mb=120.0,
        outbox=0,
        refused=0,
        drift=None,
        last_error="",
        arch="aarch64",
        agent_version="0.1.0",
    )
    return msgspec.structs.replace(plain, **fields)


@dataclass
class Session:
    """An edge node through a session: births, data, a device that comes and goes, a rebirth, the end."""

    primary_host: str = ""
    said: list[Outgoing] = field(default_factory=list)
    connects: list[ConnectOptions] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.node = EdgeNode(group="plant", name="lab", software="edgekit test", primary_host=self.primary_host)
        self.now = T0

    def connect(self) -> None:
        self.connects.append(self.node.connecting())
        self.say(self.node.connected(now_ms=self.tick()))

    def tick(self) -> int:
        self.now += 1000
        return self.now

    def say(self, messages: list[Outgoing]) -> list[Outgoing]:
        self.said += messages
        return messages

    def update(self, *devices: BridgedDevice) -> list[Outgoing]:
        return self.say(self.node.update(devices, now_ms=self.tick()))

    def hear(self, topic: str, payload: bytes) -> list[Outgoing]:
        return self.say(self.node.hear(topic, payload, now_ms=self.tick()))

    def rebirth(self) -> list[Outgoing]:
        return self.hear("spBv1.0/plant/NCMD/lab", rebirth_request())

    def of(self, verb: str) -> list[tuple[str, Any]]:
        return [(message.topic, parse(message.payload)) for message in self.said if message.topic.split("/")[2] == verb]


def whole_session() -> Session:
    session = Session()
    session.update(device("cam-1"), device("cam-2", drift=0.02))
    session.connect()
    session.update(device("cam-1", latency_p50_ms=5.5), device("cam-2", drift=0.02))
    session.update(device("cam-1", state="offline"), device("cam-2", drift=None), device("cam-3"))
    session.update(device("cam-1", version="2.1.0"), device("cam-2"), device("cam-3", state="stale"))
    session.rebirth()
    session.update(device("cam-1", version="2.1.0", refused=1), device("cam-2"))
    return session
