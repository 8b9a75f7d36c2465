"""Simulated fleets over a real broker into a real database: everything arrives, once."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

import pytest
from fleet_world import free_port, wait_until
from forgetful_broker import ForgetfulBroker
from plain_mosquitto import PlainMosquitto, needs_mosquitto
from sqlalchemy import delete, insert, select

from edgekit.errors import ArtifactError, EnvironmentFault, UsageError
from edgekit.fleet import tables
from edgekit.fleet.broker import EmbeddedBroker
from edgekit.fleet.config import parse_broker
from edgekit.fleet.ingest import Ingest
from edgekit.fleet.simulator.ledger import read_ledger, verify_ledger, write_ledger
from edgekit.fleet.simulator.options import SimulatorOptions, parse_faults
from edgekit.fleet.simulator.releases import ReleaseBook, invent_release
from edgekit.fleet.simulator.running import Job, run
from edgekit.fleet.simulator.simulation import allow_connections
from edgekit.fleet.store import Store
from edgekit.schema.message import Death, WindowBatch
from edgekit.telemetry.codec import decode

FAULTS = "offline=30%,crashloop=10%,clock=10%,sensor=10%,full=10%,drift=.3@5min"
BOOK = ReleaseBook([invent_release("kws@2.0.0", counter=1)])


@pytest.fixture
def broker():
    broker = EmbeddedBroker(free_port())
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def mosquitto(tmp_path):
    broker = PlainMosquitto(tmp_path)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    yield store
    store.close()


def start_ingest(port: int, store: Store) -> Ingest:
    ingest = Ingest(store, parse_broker(f"mqtt://127.0.0.1:{port}"), client_id="ingest-simulated")
    ingest.start()
    wait_until(lambda: ingest.status().is_broker_connected)
    return ingest


def simulate(port: int, *, devices: int = 60, seconds: float = 1200.0, speed: float = 300.0, faults: str = FAULTS, **more):
    options = SimulatorOptions(devices=devices, duration_s=seconds, speed=speed, seed=7, faults=parse_faults(faults), **more)
    return run(Job(options=options, book=BOOK, address=parse_broker(f"mqtt://127.0.0.1:{port}"), with_ledger=True))


def settle(store: Store, lines):
    deadline = time.monotonic() + 20
    while not (verdict := verify_ledger(store, lines)).is_exact and time.monotonic() < deadline:
        time.sleep(0.1)
    return verdict


def test_everything_that_was_sent_is_stored_once(broker, store, tmp_path):
    ingest = start_ingest(broker.port, store)
    outcome = simulate(broker.port, devices=40, seconds=2400, speed=600)
    summary = outcome.summary
    assert (summary.sent, summary.unacknowledged, summary.rejected) == (summary.acknowledged, 0, 0)
    assert summary.windows > 1500
    assert summary.merged > 0
    assert summary.dropped > 0
    verdict = settle(store, outcome.ledger)
    assert verdict.is_exact, verdict
    assert (verdict.sent, verdict.stored, verdict.requests_sent) == (verdict.stored, verdict.sent, verdict.requests_stored)
    assert ingest.status().malformed == 0
    write_ledger(tmp_path / "ledger", outcome.ledger)
    assert read_ledger(tmp_path / "ledger") == outcome.ledger
    ingest.stop()


def test_what_a_database_lacks_or_has_twice_is_found(broker, store):
    ingest = start_ingest(broker.port, store)
    outcome = simulate(broker.port, devices=5, seconds=300, faults="")
    assert settle(store, outcome.ledger).is_exact
    ingest.stop()
    row = tables.windows
    with store.write() as connection:
        first = connection.execute(select(row)).first()
        connection.execute(delete(row).where(row.c.device_id == first.device_id, row.c.seq == first.seq))
        values = dict(first._mapping) | {"seq": 999_999}
        connection.execute(insert(row).values(**values))
        model = connection.execute(select(tables.model_windows)).first()
        connection.execute(insert(tables.model_windows).values(**dict(model._mapping) | {"seq": 999_998}))
    verdict = verify_ledger(store, outcome.ledger)
    assert (verdict.lost, verdict.foreign, verdict.doubled) == (1, 1, 1)
    assert len(verdict.examples) == 3


def start_run(port: int, options: SimulatorOptions) -> tuple[threading.Thread, dict]:
    found: dict = {}

    def whole() -> None:
        job = Job(options=options, book=BOOK, address=parse_broker(f"mqtt://127.0.0.1:{port}"), with_ledger=True)
        found["outcome"] = run(job)

    thread = threading.Thread(target=whole)
    thread.start()
    return thread, found


@needs_mosquitto
def test_broker_that_restarts_costs_nothing(mosquitto, store):
    ingest = start_ingest(mosquitto.port, store)
    options = SimulatorOptions(devices=30, duration_s=1500, speed=300, seed=1, telemetry_s=30)
    thread, found = start_run(mosquitto.port, options)
    wait_until(lambda: ingest.status().windows > 100)
    mosquitto.stop()
    wait_until(lambda: not ingest.status().is_broker_connected)
    mosquitto.start()
    thread.join(60)
    outcome = found["outcome"]
    assert outcome.summary.lost_connections >= 30
    assert outcome.summary.unacknowledged == 0
    verdict = settle(store, outcome.ledger)
    assert verdict.is_exact, verdict
    assert verdict.windows == outcome.summary.windows == 30 * 50
    ingest.stop()


@needs_mosquitto
def test_nobody_listens_and_the_messages_wait(mosquitto, store):
    options = SimulatorOptions(devices=5, duration_s=360, speed=60, seed=2)
    thread, found = start_run(mosquitto.port, options)
    time.sleep(1.5)
    ingest = start_ingest(mosquitto.port, store)
    thread.join(60)
    outcome = found["outcome"]
    assert outcome.summary.unheard > 0
    assert outcome.summary.unacknowledged == 0
    verdict = settle(store, outcome.ledger)
    assert verdict.is_exact, verdict
    ingest.stop()


def test_what_a_lost_connection_took_with_it_goes_again():
    broker = ForgetfulBroker(patience=3)
    options = SimulatorOptions(devices=1, duration_s=360, speed=60, seed=3, telemetry_s=10, sampling=1.0)
    thread, found = start_run(broker.port, options)
    wait_until(lambda: broker.connections >= 2 and len(broker.taken) >= 6)
    broker.is_acknowledging = True
    thread.join(60)
    broker.stop()
    outcome = found["outcome"]
    seqs: list[int] = []
    for _topic, payload in broker.confirmed:
        message = decode(payload)
        match message:
            case WindowBatch():
                seqs += [window.seq for window in message.windows]
            case Death():
                pass
            case _:
                seqs.append(message.seq)
    assert sorted(seqs) == list(range(1, max(seqs) + 1))
    assert max(seqs) > 36
    assert (outcome.summary.resent > 0, outcome.summary.unacknowledged) == (True, 0)


def test_more_devices_than_files_are_refused_with_what_to_set():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_connections(10)
    with pytest.raises(EnvironmentFault) as caught:
        allow_connections(hard)
    assert "LimitNOFILE" in caught.value.hint
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_file_that_is_no_ledger(tmp_path):
    with pytest.raises(UsageError):
        read_ledger(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ArtifactError):
        read_ledger(Path(tmp_path / "text"))
