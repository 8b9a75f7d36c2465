"""The spool under pressure: coarser before anything is given up, by class, with every number told."""

from __future__ import annotations

import sqlite3

import msgspec
import pytest

from edgekit.agent.merging import merge_payloads
from edgekit.agent.outbox import DAY_S, EARLIEST_MS, KEEP_FINE, Outbox, flatten
from edgekit.agent.windows import SCHEMA
from edgekit.schema.message import Window
from tests.agent.test_merging import make_window, values_of

CAP = 60_000
NOW_MS = EARLIEST_MS + 1_000_000_000


@pytest.fixture
def box(tmp_path):
    made = Outbox(tmp_path / "o.db", max_bytes=CAP, merge=merge_payloads)
    yield made
    made.close()


def put_windows(box, count, *, start=1, boot=1, schema=SCHEMA):
    lost = []
    for seq in range(start, start + count):
        payload = msgspec.msgpack.encode(make_window(seq, [1.0, 2.0]))
        lost += box.put(boot=boot, seq=seq, kind="w", payload=payload, schema=schema)[1]
    return lost


def waiting(box, limit=100_000):
    return [msgspec.msgpack.decode(row.payload, type=Window) for row in box.read(kinds=("w",), limit=limit)]


def covered(windows):
    seqs = []
    for window in windows:
        ends = window.merged or (window.seq, window.seq)
        for at in range(0, len(ends), 2):
            seqs += range(ends[at], ends[at + 1] + 1)
    return seqs


def told(lost):
    return [
        seq for drop in lost for at in range(0, len(drop.ranges), 2) for seq in range(drop.ranges[at], drop.ranges[at + 1] + 1)
    ]


def test_old_windows_become_coarse_and_nothing_is_lost(box):
    count = 3000
    assert put_windows(box, count) == []
    assert box.size_bytes <= CAP
    windows = waiting(box)
    assert sorted(covered(windows)) == list(range(1, count + 1))
    assert sum(values_of(window)["requests"] for window in windows) == 2 * count
    sizes = [len(covered([window])) for window in windows]
    assert max(sizes) == 60
    assert sizes[-KEEP_FINE:] == [1] * KEEP_FINE
    assert sizes == sorted(sizes, reverse=True)
    assert windows == sorted(windows, key=lambda window: window.seq)


@pytest.mark.fault("F19")
def test_week_without_a_broker_keeps_cap_order_and_books(box):
    """A week at 10 messages a second is 6 million; what matters is the ratio to the cap, so both are smaller here."""
    for seq in range(1, 6):
        box.put(boot=1, seq=seq, kind="ev", payload=b"e" * 100)
    count = 15_000
    lost = put_windows(box, count, start=6)
    assert box.size_bytes <= CAP
    assert {drop.kind for drop in lost} == {"w"}
    kept, gone = covered(waiting(box)), told(lost)
    assert sorted(kept + gone) == list(range(6, count + 6))
    assert sum(drop.count for drop in lost) == len(gone)
    assert max(gone) < min(kept), "the oldest go first"
    assert len(box.read(kinds=("ev",))) == 5


def test_windows_of_two_boots_or_another_schema_are_not_merged(box):
    put_windows(box, 100, boot=1)
    put_windows(box, 100, boot=2)
    put_windows(box, 60, boot=3, schema=99)
    for row in box.read(kinds=("w",), limit=100_000):
        window = msgspec.msgpack.decode(row.payload, type=Window)
        assert row.boot < 3 or not window.merged
    by_boot = {row.boot: [] for row in box.read(kinds=("w",), limit=100_000)}
    for row in box.read(kinds=("w",), limit=100_000):
        by_boot[row.boot] += covered([msgspec.msgpack.decode(row.payload, type=Window)])
    assert sorted(by_boot[2]) == list(range(1, 101))


def test_what_is_on_its_way_is_neither_merged_nor_dropped(box):
    put_windows(box, 50)
    box.held = {row.id for row in box.read(kinds=("w",), limit=5)}
    put_windows(box, 6_000, start=51)
    first = box.read(kinds=("w",), limit=5)
    assert [row.seq for row in first] == [1, 2, 3, 4, 5]
    assert not any(msgspec.msgpack.decode(row.payload, type=Window).merged for row in first)
    before = box.count
    box.confirm(sorted(box.held))
    assert box.count == before - 5


