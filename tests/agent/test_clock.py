"""A clock that nobody set: what it says of itself, and what becomes of the stamps when it jumps."""

from __future__ import annotations

from edgekit.agent.clock import STEP_MS, Clock, clock_source
from edgekit.agent.config import AgentConfig
from edgekit.agent.journal import Journal
from edgekit.agent.outbox import Outbox
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received
from edgekit.schema.message import Event
from edgekit.telemetry.codec import decode
from tests.fleet.fleet_world import birth, window, windows


class Time:
    def __init__(self, source="unsynced"):
        self.wall, self.mono, self.source = 5_000, 1.0, source

    def clock(self):
        return Clock(wall_ms=lambda: self.wall, mono_s=lambda: self.mono, ask=lambda: self.source)

    def pass_s(self, seconds):
        self.wall += int(seconds * 1000)
        self.mono += seconds


def test_kernel_says_something():
    assert clock_source() in {"ntp", "unsynced", "system"}


def test_jump_is_seen_once_and_steering_never():
    time = Time()
    clock = time.clock()
    time.pass_s(60)
    assert clock.check() is None
    for _ in range(100):
        time.pass_s(60)
        time.wall += STEP_MS // 2
        assert clock.check() is None
    time.wall += 1_700_000_000_000
    time.source = "ntp"
    step = clock.check()
    assert (step.delta_ms, step.was_set) == (1_700_000_000_000, False)
    assert clock.check() is None
    time.wall -= 3_600_000
    assert clock.check().was_set
    time.source = "unsynced"
    assert clock.refresh()
    assert not clock.refresh()


def test_jump_is_told_before_the_next_message(tmp_path):
    time = Time()
    outbox = Outbox(tmp_path / "o.db", max_bytes=1 << 20)
    journal = Journal(outbox, AgentConfig(device="d", broker="mqtt://127.0.0.1:1"), "0", clock=time.clock())
    journal.event("agent_started")
    time.wall += 50_000
    journal.event("committed")
    events = [decode(row.payload) for row in outbox.read(kinds=("ev",))]
    assert [(event.seq, event.kind) for event in events] == [(1, "agent_started"), (2, "clock_stepped"), (3, "committed")]
    assert events[1].fields == {"delta_ms": 50_000, "last_seq": 1, "is_correction": True}


def test_nothing_expires_while_nobody_knows_the_time(tmp_path):
    time = Time()
    outbox = Outbox(tmp_path / "o.db", max_bytes=1 << 20, ttl_s={"ev": -1.0})
    journal = Journal(outbox, AgentConfig(device="d", broker="mqtt://127.0.0.1:1"), "0", clock=time.clock())
    journal.event("agent_started")
    journal.expire()
    assert [decode(row.payload).kind for row in outbox.read(kinds=("ev",))] == ["agent_started"]
    time.source = "ntp"
    journal.clock.refresh()
    journal.expire()
    (told,) = [decode(row.payload) for row in outbox.read(kinds=("ev",))]
    assert (told.kind, told.fields["reason"], told.fields["ranges"]) == ("messages_dropped", "expired", "1")


def stepped(seq, delta_ms, last_seq, **fields):
    fields = {"delta_ms": delta_ms, "last_seq": last_seq, "is_correction": True} | fields
    return Event(boot=7, seq=seq, time_ms=0, kind="clock_stepped", fields=fields)


def stored(*messages):
    store = Store("sqlite://")
    for message in messages:
        store.apply([Received(site="lab", device="d", message=message, received_ms=1)])
    return store


def starts(store):
    (series,) = store.series("lab", "d", ["latency_p50_ms"], since_ms=0)
    return [time_ms for time_ms, _ in series.points]


def test_server_moves_stamps_that_are_here_and_those_that_come_later():
    day = 86_400_000
    one = stored(
        birth(), windows(window(2, 1000)), stepped(4, day, 3), windows(window(3, 2000), is_late=True), windows(window(5, day))
    )
    assert starts(one) == [day, day + 1000, day + 2000]
    again = stored(birth(), windows(window(2, 1000)), stepped(4, day, 3), stepped(4, day, 3))
    assert starts(again) == [day + 1000], "told twice, moved once"


def test_jump_of_a_clock_that_was_right_moves_nothing():
    assert starts(stored(birth(), windows(window(2, 1000)), stepped(4, 5000, 3, is_correction=False))) == [1000]


def test_nonsense_of_a_device_moves_nothing_out_of_range():
    store = stored(birth(), windows(window(2, 1000)), stepped(4, -(10**15), 3), stepped(5, 2**70, 3), stepped(6, "x", 3))
    assert starts(store) == [1000]
