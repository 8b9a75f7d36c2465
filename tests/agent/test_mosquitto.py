"""The courier and a real Mosquitto with mutual TLS: what is confirmed, what is refused, and what strangers cannot do."""

from __future__ import annotations

import asyncio
import time

import pytest

from edgekit.agent import courier as courier_module
from edgekit.agent import mqtt as mqtt_module
from edgekit.agent.config import AgentConfig
from edgekit.agent.courier import Courier
from edgekit.agent.journal import Journal
from edgekit.agent.merging import merge_payloads
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts
from edgekit.fleet.ingest import read_message
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received
from edgekit.schema.message import Birth, Death, Event, WindowBatch
from edgekit.telemetry.codec import encode
from tests.agent.broker_world import ACL, Authority, Line, Mosquitto, Server, needs_mosquitto
from tests.agent.test_spool import put_windows
from tests.agent.world import wait_for

pytestmark = needs_mosquitto
FACTS = DeviceFacts(arch="x", cpu="", isa=(), cores=1, ram_mb=1, os="", runtimes={})


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def make_broker(tmp_path, authority):
    made = []

    def make(*lines, acl=ACL):
        made.append(Mosquitto(tmp_path, authority, *lines, acl=acl).start())
        return made[-1]

    yield make
    for broker in made:
        broker.kill()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Pauses of minutes are fractions of a second here."""
    monkeypatch.setattr(mqtt_module, "RECONNECT_BASE_S", 0.05)
    monkeypatch.setattr(mqtt_module, "RECONNECT_CAP_S", 0.1)
    monkeypatch.setattr(courier_module, "REFUSED_RETRY_S", 0.02)
    monkeypatch.setattr(courier_module, "MAX_RETRY_S", 0.05)


class Device:
    """The courier's part of an agent; made anew after a power cut, over the same spool."""

    def __init__(self, folder, authority, port, name="cam"):
        cert, key = authority.issue(name)
        self.config = AgentConfig(
            device=name,
            site="lab",
            broker=f"mqtts://localhost:{port}",
            ca_file=str(authority.ca_file),
            cert_file=str(cert),
            key_file=str(key),
        )
        self.outbox = Outbox(folder / f"{name}.db", max_bytes=1 << 20, merge=merge_payloads)
        self.journal = Journal(self.outbox, self.config, "0")
        self.courier = Courier(self.outbox, self.journal, self.announce)
        self.journal.on_stored = self.courier.pump

    def announce(self):
        self.journal.birth(FACTS, runtime="", runtime_version="")

    async def cut_power(self):
        """Nothing is told to anybody, nothing is written any more."""
        self.courier.outbox = self.outbox
        connection = self.courier._connection
        connection._is_leaving = True
        connection._halt.set()
        if connection._client is not None and connection._client.socket() is not None:
            connection._client.socket().close()
        await asyncio.to_thread(connection._thread.join, 3)
        self.outbox.close()

    async def connect(self):
        self.courier.start()
        await until(lambda: self.courier.is_connected)

    async def drained(self):
        await until(lambda: self.outbox.count == 0)


async def until(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.02)


def store_all(server, store):
    for topic, payload, is_retained in list(server.messages):
        received = read_message(topic, payload, 1, is_retained=is_retained)
        assert isinstance(received, Received), received
        store.apply([received])


def test_birth_windows_and_goodbye_over_mutual_tls(tmp_path, authority, make_broker):
    broker = make_broker()
    server = Server(broker)

    async def story():
        device = Device(tmp_path, authority, broker.port)
        await device.connect()
        device.journal.event("agent_started")
        put_windows(device.outbox, 65, start=100, boot=device.journal.boot)
        device.courier.pump()
        await device.drained()
        await device.courier.stop()
        device.outbox.close()
        await until(lambda: server.of(Death))
        assert server.of(Birth)[0].clock in {"ntp", "unsynced", "system"}
        assert [event.kind for event in server.of(Event)] == ["agent_started"]
        assert sorted(window.seq for batch in server.of(WindowBatch) for window in batch.windows) == list(range(100, 165))
        assert server.of(Death)[0].is_clean

    asyncio.run(story())
    server.stop()