def test_what_is_on_its_way_is_not_dropped_for_room(tmp_path):
    box = Outbox(tmp_path / "full.db", max_bytes=20_000)
    put_windows(box, 10)
    box.held = {row.id for row in box.read(kinds=("w",), limit=5)}
    lost = put_windows(box, 500, start=11)
    assert [row.seq for row in box.read(kinds=("w",), limit=5)] == [1, 2, 3, 4, 5]
    assert min(told(lost)) == 6


def test_merged_spool_survives_reopening(tmp_path, box):
    put_windows(box, 1000)
    seqs, size, count = sorted(covered(waiting(box))), box.size_bytes, box.count
    again = Outbox(tmp_path / "o.db", max_bytes=CAP, merge=merge_payloads)
    assert (sorted(covered(waiting(again))), again.size_bytes, again.count) == (seqs, size, count)
    put_windows(again, 500, start=1001)
    assert sorted(covered(waiting(again))) == list(range(1, 1501))


def test_least_important_class_goes_first(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=40_000)
    order = ("x", "w", "lb", "ev")
    for place, kind in enumerate(reversed(order)):
        for seq in range(40):
            box.put(boot=1, seq=1 + place * 100 + seq, kind=kind, payload=b"p" * 150)
    seen = []
    for seq in range(1000, 1200):
        seen += [drop.kind for drop in box.put(boot=1, seq=seq, kind="birth", payload=b"b" * 150)[1]]
    assert list(dict.fromkeys(seen)) == list(order)


def test_message_outlives_its_time_by_a_clock_that_is_right(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    for seq, kind in enumerate(("birth", "rep", "ev", "lb", "w", "x"), 1):
        box.put(boot=1, seq=seq, kind=kind, payload=b"p")
    db = sqlite3.connect(tmp_path / "o.db")
    with db:
        db.execute("update spool set stored_ms = ?", (NOW_MS,))
    day_ms = int(DAY_S * 1000)
    assert box.expire(NOW_MS + 6 * day_ms) == []
    assert [(drop.kind, drop.reason, drop.ranges) for drop in box.expire(NOW_MS + 8 * day_ms)] == [("x", "expired", (6, 6))]
    assert {drop.kind for drop in box.expire(NOW_MS + 100 * day_ms)} == {"lb", "w"}
    assert [row.kind for row in box.read(kinds=("birth", "rep", "ev", "lb", "w", "x"))] == ["birth", "rep", "ev"]
    with db:
        db.execute("update spool set stored_ms = 5000")
    assert box.expire(NOW_MS + 1000 * day_ms) == [], "what was stored in 1970 was stored by a clock that was not set"


@pytest.mark.fault("F21")
def test_refused_message_is_set_aside_and_can_be_revived(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    row_id, _ = box.put(boot=1, seq=1, kind="ev", payload=b"p")
    box.put(boot=1, seq=2, kind="ev", payload=b"q")
    assert box.refuse([row_id], most=3) == []
    assert box.refuse([row_id], most=3) == []
    (buried,) = box.refuse([row_id], most=3)
    assert (buried.seq, box.count, box.dead) == (1, 1, 1)
    assert [row.seq for row in box.read(kinds=("ev",))] == [2]
    box.close()
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    assert (box.count, box.dead) == (1, 1)
    assert box.revive() == 1
    assert [row.seq for row in box.read(kinds=("ev",))] == [1, 2]
    assert (box.count, box.dead) == (2, 0)


def test_spool_of_an_older_agent_goes_on(tmp_path):
    path = tmp_path / "o.db"
    db = sqlite3.connect(path)
    with db:
        db.execute(
            "create table spool (id integer primary key autoincrement, boot integer not null, seq integer not null, "
            "kind text not null, schema integer not null default 0, payload blob not null, unique (boot, seq))"
        )
        for seq in range(1, 301):
            payload = msgspec.msgpack.encode(make_window(seq, [1.0, 2.0]))
            db.execute("insert into spool (boot, seq, kind, schema, payload) values (9, ?, 'w', ?, ?)", (seq, SCHEMA, payload))
    db.close()
    box = Outbox(path, max_bytes=CAP, merge=merge_payloads)
    put_windows(box, 300, start=301, boot=9)
    assert sorted(covered(waiting(box))) == list(range(1, 601))
    older = sqlite3.connect(path)  # and back again: an older agent's insert
    with older:
        older.execute("insert into spool (boot, seq, kind, schema, payload) values (9, 601, 'w', 0, x'00')")
    assert older.execute("select count(*) from spool where seq = 601").fetchone()[0] == 1


def test_flat_ranges():
    assert flatten([]) == ()
    assert flatten([4, 2, 3, 9]) == (2, 4, 9, 9)
