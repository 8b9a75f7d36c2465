"""Merged windows, losses that are told, labels and samples in the store: each once, and every number accounted for."""

from __future__ import annotations

import sqlite3

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import ArtifactError
from edgekit.fleet import tables
from edgekit.fleet.admission import check_message
from edgekit.fleet.gaps import SeqRanges
from edgekit.fleet.migrations.upgrading import HEAD
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received, read_ranges
from edgekit.schema.message import Event, InputSample, Label, ModelWindow, SampleTensor
from tests.fleet.fleet_world import T0, birth, event, heartbeat, window, windows
from tests.fleet.old_database import make_old_database


def apply(store, *messages):
    for message in messages:
        check_message(message)
        store.apply([Received(site="lab", device="d", message=message, received_ms=T0)])


def merged(seq, *ranges, requests=10.0, **fields):
    made = window(seq, T0 + seq * 1000, requests=requests)
    return msgspec.structs.replace(made, merged=ranges, **fields)


def gaps(store):
    view = store.device("lab", "d", T0).gaps
    return view.received, view.late, view.missing, view.lost, view.merged


def total(store):
    """All requests that are stored, by the windows and by the models' rows."""
    with store._reading() as connection:
        vectors = [
            msgspec.msgpack.decode(row.sketches, type=tuple[bytes, ...]) for row in connection.execute(tables.windows.select())
        ]
        rows = connection.execute(tables.model_windows.select()).all()
    from edgekit.telemetry.histogram import LatencyHistogram

    return sum(LatencyHistogram.decode(sketches[0]).count for sketches in vectors), sum(row.requests for row in rows)


@pytest.fixture
def store():
    made = Store("sqlite://")
    yield made
    made.close()


def test_merged_window_stands_for_all_its_numbers(store):
    apply(store, birth(), windows(merged(12, 2, 8, 10, 12), is_late=True), heartbeat(12))
    assert gaps(store) == (11, 10, 1, 0, 10)


def test_merged_window_replaces_the_parts_that_are_here(store):
    model = ModelWindow(model_digest="ab" * 6, requests=10)
    parts = [msgspec.structs.replace(window(seq, T0 + seq), models=(model,)) for seq in (2, 3, 4)]
    apply(store, birth(), windows(parts[1]))
    whole = merged(4, 2, 4, requests=30, models=(msgspec.structs.replace(model, requests=30),))
    apply(store, windows(whole, is_late=True))
    assert total(store) == (30, 30)
    apply(store, windows(*parts), windows(whole))
    assert total(store) == (30, 30)
    larger = merged(6, 2, 6, requests=50, models=(msgspec.structs.replace(model, requests=50),))
    apply(store, windows(window(6, T0), larger), windows(larger))
    assert total(store) == (50, 50)
    assert gaps(store)[0] == 6
    assert store.duplicates == 5


def test_parts_that_are_all_here_make_the_merged_one_a_duplicate(store):
    apply(store, birth(), windows(window(2), window(3)), windows(merged(3, 2, 3, requests=20)))
    assert total(store)[0] == 20
    assert store.duplicates == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_of_arrival_counts_each_request_once(data):
    """A device that merges 2..9 step by step, and a network that delivers any of what was sent, often twice."""
    fine = [window(seq, T0 + seq, requests=1.0) for seq in range(2, 10)]
    pairs = [merged(seq + 1, seq, seq + 1, requests=2.0) for seq in range(2, 10, 2)]
    whole = merged(9, 2, 9, requests=8.0)
    sent = data.draw(st.lists(st.sampled_from([*fine, *pairs]), max_size=20))
    store = Store("sqlite://")
    apply(store, birth(), *(windows(item) for item in sent), windows(whole))
    for item in data.draw(st.lists(st.sampled_from([*fine, *pairs, whole]), max_size=8)):
        apply(store, windows(item))
    assert total(store)[0] == 8
    assert gaps(store)[0] == 9
    store.close()


