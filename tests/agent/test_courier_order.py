"""What goes first: live before backlog, classes by weight, never too much at once, and no message that holds up all others."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from edgekit.agent import courier as courier_module
from edgekit.agent.config import AgentConfig
from edgekit.agent.courier import BATCH_WINDOWS, LIVE_RESERVE, Courier
from edgekit.agent.journal import Journal
from edgekit.agent.mqtt import MAX_IN_FLIGHT
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts
from edgekit.agent.windows import SCHEMA
from edgekit.schema.message import WindowBatch
from edgekit.telemetry.codec import decode
from tests.agent.test_merging import make_window

FACTS = DeviceFacts(arch="x", cpu="", isa=(), cores=1, ram_mb=1, os="", runtimes={})


class Wire:
    """The connection's part: keeps what was sent, and confirms when it is told to."""

    max_packet_bytes = 0
    receive_maximum = MAX_IN_FLIGHT
    is_blamed = False

    def __init__(self):
        self.sent = []

    def publish(self, where, payload, *, qos, is_retained):
        self.sent.append((where.rsplit("/", 1)[1], payload))
        return len(self.sent)

    @property
    def verbs(self):
        return [verb for verb, _ in self.sent]

    def batches(self):
        return [decode(payload) for verb, payload in self.sent if verb == "w"]


@pytest.fixture
def made(tmp_path):
    def make(**settings):
        outbox = Outbox(tmp_path / "o.db", max_bytes=8 << 20)
        config = AgentConfig(device="d", broker="mqtt://127.0.0.1:1", **{"drain_per_s": 0.0} | settings)
        journal = Journal(outbox, config, "0")
        courier = Courier(outbox, journal, lambda: journal.birth(FACTS, runtime="", runtime_version=""))
        courier._pace = courier_module.Pace(per_s=config.drain_per_s)
        courier._connection = Wire()
        return courier, journal, courier._connection

    return make


def put(journal, count, *, kind="w", start=1000, boot=1):
    for seq in range(start, start + count):
        payload = msgspec.msgpack.encode(make_window(seq, [1.0])) if kind == "w" else b"p"
        journal.outbox.put(boot=boot, seq=seq, kind=kind, payload=payload, schema=SCHEMA if kind == "w" else 0)


def confirm(courier, wire, *numbers):
    for number in numbers:
        courier._puback(number, 0, "")


def test_never_more_than_twenty_on_the_way_and_places_kept_for_live_data(made):
    courier, journal, wire = made()
    put(journal, 2000)

    async def story():
        courier._connected()
        confirm(courier, wire, 1)
        assert len(courier._in_flight) == MAX_IN_FLIGHT - LIVE_RESERVE
        journal.on_stored = courier.pump
        for _ in range(30):
            journal.event("agent_started")
        assert len(courier._in_flight) == MAX_IN_FLIGHT
        assert wire.verbs.count("ev") == LIVE_RESERVE

    asyncio.run(story())


def test_live_goes_on_beside_a_backlog_and_the_backlog_beside_live(made):
    courier, journal, wire = made()
    put(journal, 3000)

    async def story():
        courier._connected()
        confirm(courier, wire, 1)
        journal.on_stored = courier.pump
        done = 1
        for round_number in range(60):
            for _ in range(10):
                journal.event("agent_started", str(round_number))
            waiting = [mid for mid in sorted(courier._in_flight) if mid > done][:8]
            confirm(courier, wire, *waiting)
        events = wire.verbs.count("ev")
        late = [batch for batch in wire.batches() if batch.is_late]
        assert events >= 350, "live events are not held up by 100 batches of backlog"
        assert len(late) > 60, "and the backlog is not held up by a device that has always something to say"

    asyncio.run(story())


def test_backlog_goes_by_class_and_in_full_messages(made):
    courier, journal, wire = made()
    put(journal, 2, kind="x", start=1)
    put(journal, 65, start=10)
    put(journal, 2, kind="lb", start=100)
    put(journal, 2, kind="ev", start=200)

    async def story():
        courier._connected()
        number = 0
        while number < len(wire.sent):
            number += 1
            confirm(courier, wire, number)
        assert wire.verbs == ["status", "lb", "lb", "ev", "ev", "w", "w", "w", "x", "x"]
        assert [len(batch.windows) for batch in wire.batches()] == [BATCH_WINDOWS, BATCH_WINDOWS, 5]
        assert all(isinstance(batch, WindowBatch) and batch.is_late for batch in wire.batches())
        assert journal.outbox.count == 0

    asyncio.run(story())


def test_backlog_keeps_its_pace(made):
    courier, journal, wire = made(drain_per_s=10.0)
    put(journal, 3000)

    async def story():
        courier._connected()
        confirm(courier, wire, 1)
        loop, done = asyncio.get_running_loop(), 1
        start = loop.time()
        while loop.time() - start < 0.5:
            await asyncio.sleep(0.02)
            confirm(courier, wire, *sorted(courier._in_flight))
            done = len(wire.sent)
        assert 10 <= done - 1 <= 10 + 10 * (loop.time() - start) + 1

    asyncio.run(story())


@pytest.mark.fault("F21")
def test_quota_exceeded_is_tried_again_with_growing_pauses_and_set_aside(made, monkeypatch):
    courier, journal, wire = made()
    pauses = []
    monkeypatch.setattr(courier_module, "REFUSED_RETRY_S", 100.0)
    put(journal, 1, kind="lb", start=5)

    async def story():
        loop = asyncio.get_running_loop()
        real = loop.call_later
        monkeypatch.setattr(loop, "call_later", lambda wait, *args: pauses.append(wait) or real(0.001, *args))
        courier._connected()
        confirm(courier, wire, 1)
        number = 1
        for _ in range(200):
            await asyncio.sleep(0.002)
            while number < len(wire.sent):
                number += 1
                verb = wire.verbs[number - 1]
                courier._puback(number, 0x97 if verb == "lb" else 0, "Quota exceeded")
        assert wire.verbs.count("lb") == courier_module.MAX_REFUSALS
        assert [pause for pause in pauses if pause >= 100.0] == [100.0 * 2**place for place in range(5)]
        assert journal.outbox.dead == 1
        (told,) = [decode(payload) for verb, payload in wire.sent if verb == "ev"]
        assert (told.kind, told.fields["verb"], told.fields["count"]) == ("message_refused", "lb", 1)

    asyncio.run(story())


@pytest.mark.fault("F21")
def test_message_that_makes_the_broker_hang_up_costs_no_other(made):
    """A broker that ends the connection at one message: it is found by sending one at a time, and only it is set aside."""
    courier, journal, wire = made()
    put(journal, 10, kind="lb", start=5)
    poison = journal.outbox.read(kinds=("lb",))[6].seq

    def hang_up():
        wire.is_blamed = True
        courier._disconnected("hung up")
        wire.is_blamed = False
        courier._connected()

    async def story():
        courier._connected()
        for _ in range(100):
            if not courier._in_flight:
                break
            number = min(courier._in_flight)
            rows = {row.id: row for row in journal.outbox.read(kinds=("birth", "lb", "ev"), limit=100)}
            if any(rows[row_id].seq == poison and rows[row_id].kind == "lb" for row_id in courier._in_flight[number]):
                hang_up()
            else:
                courier._puback(number, 0, "")
        assert journal.outbox.dead == 1
        assert journal.outbox.count == 0
        assert [decode(payload).kind for verb, payload in wire.sent if verb == "ev"] == ["message_refused"]

    asyncio.run(story())
