"""Bridges at a real Mosquitto: what other clients of it really get."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from dataclasses import dataclass, field

import msgspec
import paho.mqtt.client as paho
import pytest
from fleet_world import WireDevice, birth, wait_until, window, windows
from forgetful_broker import ForgetfulBroker
from plain_mosquitto import PlainMosquitto, needs_mosquitto
from sparkplug_world import by_name, device, parse, rebirth_request, value_of

from edgekit.errors import EnvironmentFault
from edgekit.fleet.bridges.homeassistant import SENSORS, HomeAssistant
from edgekit.fleet.bridges.running import Fleet, HomeAssistantBridge, JsonBridge, SparkplugBridge
from edgekit.fleet.bridges.source import read_devices
from edgekit.fleet.config import parse_broker

pytestmark = needs_mosquitto


@pytest.fixture
def broker(tmp_path):
    broker = PlainMosquitto(tmp_path)
    broker.start()
    yield broker
    broker.stop()


class Host:
    """Another client of the broker; keeps what it gets."""

    def __init__(self, port: int, *filters: str) -> None:
        self.got: list[paho.MQTTMessage] = []
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self.client.on_message = lambda _client, _data, message: self.got.append(message)
        self.client.on_connect = lambda client, *_: client.subscribe([(each, 2) for each in filters])
        self.is_subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: self.is_subscribed.set()
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self.is_subscribed.wait(10)

    def of(self, text: str) -> list[paho.MQTTMessage]:
        return [message for message in self.got if text in message.topic]

    def wait(self, text: str, count: int = 1) -> paho.MQTTMessage:
        wait_until(lambda: len(self.of(text)) >= count)
        return self.of(text)[count - 1]

    def tell(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(5)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@dataclass
class Server:
    """The fleet server's API, as far as bridges ask it."""

    devices: list = field(default_factory=list)
    effect: float | None = None
    is_down: bool = False

    def fetch(self, path: str):
        if self.is_down:
            raise EnvironmentFault("fleet.unreachable", "down")
        if path.startswith("/api/v1/devices?"):
            known = ("latency_p50_ms", "latency_p99_ms", "throughput_per_s", "cpu_percent", "rss_mb", "refused")
            same = ("site", "device", "state", "last_seen_ms", "model", "version", "arch", "agent_version", "last_error")
            rows = [{name: getattr(each, name) for name in (*same, *known)} for each in self.devices]
            after = int(path.split("after=")[1].split("&", maxsplit=1)[0] or 0)
            end = after + 2
            return {"devices": rows[after:end], "total": len(rows), "next": str(end) if end < len(rows) else ""}
        if path == "/api/v1/models/kws/versions" and self.effect is not None:
            return {"versions": [{"version": "2.0.0", "device_class": "", "effect": self.effect}]}
        raise EnvironmentFault("fleet.refused", "404")


@contextlib.contextmanager
def running(make):
    """A bridge in a thread of its own; it is told to end like by Ctrl-C."""
    loop = asyncio.new_event_loop()
    found = {}

    async def whole() -> None:
        found["bridge"] = make()
        found["task"] = asyncio.current_task()
        with contextlib.suppress(asyncio.CancelledError):
            await found["bridge"].run()

    thread = threading.Thread(target=lambda: loop.run_until_complete(whole()))
    thread.start()
    wait_until(lambda: "task" in found)
    try:
        yield found["bridge"]
    finally:
        loop.call_soon_threadsafe(found["task"].cancel)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()


def fleet_of(server: Server) -> Fleet:
    return Fleet(fetch=server.fetch, every_s=0.1)


def test_fleet_is_read_page_by_page_with_drift():
    server = Server([device(f"cam-{number}") for number in range(5)], effect=0.25)
    found = read_devices(server.fetch)
    assert [each.device for each in found] == [f"cam-{number}" for number in range(5)]
    assert {each.drift for each in found} == {0.25}
    server.effect = None
    assert {each.drift for each in read_devices(server.fetch)} == {None}


def test_sparkplug_session_at_a_broker(broker):
    address = parse_broker(f"mqtt://127.0.0.1:{broker.port}")
    server = Server([device("cam-1"), device("cam-2"), device("cam-3", site="office")])
    host = Host(broker.port, "spBv1.0/#")
    with running(lambda: SparkplugBridge(fleet=fleet_of(server), address=address, group="plant")):
        host.wait("NBIRTH/lab")
        host.wait("NBIRTH/office")
        host.wait("DBIRTH/lab/cam-2")
        server.devices = [device("cam-1", refused=3), device("cam-2", state="offline"), device("cam-3", site="office")]
        names = {metric.alias: metric.name for metric in parse(host.of("DBIRTH/lab/cam-1")[0].payload).metrics}
        (metric,) = parse(host.wait("DDATA/lab/cam-1").payload).metrics
        assert (names[metric.alias], value_of(metric)) == ("Model/Refused", 3)
        host.wait("DDEATH/lab/cam-2")
        host.tell("spBv1.0/plant/NCMD/lab", rebirth_request())
        again = parse(host.wait("NBIRTH/lab", 2).payload)
        assert (again.seq, by_name(again)["bdSeq"].long_value) == (0, 0)
        host.wait("DBIRTH/lab/cam-1", 2)
    host.wait("NDEATH/lab")
    host.wait("NDEATH/office")
    ours = [message for message in host.got if "NCMD" not in message.topic]
    assert {(message.qos, message.retain) for message in ours} == {(0, False)}
    late = Host(broker.port, "spBv1.0/#")
    time.sleep(0.3)
    assert late.got == []
    late.close()
    host.close()