def test_told_losses_explain_gaps_and_what_came_anyway_is_no_loss(store):
    fields = {"count": 5, "boot": 7, "ranges": "3-6,9", "kind": "w", "reason": "full"}
    apply(store, birth(), windows(window(2), window(4)), heartbeat(12))
    apply(store, Event(boot=7, seq=12, time_ms=T0, kind="messages_dropped", fields=fields))
    assert gaps(store) == (4, 0, 4, 4, 0)
    apply(store, Event(boot=7, seq=11, time_ms=T0, kind="messages_dropped", fields={"boot": "x", "ranges": 5}))
    apply(store, Event(boot=7, seq=10, time_ms=T0, kind="messages_dropped", fields={"boot": 8, "ranges": "1-4"}))
    assert gaps(store) == (6, 0, 2, 8, 0)


@pytest.mark.parametrize("ranges", [(1,), (3, 2), (2, 1 << 62), (5, 9), (0, 4), (2, 3, 1, 4)])
def test_ranges_without_sense_are_refused_at_the_door(ranges):
    with pytest.raises(ArtifactError, match="merged"):
        check_message(windows(merged(4, *ranges)))


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)), max_size=25))
def test_ranges_are_a_set(pairs):
    seen, expected = SeqRanges(), set()
    for first, length in pairs:
        new = set(range(first, first + length + 1)) - expected
        expected |= new
        assert seen.add_range(first, first + length) == len(new)
        assert seen.count == len(expected)
        assert {n for a, b in seen.ranges for n in range(a, b + 1)} == expected
        assert all(a[1] + 1 < b[0] for a, b in zip(seen.ranges, seen.ranges[1:], strict=False))


def test_loss_report_of_an_older_agent_is_read():
    assert read_ranges({"first_seq": 3, "last_seq": 5}) == [(3, 5)]
    assert read_ranges({"ranges": "a-b,7-5,0-2,4"}) == [(4, 4)]


def test_labels_and_samples_are_stored_once(store):
    label = Label(boot=7, seq=2, time_ms=T0, model_digest="ab" * 6, prediction_id="p1", label="cat", predicted="dog")
    tensor = SampleTensor(name="x", dtype="uint8", shape=(2,), data=b"ab")
    sample = InputSample(
        boot=7, seq=3, time_ms=T0, model_digest="ab" * 6, prediction_id="p1", tensors=(tensor,), redacted=("blur:x:2",)
    )
    apply(store, birth(), label, sample, label, sample)
    assert store.duplicates == 2
    with store._reading() as connection:
        (stored_label,) = connection.execute(tables.labels.select()).all()
        (stored_sample,) = connection.execute(tables.samples.select()).all()
    assert (stored_label.prediction_id, stored_label.label, stored_label.predicted) == ("p1", "cat", "dog")
    assert stored_sample.redacted == "blur:x:2"
    assert msgspec.msgpack.decode(stored_sample.tensors, type=tuple[SampleTensor, ...]) == (tensor,)
    assert gaps(store)[0] == 3


def test_device_page_says_how_each_model_does(store):
    models = (
        ModelWindow(model_digest="aa" * 6, requests=5, samples=5, sketched=4, labelled=3, right=2, verdicts={"clip x": 1}),
        ModelWindow(model_digest="bb" * 6, requests=7, samples=7),
    )
    apply(store, birth(), windows(*(msgspec.structs.replace(window(seq), models=models) for seq in (2, 3))))
    views = store.device("lab", "d", T0).models
    assert [(view.model_digest, view.requests, view.sketched, view.labelled, view.right) for view in views] == [
        ("aa" * 6, 10, 8, 6, 4),
        ("bb" * 6, 14, 0, 0, 0),
    ]


def test_database_of_an_older_version_is_brought_up(tmp_path):
    path = make_old_database(tmp_path / "fleet.db")
    db = sqlite3.connect(path)
    with db:
        for name in ("lost", "steps", "merged"):
            db.execute(f"alter table boots drop column {name}")
        db.execute("alter table windows drop column merged")
        for name in ("model_windows", "labels", "samples"):
            db.execute(f"drop table {name}")
        db.execute("update meta set value = '1' where key = 'schema_version'")
    db.close()
    store = Store(str(path))
    apply(store, birth(), windows(merged(4, 2, 4), is_late=True), event(5))
    assert gaps(store) == (5, 3, 0, 0, 3)
    store.close()
    version = sqlite3.connect(path).execute("select value from meta where key = 'schema_version'").fetchone()
    assert version == (str(int(HEAD)),)
