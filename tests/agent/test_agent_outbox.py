"""The spool: nothing leaves without a confirmation, and a full one says what it dropped."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.agent.outbox import Outbox

CAP = 20_000


def fill(box, count, *, kind="w", boot=1, start=1, size=100):
    return [
        drop for seq in range(start, start + count) for drop in box.put(boot=boot, seq=seq, kind=kind, payload=b"x" * size)[1]
    ]


def test_message_survives_reopening(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    box.put(boot=2**63 - 1, seq=1, kind="ev", payload=b"hello")
    box.close()
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    (row,) = box.read(kinds=("ev",))
    assert (row.boot, row.seq, row.kind, row.payload) == (2**63 - 1, 1, "ev", b"hello")
    assert box.count == 1


def test_confirmed_message_is_gone_for_good(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    fill(box, 3)
    box.confirm([row.id for row in box.read(kinds=("w",), limit=2)])
    assert [row.seq for row in box.read(kinds=("w",))] == [3]
    newest = box.newest_id()
    box.confirm([newest])
    assert (box.count, box.size_bytes) == (0, 0)
    fill(box, 1, start=4)
    assert box.newest_id() > newest


def test_full_spool_drops_oldest_windows_and_keeps_events(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    fill(box, 5, kind="ev")
    dropped = fill(box, 200, start=6)
    assert box.size_bytes <= CAP
    assert {drop.kind for drop in dropped} == {"w"}
    assert len(box.read(kinds=("ev",))) == 5
    kept = [row.seq for row in box.read(kinds=("w",), limit=1000)]
    gone = sum(drop.count for drop in dropped)
    assert len(kept) + gone == 200
    assert kept == list(range(6 + gone, 206))
    assert dropped[0].first_seq == 6
    assert dropped[-1].last_seq == 5 + gone


def test_births_are_never_dropped(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    box.put(boot=1, seq=1, kind="birth", payload=b"b" * 500)
    fill(box, 300, kind="ev", start=2)
    assert len(box.read(kinds=("birth",))) == 1


def test_damaged_spool_set_aside(tmp_path):
    path = tmp_path / "o.db"
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    box = Outbox(path, max_bytes=CAP)
    fill(box, 1)
    assert box.count == 1
    assert [p for p in tmp_path.iterdir() if "damaged" in p.name]


def test_read_by_kind_boot_and_position(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    fill(box, 2, boot=1)
    fill(box, 2, boot=2, kind="ev")
    fill(box, 2, boot=2, start=3)
    assert [(row.boot, row.seq) for row in box.read(kinds=("w",), boot=2)] == [(2, 3), (2, 4)]
    first = box.read(kinds=("w", "ev"), limit=1)[0]
    assert len(box.read(kinds=("w", "ev"), after=first.id)) == 5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["w", "ev", "rep"]), st.integers(0, 3000)), max_size=60))
def test_counters_agree_with_the_file(tmp_path_factory, messages):
    path = tmp_path_factory.mktemp("o") / "o.db"
    box = Outbox(path, max_bytes=CAP)
    for seq, (kind, size) in enumerate(messages, 1):
        box.put(boot=1, seq=seq, kind=kind, payload=b"x" * size)
    db = sqlite3.connect(path)
    assert db.execute("select count(*) from spool").fetchone()[0] == box.count
    assert box.size_bytes == sum(len(row.payload) + 64 for row in box.read(kinds=("w", "ev", "rep"), limit=1000))


def test_spool_damaged_inside_is_set_aside(tmp_path):
    """The header is whole, a page is not: nothing of it shows before the messages are counted."""
    path = tmp_path / "o.db"
    box = Outbox(path, max_bytes=1 << 20)
    fill(box, 200, size=500)
    box.close()
    data = bytearray(path.read_bytes())
    for start in range(3 * 4096, len(data), 4096):
        data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    box = Outbox(path, max_bytes=CAP)
    fill(box, 1)
    assert box.count == 1
    assert [p for p in tmp_path.iterdir() if "damaged" in p.name]


def test_spool_without_a_file_is_kept_in_memory(tmp_path):
    box = Outbox(tmp_path / "missing" / "o.db", max_bytes=CAP)
    fill(box, 2)
    box.confirm([1])
    assert box.count == 1
    assert list(tmp_path.iterdir()) == []


def test_removal_that_fails_leaves_no_open_transaction(tmp_path):
    path = tmp_path / "o.db"
    box = Outbox(path, max_bytes=CAP)
    fill(box, 2)
    box._db.execute("create trigger t before delete on spool when old.id = 2 begin select raise(fail, 'full'); end")
    with pytest.raises(sqlite3.Error):
        box.confirm([1, 2])
    assert box.count == 2
    box._db.execute("drop trigger t")
    fill(box, 1, start=3)
    assert sqlite3.connect(path).execute("select count(*) from spool").fetchone()[0] == box.count == 3


def test_states_that_a_newer_one_replaces_go_before_events(tmp_path):
    box = Outbox(tmp_path / "o.db", max_bytes=CAP)
    fill(box, 5, kind="ev")
    dropped = fill(box, 300, kind="rep", start=6)
    assert box.size_bytes <= CAP
    assert {drop.kind for drop in dropped} == {"rep"}
    assert len(box.read(kinds=("ev",))) == 5
    assert box.read(kinds=("rep",), limit=1000)[-1].seq == 305