def test_stranger_without_a_certificate_of_ours_is_not_let_in(tmp_path, authority, make_broker):
    broker = make_broker()
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "other-ca")

    async def story():
        device = Device(tmp_path, stranger, broker.port)
        device.config = device.journal.config = AgentConfig(
            **{name: getattr(device.config, name) for name in ("device", "site", "broker", "cert_file", "key_file")},
            ca_file=str(authority.ca_file),
        )
        device.courier.start()
        await asyncio.sleep(0.5)
        assert not device.courier.is_connected
        await device.cut_power()

    asyncio.run(story())


@pytest.mark.fault("F20")
def test_power_cut_between_publish_and_puback_stores_each_message_once(tmp_path, authority, make_broker):
    broker = make_broker()
    server = Server(broker)
    line = Line(broker.port)

    async def story():
        device = Device(tmp_path, authority, line.port)
        await device.connect()
        await device.drained()
        line.is_deaf = True
        device.journal.event("agent_started", "published, never confirmed")
        put_windows(device.outbox, 3, start=10, boot=device.journal.boot)
        device.courier.pump()
        await until(lambda: server.of(Event) and len(server.of(WindowBatch)) >= 3)
        await device.cut_power()
        line.is_deaf = False
        line.cut()
        again = Device(tmp_path, authority, line.port)
        assert again.outbox.count == 4
        assert again.journal.boot != device.journal.boot
        await again.connect()
        await again.drained()
        await again.courier.stop()
        again.outbox.close()

    asyncio.run(story())
    events = [event for event in server.of(Event) if event.detail]
    assert len(events) == 2
    assert (events[0].boot, events[0].seq) == (events[1].boot, events[1].seq)
    store = Store("sqlite://")
    store_all(server, store)
    assert len(store.events(kind="agent_started").events) == 1
    assert store.device("lab", "cam", 1).gaps.received == store.stored
    assert store.duplicates >= 4
    line.close()
    server.stop()


@pytest.mark.fault("F21")
def test_not_authorized_message_is_kept_told_and_tried_again_later(tmp_path, authority, make_broker):
    forbidden = "pattern write ek/1/lab/%u/status\npattern write ek/1/lab/%u/ev\nuser server\ntopic readwrite ek/1/#\n"
    broker = make_broker(acl=forbidden)
    server = Server(broker)

    async def story():
        device = Device(tmp_path, authority, broker.port)
        await device.connect()
        put_windows(device.outbox, 3, start=10, boot=device.journal.boot)
        device.courier.pump()
        await until(lambda: device.outbox.dead == 3)
        await until(lambda: [event for event in server.of(Event) if event.kind == "message_refused"])
        assert server.of(WindowBatch) == []
        assert "authorized" in device.courier.last_refusal.lower()
        device.journal.event("agent_started", "others go on")
        await until(lambda: [event for event in server.of(Event) if event.kind == "agent_started"])
        refused = [event for event in server.of(Event) if event.kind == "message_refused"]
        assert len(refused) == 1
        assert (refused[0].fields["verb"], refused[0].code) == ("w", "broker.refused")
        await device.courier.stop()
        device.outbox.close()
        server.stop()
        broker.kill()
        better = make_broker()
        again_server = Server(better)
        again = Device(tmp_path, authority, better.port)
        assert again.outbox.dead == 3
        again.courier._revived_at -= courier_module.REVIVE_S
        await again.connect()
        await until(lambda: len([w for batch in again_server.of(WindowBatch) for w in batch.windows]) == 3)
        await again.courier.stop()
        again.outbox.close()
        again_server.stop()

    asyncio.run(story())


