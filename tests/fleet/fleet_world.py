"""Real small things for the fleet's tests: messages as a device writes them, a real broker, a device over MQTT."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgekit.schema.message import (
    Birth,
    Death,
    Event,
    Heartbeat,
    MetricSpec,
    Reported,
    SketchSpec,
    SlotReport,
    Window,
    WindowBatch,
)
from edgekit.telemetry.codec import encode, pack_values, schema_crc
from edgekit.telemetry.histogram import BINS, LatencyHistogram
from edgekit.telemetry.topics import topic

METRICS = (
    MetricSpec(name="requests", kind="count"),
    MetricSpec(name="errors", kind="count"),
    MetricSpec(name="latency_p50_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p99_ms", unit="ms", kind="quantile"),
)
SKETCHES = (SketchSpec(name="latency_ms", unit="ms", bins=BINS),)
SCHEMA = schema_crc(METRICS, SKETCHES)
T0 = 1_790_000_000_000
DIGEST = "sha256:" + "ab" * 32


def birth(boot: int = 7, seq: int = 1, time_ms: int = T0, **fields) -> Birth:
    return Birth(
        boot=boot, seq=seq, time_ms=time_ms, metrics=METRICS, sketches=SKETCHES, agent_version="0.1.0", arch="aarch64", **fields
    )


def window(seq: int, start_ms: int = T0, *, requests: float = 10.0, p50: float = 1.5, duration_ms: int = 10_000) -> Window:
    bins = LatencyHistogram()
    bins.add(p50, int(requests))
    values = pack_values([requests, 0.0, p50, 2 * p50])
    return Window(
        seq=seq, start_ms=start_ms, duration_ms=duration_ms, values=values, model_digest="ab" * 6, sketches=(bins.encode(),)
    )


def windows(*items: Window, boot: int = 7, is_late: bool = False) -> WindowBatch:
    return WindowBatch(boot=boot, windows=items, is_late=is_late, schema=SCHEMA)


def reported(boot: int = 7, seq: int = 2, time_ms: int = T0, version: str = "1.0.0", counter: int = 1, **fields) -> Reported:
    slot = SlotReport(
        name="a",
        status="active",
        model="fashion",
        version=version,
        counter=counter,
        model_digest=DIGEST,
        manifest_digest=DIGEST,
    )
    return Reported(
        boot=boot, seq=seq, time_ms=time_ms, slots=(slot, SlotReport(name="b", status="empty")), active="a", **fields
    )


def event(
    seq: int, kind: str = "install_finished", *, boot: int = 7, time_ms: int = T0, version: str = "1.0.0", **fields
) -> Event:
    return Event(boot=boot, seq=seq, time_ms=time_ms, kind=kind, model="fashion", version=version, counter=1, **fields)


def heartbeat(seq: int, boot: int = 7) -> Heartbeat:
    return Heartbeat(boot=boot, seq=seq, time_ms=T0)


def death(boot: int = 7, *, is_clean: bool = False) -> Death:
    return Death(boot=boot, is_clean=is_clean)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


class WireDevice:
    """A device that speaks MQTT 5 with the real codec."""

    def __init__(self, port: int, device: str, *, site: str = "lab", boot: int = 7) -> None:
        self.site, self.device = site, device
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"{site}-{device}", protocol=mqtt.MQTTv5)
        will = Properties(PacketTypes.WILLMESSAGE)
        will.WillDelayInterval = 0
        self.client.will_set(topic(site, device, "status"), encode(death(boot)), qos=1, retain=True, properties=will)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        wait_until(self.client.is_connected)

    def send(self, verb: str, message, *, qos: int = 1) -> None:
        self.send_raw(verb, encode(message), qos=qos)

    def send_raw(self, verb: str, payload: bytes, *, qos: int = 1) -> None:
        place = f"ek/1/{self.site}/{self.device}/{verb}"
        self.client.publish(place, payload, qos=qos, retain=verb in {"status", "rep"}).wait_for_publish(10)

    def cut(self) -> None:
        """Lose the connection without a goodbye."""
        self.client.loop_stop()
        self.client.socket().close()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
