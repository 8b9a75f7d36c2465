"""The courier against a line that records: the order of what is sent, and a spool that fails."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from edgekit.agent import courier as courier_module
from edgekit.agent.config import AgentConfig
from edgekit.agent.courier import Courier
from edgekit.agent.journal import Journal
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts

FACTS = DeviceFacts(arch="x", cpu="", isa=(), cores=1, ram_mb=1, os="", runtimes={})


class Line:
    """The connection's part: keeps the topics in the order in which they were sent."""

    def __init__(self):
        self.sent = []

    def publish(self, where, _payload, *, qos, is_retained):
        self.sent.append(where.rsplit("/", 1)[1])
        return len(self.sent)


@pytest.fixture
def made(tmp_path):
    outbox = Outbox(tmp_path / "o.db", max_bytes=1 << 20)
    journal = Journal(outbox, AgentConfig(device="d", broker="mqtt://127.0.0.1:1"), "0")
    courier = Courier(outbox, journal, lambda: journal.birth(FACTS, runtime="", runtime_version=""))
    journal.on_stored = courier.pump
    courier._connection = Line()
    return courier, journal, courier._connection


def test_birth_first_on_every_connection(made):
    courier, journal, line = made

    async def main():
        courier._connected()
        courier._puback(1, 0, "")
        courier._disconnected("")
        for _ in range(3):
            journal.event("agent_started")
        line.sent.clear()
        courier._connected()
        assert line.sent == ["status"]
        courier._puback(1, 0, "")
        assert line.sent == ["status", "ev", "ev", "ev"]

    asyncio.run(main())


def test_spool_that_fails_for_a_while_stops_nothing(made, monkeypatch):
    courier, journal, line = made
    monkeypatch.setattr(courier_module, "REFUSED_RETRY_S", 0.02)
    confirm, faults = courier.outbox.confirm, [sqlite3.OperationalError("database or disk is full")]

    def failing(ids):
        if faults:
            raise faults.pop()
        confirm(ids)

    monkeypatch.setattr(courier.outbox, "confirm", failing)

    async def main():
        courier._connected()
        journal.event("agent_started")
        courier._puback(1, 0, "")
        assert line.sent == ["status", "ev"]
        courier._puback(2, 0, "")
        await asyncio.sleep(0.1)
        assert line.sent == ["status", "ev", "status"]
        courier._puback(3, 0, "")
        assert courier.outbox.count == 0

    asyncio.run(main())