@pytest.mark.fault("F21")
@pytest.mark.parametrize("line", ["max_packet_size 2000", "message_size_limit 2000"])
def test_what_is_too_large_goes_in_parts_or_is_set_aside_and_told(tmp_path, authority, make_broker, line):
    broker = make_broker(line)
    server = Server(broker)

    async def story():
        device = Device(tmp_path, authority, broker.port)
        await device.connect()
        device.courier.is_connected = False
        put_windows(device.outbox, 60, start=10, boot=device.journal.boot)
        device.outbox.put(boot=device.journal.boot, seq=900, kind="x", payload=b"x" * 5000)
        device.courier._connected()
        await until(lambda: len({w.seq for batch in server.of(WindowBatch) for w in batch.windows}) == 60)
        await until(lambda: device.outbox.dead == 1)
        await until(lambda: [event for event in server.of(Event) if event.kind == "message_refused"])
        assert device.courier.is_connected
        await device.courier.stop()
        device.outbox.close()

    asyncio.run(story())
    server.stop()


@pytest.mark.fault("F22")
def test_stranger_cannot_take_a_client_id_speak_for_a_device_or_leave_a_will(tmp_path, authority, make_broker):
    broker = make_broker()
    server = Server(broker)

    async def story():
        device = Device(tmp_path, authority, broker.port)
        await device.connect()
        await device.drained()
        before = device.courier._connection
        thief = broker.client("mallory", client_id="cam", will=("ek/1/lab/cam/status", encode(Death(boot=1))))
        poison = encode(Death(boot=device.journal.boot))
        thief.publish("ek/1/lab/cam/status", poison, qos=1, retain=True)
        thief.publish("ek/1/lab/cam/des", b"poison", qos=1, retain=True)
        heard = []
        thief.on_message = lambda _c, _d, message: heard.append(message)
        thief.subscribe("ek/1/lab/cam/#", qos=1)
        thief.subscribe("ek/1/lab/cam/cmd", qos=1)
        await asyncio.sleep(0.3)
        assert device.courier.is_connected, "the thief has the client id of its certificate, not cam's"
        assert device.courier._connection is before
        desired = []
        device.courier.listen("ek/1/lab/cam/des", desired.append)
        device.journal.event("agent_started")
        await device.drained()
        server.client.publish("ek/1/lab/cam/cmd", b"for cam only", qos=1)
        thief.socket().close()  # its will would be published now
        await asyncio.sleep(0.5)
        assert server.of(Death) == []
        assert heard == []
        assert desired == [], "what a stranger wanted retained is not there"
        await device.courier.stop()
        device.outbox.close()
        thief.loop_stop()

    asyncio.run(story())
    server.stop()
    late = Server(broker)
    wait_for(lambda: late.of(Death), what="what the broker retains")
    assert [message.is_clean for message in late.of(Death)] == [True], "the goodbye is the device's own"
    late.stop()


def test_killed_device_has_its_will_published_after_the_delay(tmp_path, authority, make_broker, monkeypatch):
    monkeypatch.setattr(mqtt_module, "WILL_DELAY_S", 1)
    broker = make_broker()
    server = Server(broker)

    async def story():
        device = Device(tmp_path, authority, broker.port)
        await device.connect()
        await device.drained()
        await device.cut_power()
        await asyncio.sleep(0.3)
        assert server.of(Death) == []
        await until(lambda: server.of(Death))
        assert not server.of(Death)[0].is_clean
        assert server.of(Death)[0].boot == device.journal.boot

    asyncio.run(story())
    server.stop()


def test_what_nobody_hears_is_kept_until_somebody_listens(tmp_path, authority, make_broker):
    """The broker confirms what it throws away, because the server's session is gone: that is no delivery."""
    broker = make_broker()

    async def story():
        device = Device(tmp_path, authority, broker.port)
        await device.connect()
        device.journal.event("agent_started")
        put_windows(device.outbox, 40, start=10, boot=device.journal.boot)
        await asyncio.sleep(0.5)
        assert device.outbox.count >= 41
        assert device.courier.last_refusal == "nobody listens"
        assert device.courier.sent_messages < 40, "it asks now and then, and does not shout"
        server = Server(broker)
        await device.drained()
        await until(lambda: len({window.seq for batch in server.of(WindowBatch) for window in batch.windows}) == 40)
        await until(lambda: [event.kind for event in server.of(Event)] == ["agent_started"])
        await device.courier.stop()
        device.outbox.close()
        server.stop()

    asyncio.run(story())