def test_death_certificate_is_published_when_the_bridge_is_cut_off(broker):
    address = parse_broker(f"mqtt://127.0.0.1:{broker.port}")
    server = Server([device("cam-1")])
    host = Host(broker.port, "spBv1.0/#")
    with running(lambda: SparkplugBridge(fleet=fleet_of(server), address=address, group="plant")):
        host.wait("NBIRTH/lab")
        thief = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="edgekit-sparkplug.plant.lab", protocol=paho.MQTTv311)
        thief.connect("127.0.0.1", broker.port)
        thief.loop_start()
        death = host.wait("NDEATH/lab")
        thief.disconnect()
        thief.loop_stop()
        assert death.qos == 1
        (metric,) = parse(death.payload).metrics
        assert (metric.name, metric.long_value) == ("bdSeq", 0)
        again = parse(host.wait("NBIRTH/lab", 2).payload)
        assert by_name(again)["bdSeq"].long_value >= 1
    host.close()


def test_primary_host_decides_when_it_is_told(broker):
    address = parse_broker(f"mqtt://127.0.0.1:{broker.port}")
    server = Server([device("cam-1")])
    host = Host(broker.port, "spBv1.0/plant/#")
    with running(
        lambda: SparkplugBridge(fleet=fleet_of(server), address=address, group="plant", primary_host="scada")
    ) as bridge:
        wait_until(lambda: bool(bridge.sessions) and bridge.sessions["lab"].is_connected)
        assert host.got == []
        host.tell("spBv1.0/STATE/scada", b'{"online": true, "timestamp": 5}', retain=True)
        host.wait("NBIRTH/lab")
        host.tell("spBv1.0/STATE/scada", b'{"online": false, "timestamp": 6}', retain=True)
        host.wait("NDEATH/lab")
        wait_until(lambda: bridge.sessions["lab"].is_connected)
        assert len(host.of("NBIRTH")) == 1
        host.tell("spBv1.0/STATE/scada", b'{"online": true, "timestamp": 7}', retain=True)
        assert by_name(parse(host.wait("NBIRTH/lab", 2).payload))["bdSeq"].long_value == 1
    host.close()


def test_broker_restart_begins_a_new_session(broker):
    address = parse_broker(f"mqtt://127.0.0.1:{broker.port}")
    server = Server([device("cam-1")])
    host = Host(broker.port, "spBv1.0/#")
    with running(lambda: SparkplugBridge(fleet=fleet_of(server), address=address, group="plant")):
        host.wait("NBIRTH/lab")
        host.close()
        broker.stop()
        broker.start()
        host = Host(broker.port, "spBv1.0/#")

        def asked_again() -> bool:  # a birth is not kept: a host that comes later asks for it
            host.tell("spBv1.0/plant/NCMD/lab", rebirth_request())
            return bool(host.of("NBIRTH/lab"))

        wait_until(asked_again)
        assert by_name(parse(host.of("NBIRTH/lab")[0].payload))["bdSeq"].long_value >= 1
    host.close()


# Home Assistant


def assistant_bridge(server: Server, port: int) -> HomeAssistantBridge:
    return HomeAssistantBridge(
        fleet=fleet_of(server),
        address=parse_broker(f"mqtt://127.0.0.1:{port}"),
        assistant=HomeAssistant(dashboard="https://fleet.example"),
    )


CONFIG = "homeassistant/device/edgekit_lab_cam-1/config"


