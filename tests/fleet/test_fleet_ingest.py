"""From a real broker into a real database."""

from __future__ import annotations

import pytest
import uvicorn
from fleet_world import T0, WireDevice, birth, event, free_port, heartbeat, reported, wait_until, window, windows

from edgekit.errors import EnvironmentFault, UsageError
from edgekit.fleet.broker import EmbeddedBroker, check_port
from edgekit.fleet.config import BrokerAddress, FleetConfig, parse_broker
from edgekit.fleet.ingest import Ingest, read_message
from edgekit.fleet.server import FleetServer
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Fault
from edgekit.telemetry.codec import encode
from edgekit.telemetry.topics import topic


@pytest.fixture(scope="module")
def broker():
    broker = EmbeddedBroker(free_port())
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    yield store
    store.close()


def start_ingest(broker, store, name):
    ingest = Ingest(store, BrokerAddress(host="127.0.0.1", port=broker.port, is_tls=False), client_id=name)
    ingest.start()
    wait_until(lambda: ingest.status().is_broker_connected)
    return ingest


def test_device_session_is_stored(broker, store):
    ingest = start_ingest(broker, store, "ingest-session")
    device = WireDevice(broker.port, "session-1")
    device.send("status", birth())
    device.send("rep", reported())
    device.send("w", windows(window(3), window(4, T0 + 10_000)))
    device.send("ev", event(5))
    device.send("hb", heartbeat(6), qos=0)
    wait_until(lambda: (d := store.device("lab", "session-1", T0)) is not None and d.gaps.missing == 1)
    detail = store.device("lab", "session-1", T0)
    assert (detail.gaps.received, detail.device.state, detail.device.version) == (5, "online", "1.0.0")
    device.cut()
    wait_until(lambda: store.device("lab", "session-1", T0).device.state == "offline")
    ingest.stop()


def test_nothing_is_lost_while_the_server_is_away(broker, store):
    first = start_ingest(broker, store, "ingest-away")
    device = WireDevice(broker.port, "away-1")
    device.send("status", birth())
    wait_until(lambda: store.device("lab", "away-1", T0) is not None)
    first.stop()
    for seq in range(2, 52):
        device.send("w", windows(window(seq, T0 + seq * 1000)))
    assert store.device("lab", "away-1", T0).gaps.received == 1
    second = start_ingest(broker, store, "ingest-away")
    wait_until(lambda: store.device("lab", "away-1", T0).gaps.received == 51)
    second.stop()
    device.close()


def test_message_is_acknowledged_only_after_the_commit(broker, store, monkeypatch):
    ingest = start_ingest(broker, store, "ingest-commit")
    device = WireDevice(broker.port, "commit-1")
    real = store.apply
    failures = []

    def refuse(batch, faults=()):
        failures.append(len(batch))
        raise EnvironmentFault("store.write_failed", "no room")

    monkeypatch.setattr(store, "apply", refuse)
    device.send("w", windows(window(2)))
    wait_until(lambda: bool(failures))
    ingest.stop()
    monkeypatch.setattr(store, "apply", real)
    assert store.device("lab", "commit-1", T0) is None
    again = start_ingest(broker, store, "ingest-commit")
    wait_until(lambda: (d := store.device("lab", "commit-1", T0)) is not None and d.gaps.received == 1)
    again.stop()
    device.close()


@pytest.mark.parametrize(
    ("verb", "payload"), [("w", b""), ("w", b"\xff" * 50), ("ev", b"\x93\xa5death\x07\xc2"), ("nonsense", b"x")]
)
def test_malformed_message_is_counted_and_passed_over(broker, store, verb, payload):
    ingest = start_ingest(broker, store, f"ingest-bad-{verb}-{len(payload)}")
    device = WireDevice(broker.port, f"bad-{verb}-{len(payload)}")
    device.send_raw(verb, payload)
    device.send("status", birth())
    wait_until(lambda: store.device("lab", device.device, T0) is not None)
    is_ours = verb != "nonsense"
    assert ingest.status().malformed == is_ours
    wait_until(lambda: store.device("lab", device.device, T0).refused_messages == is_ours)
    assert store.device("lab", device.device, T0).last_refused.startswith(f"{verb}: " if is_ours else "")
    ingest.stop()
    device.close()