def test_home_assistant_discovers_devices_and_forgets_those_that_are_gone(broker):
    server = Server([device("cam-1"), device("cam-2", state="offline")], effect=0.5)
    with running(lambda: assistant_bridge(server, broker.port)):
        home = Host(broker.port, "homeassistant/#", "edgekit-ha/#")
        config = json.loads(home.wait(CONFIG).payload)
        assert set(config["components"]) == {entity.key for entity in SENSORS}
        assert config["device"]["configuration_url"] == "https://fleet.example/devices/lab/cam-1"
        ids = [component["unique_id"] for component in config["components"].values()]
        assert len(ids) == len(set(ids))
        state = json.loads(home.wait(config["state_topic"]).payload)
        for key, component in config["components"].items():
            assert component["value_template"] == "{{ value_json.%s }}" % key  # noqa: UP031 - braces
            assert key in state
        assert (state["release"], state["drift"], state["latency_p99_ms"]) == ("kws@2.0.0", 0.5, 9.25)
        topics = [each["topic"] for each in config["availability"]]
        assert [home.wait(topic).payload for topic in topics] == [b"online", b"online"]
        assert home.wait("edgekit-ha/lab/cam-2/availability").payload == b"offline"
        late = Host(broker.port, "homeassistant/#", "edgekit-ha/#")
        late.wait("edgekit-ha/lab/cam-2/state")
        late.wait(CONFIG)
        late.close()

        before = len(home.of(CONFIG))
        home.tell("homeassistant/status", b"online")
        home.wait(CONFIG, before + 1)

        server.devices = [device("cam-2", state="offline")]
        wait_until(lambda: home.of(CONFIG)[-1].payload == b"")
        assert home.of("edgekit-ha/lab/cam-1/state")[-1].payload == b""
    wait_until(lambda: home.of("edgekit-ha/bridge/availability")[-1].payload == b"offline")
    home.close()


def test_home_assistant_device_that_left_while_the_bridge_was_down_is_removed(broker):
    server = Server([device("cam-1"), device("cam-2")])
    with running(lambda: assistant_bridge(server, broker.port)):
        home = Host(broker.port, "homeassistant/#")
        home.wait(CONFIG)
        foreign = "homeassistant/device/edgekit_another_bridge/config"
        home.tell(foreign, b'{"state_topic": "elsewhere/state"}', retain=True)
    server.devices = [device("cam-2")]
    with running(lambda: assistant_bridge(server, broker.port)):
        wait_until(lambda: home.of(CONFIG)[-1].payload == b"")
        assert home.of(foreign)[-1].payload != b""
    home.close()


def test_server_that_is_away_changes_nothing(broker):
    server = Server([device("cam-1")])
    with running(lambda: assistant_bridge(server, broker.port)) as bridge:
        home = Host(broker.port, "homeassistant/#")
        home.wait(CONFIG)
        server.is_down = True
        wait_until(lambda: bridge.fleet.error != "")
        assert home.of(CONFIG)[-1].payload
        server.is_down = False
        wait_until(lambda: not bridge.fleet.error)
    home.close()


# windows as JSON


def test_windows_are_told_as_json_once_their_birth_is_known(broker):
    address = parse_broker(f"mqtt://127.0.0.1:{broker.port}")
    host = Host(broker.port, "edgekit-json/#")
    with running(lambda: JsonBridge(address=address, target=address)) as bridge:
        wait_until(lambda: bridge.is_connected)
        wire = WireDevice(broker.port, "cam-1")
        wire.send("w", windows(window(3)))
        wire.send("status", birth(labels={"line": "4"}))
        wire.send("w", windows(window(4, p50=2.5), window(5), is_late=True))
        wire.send_raw("w", b"garbage")
        host.wait("edgekit-json/lab/cam-1", 3)
        lines = [msgspec.json.decode(message.payload) for message in host.got]
        assert [line["seq"] for line in lines] == [3, 4, 5]
        assert lines[1]["figures"] == {"requests": 10.0, "errors": 0.0, "latency_p50_ms": 2.5, "latency_p99_ms": 5.0}
        assert (lines[1]["is_late"], lines[1]["labels"], lines[1]["boot"]) == (True, {"line": "4"}, "7")
        wait_until(lambda: bridge.refused == 1)
        wire.close()
    host.close()


def test_windows_that_come_while_the_bridge_is_away_are_kept_by_the_broker(broker):
    address = parse_broker(f"mqtt://127.0.0.1:{broker.port}")
    host = Host(broker.port, "edgekit-json/#")
    wire = WireDevice(broker.port, "cam-1")
    wire.send("status", birth())
    with running(lambda: JsonBridge(address=address, target=address)) as bridge:
        wait_until(lambda: bridge.is_connected)
    wire.send("w", windows(window(9)))
    with running(lambda: JsonBridge(address=address, target=address)):
        assert msgspec.json.decode(host.wait("edgekit-json").payload)["seq"] == 9
    wire.close()
    host.close()


def test_window_that_the_target_did_not_confirm_is_told_again(broker):
    target = ForgetfulBroker()
    wire = WireDevice(broker.port, "cam-1")
    wire.send("status", birth())
    address, sink = parse_broker(f"mqtt://127.0.0.1:{broker.port}"), parse_broker(f"mqtt://127.0.0.1:{target.port}")
    with running(lambda: JsonBridge(address=address, target=sink)) as bridge:
        wait_until(lambda: bridge.is_connected)
        for seq in range(1, 6):
            wire.send("w", windows(window(seq)))
        wait_until(lambda: bool(target.taken))
        target.is_acknowledging = True
        wait_until(lambda: len(target.confirmed) >= 5)
        told = [msgspec.json.decode(payload)["seq"] for _topic, payload in target.confirmed]
        assert set(told) == {1, 2, 3, 4, 5}
    wire.close()
    target.stop()