@pytest.mark.parametrize("message", [birth(boot=2**64 - 1), windows(window(2**63)), event(0), event(5, time_ms=2**62)])
def test_number_that_no_database_holds_is_refused_at_the_door(message):
    verb = {"Birth": "status", "WindowBatch": "w", "Event": "ev"}[type(message).__name__]
    content = read_message(topic("lab", "pi-1", verb), encode(message), T0)
    assert isinstance(content, Fault)
    assert "expected" in content.error


def test_message_that_cannot_be_stored_does_not_hold_up_the_others(broker, store, monkeypatch):
    ingest = start_ingest(broker, store, "ingest-poison")
    device = WireDevice(broker.port, "poison-1")
    real = type(store._writer)._event

    def cannot(writer, connection, device_id, message):
        if message.seq == 3:
            raise OverflowError("too large")
        real(writer, connection, device_id, message)

    monkeypatch.setattr(type(store._writer), "_event", cannot)
    device.send("status", birth())
    for seq in range(2, 8):
        device.send("ev", event(seq))
    wait_until(lambda: (d := store.device("lab", "poison-1", T0)) is not None and d.gaps.received == 6)
    wait_until(lambda: store.device("lab", "poison-1", T0).refused_messages == 1)
    detail = store.device("lab", "poison-1", T0)
    assert "too large" in detail.last_refused
    assert (detail.gaps.missing, ingest.status().malformed) == (1, 1)
    ingest.stop()
    device.close()


def test_retained_message_is_no_sign_of_life(broker, store):
    device = WireDevice(broker.port, "retained-1")
    device.send("status", birth())
    ingest = start_ingest(broker, store, "ingest-retained")
    wait_until(lambda: store.device("lab", "retained-1", T0) is not None)
    assert store.device("lab", "retained-1", T0).device.last_seen_ms == T0
    device.send("hb", heartbeat(2), qos=0)
    wait_until(lambda: store.device("lab", "retained-1", T0).device.last_seen_ms != T0)
    ingest.stop()
    device.close()


def test_broker_ends_before_the_ingest_does(tmp_path, monkeypatch):
    """In the other order the broker would confirm messages that nobody writes any more."""
    config = FleetConfig(port=free_port(), broker_port=free_port(), database=str(tmp_path / "fleet.db"))
    fleet = FleetServer(config)
    stop, seen = fleet.ingest.stop, []

    def record():
        check_port(config.broker_port, what="broker", option="")
        seen.append(fleet.ingest.status().stored)
        stop()

    monkeypatch.setattr(fleet.ingest, "stop", record)

    def serve(_server):
        device = WireDevice(config.broker_port, "order-1")
        device.send("status", birth())
        wait_until(lambda: fleet.store.stored == 1)
        device.close()

    monkeypatch.setattr(uvicorn.Server, "run", serve)
    fleet.run(lambda: None)
    assert seen == [1]


def test_broker_port_in_use_is_named(broker):
    with pytest.raises(EnvironmentFault) as caught:
        EmbeddedBroker(broker.port).start()
    assert caught.value.code == "port.in_use"
    assert str(broker.port) in caught.value.message


@pytest.mark.parametrize("text", ["", "embeded", "http://x", "mqtt://", "mqtt://127.0.0.1:99999"])
def test_broker_address_refused(text):
    with pytest.raises(UsageError) as caught:
        parse_broker(text)
    assert caught.value.code == "config.broker"


def test_plain_broker_off_loopback_is_refused_and_its_password_is_not_shown():
    with pytest.raises(UsageError) as caught:
        parse_broker("mqtt://me:secret@10.0.0.1")
    assert caught.value.code == "config.insecure"
    assert "secret" not in caught.value.message
    address = parse_broker("mqtts://me:s%40cret@10.0.0.1")
    assert (address.port, address.is_tls, address.password) == (8883, True, "s@cret")
    assert "cret" not in str(address)
