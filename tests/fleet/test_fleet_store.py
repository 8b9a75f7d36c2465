"""The store: each message once, the newest state wins, losses are known."""

from __future__ import annotations

import math
import random

import pytest
from fleet_world import METRICS, SKETCHES, T0, birth, death, event, heartbeat, reported, window, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EnvironmentFault
from edgekit.fleet import tables
from edgekit.fleet.gaps import SeqRanges
from edgekit.fleet.store import STALE_MS, Store
from edgekit.fleet.writing import Received
from edgekit.schema.message import Window, WindowBatch
from edgekit.telemetry.codec import pack_values, schema_crc


def received(message, *, device="pi-1", site="lab", at=T0):
    return Received(site=site, device=device, message=message, received_ms=at)


@pytest.fixture
def store(database_url):
    store = Store(database_url)
    yield store
    store.close()


def test_device_shows_its_newest_window_and_release(store):
    store.apply([received(m) for m in (birth(), reported(), windows(window(3), window(4, T0 + 10_000, p50=2.5)))])
    page = store.devices(now_ms=T0)
    view = page.devices[0]
    assert (page.total, view.state, view.model, view.version, view.model_digest) == (1, "online", "fashion", "1.0.0", "ab" * 6)
    assert view.latency_p50_ms == pytest.approx(2.5)
    assert view.throughput_per_s == pytest.approx(1.0)
    assert view.sparkline[-1] == pytest.approx(2.5)


def test_message_that_comes_twice_is_stored_once(store):
    batch = [received(m) for m in (birth(), reported(), windows(window(3), window(4)), event(5))]
    store.apply(batch)
    stored = store.stored
    store.apply(batch)
    assert store.stored == stored == 5
    assert store.duplicates == 5
    assert len(store.events().events) == 1
    assert len(store.series("lab", "pi-1", ["requests"], since_ms=0)[0].points) == 2


def test_duplicate_is_known_after_a_restart(store, database_url):
    batch = [received(m) for m in (birth(), windows(window(3)), event(5))]
    store.apply(batch)
    again = Store(database_url)
    again.apply(batch)
    assert (again.stored, again.duplicates) == (0, 3)
    assert again.device("lab", "pi-1", T0).gaps.received == 3


def test_gap_is_counted_as_missing_until_it_arrives_late(store):
    store.apply([received(m) for m in (birth(), windows(window(2), window(5)), heartbeat(6))])
    assert store.device("lab", "pi-1", T0).gaps.missing == 3
    store.apply([received(windows(window(3), window(4), is_late=True))])
    gaps = store.device("lab", "pi-1", T0).gaps
    assert (gaps.received, gaps.late, gaps.missing) == (5, 2, 1)


def test_death_of_another_boot_is_ignored(store):
    store.apply([received(birth(boot=8)), received(death(boot=7))])
    assert store.devices(now_ms=T0).devices[0].state == "online"
    store.apply([received(death(boot=8))])
    assert store.devices(now_ms=T0).devices[0].state == "offline"
    assert store.fleet(T0).attention[0].severity == "critical"


def test_clean_goodbye_needs_no_attention(store):
    store.apply([received(birth()), received(death(is_clean=True))])
    assert store.fleet(T0).attention == ()
    assert store.fleet(T0).offline == 1


def test_silent_device_is_stale(store):
    store.apply([received(birth())])
    assert store.devices(now_ms=T0 + STALE_MS + 1).devices[0].state == "stale"
    assert [view.device for view in store.devices(now_ms=T0 + STALE_MS + 1, state="stale").devices] == ["pi-1"]


def test_older_report_does_not_replace_a_newer_one(store):
    store.apply([received(birth()), received(reported(seq=9, time_ms=T0 + 5, version="2.0.0", counter=2))])
    store.apply([received(reported(seq=3, time_ms=T0, version="1.0.0"))])
    assert store.devices(now_ms=T0).devices[0].version == "2.0.0"


def test_device_whose_clock_went_back_is_not_ignored(store):
    """No clock survives a power cut on many boards: the next boot starts in the past, until NTP answers."""
    store.apply([received(m) for m in (birth(), reported(), windows(window(3)), death())])
    past = T0 - 10**9
    again = (
        birth(boot=8, time_ms=past),
        reported(boot=8, time_ms=past, version="2.0.0", counter=2),
        windows(window(3, past, p50=7.0), boot=8),
    )
    store.apply([received(m) for m in again])
    view = store.devices(now_ms=T0).devices[0]
    assert (view.state, view.version, view.latency_p50_ms) == ("online", "2.0.0", pytest.approx(7.0))
    backlog = (reported(seq=9, time_ms=T0 + 5), windows(window(5, T0 + 10_000), is_late=True))
    store.apply([received(m) for m in backlog])
    view = store.devices(now_ms=T0).devices[0]
    assert (view.version, view.latency_p50_ms) == ("2.0.0", pytest.approx(7.0))


def test_birth_of_the_same_boot_that_comes_late_changes_nothing(store):
    store.apply([received(birth(seq=5, url="http://new")), received(birth(seq=1, url="http://old"))])
    assert store.device("lab", "pi-1", T0).url == "http://new"


def test_last_will_is_no_sign_of_life(store):
    store.apply([received(birth())])
    store.apply([received(death(), at=T0 + 60_000)])
    assert store.devices(now_ms=T0).devices[0].last_seen_ms == T0


def test_figure_that_is_no_number_is_left_out(store):
    import msgspec

    hostile = msgspec.structs.replace(window(3), values=pack_values([math.inf, -math.inf, math.nan, 1e300]))
    store.apply([received(birth()), received(windows(hostile))])
    assert store.devices(now_ms=T0).devices[0].requests is None
    assert store.fleet(T0).errors == 0
    assert store.series("lab", "pi-1", ["latency_p99_ms"], since_ms=0)[0].points == ()


def test_batch_of_windows_fills_the_sparkline(store):
    store.apply([received(birth()), received(windows(*(window(3 + i, T0 + i * 1000, p50=1.0 + i) for i in range(4))))])
    assert store.devices(now_ms=T0).devices[0].sparkline == (1.0, 2.0, 3.0, 4.0)


def test_older_release_than_another_device_serves_is_outdated(store):
    store.apply([received(m, device="pi-1") for m in (birth(), reported())])
    store.apply([received(m, device="pi-2", site="mill") for m in (birth(), reported(version="2.0.0", counter=2))])
    fleet = store.fleet(T0)
    assert (fleet.outdated, fleet.refusing) == (1, 0)
    assert {view.version: view.sites for view in store.releases()} == {"1.0.0": {"lab": 1}, "2.0.0": {"mill": 1}}


def test_window_of_another_schema_is_kept_but_not_shown(store):
    batch = windows(window(3))
    import msgspec

    store.apply([received(birth()), received(msgspec.structs.replace(batch, schema=1))])
    assert store.device("lab", "pi-1", T0).gaps.received == 2
    assert store.devices(now_ms=T0).devices[0].latency_p50_ms is None
    assert store.series("lab", "pi-1", ["requests"], since_ms=0)[0].points == ()


def test_counts_become_rates_and_steps_average(store):
    store.apply(
        [received(birth()), received(windows(*(window(3 + i, T0 + i * 10_000, requests=10.0 * (i + 1)) for i in range(4))))]
    )
    series = store.series("lab", "pi-1", ["requests"], since_ms=0)[0]
    assert series.unit == "1/s"
    assert [value for _time, value in series.points] == [1.0, 2.0, 3.0, 4.0]
    stepped = store.series("lab", "pi-1", ["requests"], since_ms=0, step_ms=20_000)[0]
    assert [value for _time, value in stepped.points] == [1.5, 3.5]


def test_long_series_keeps_its_newest_end(store, monkeypatch):
    monkeypatch.setattr("edgekit.fleet.store.MAX_POINTS", 3)
    store.apply([received(birth()), received(windows(*(window(3 + i, T0 + i * 10_000, p50=1.0 + i) for i in range(6))))])
    assert [v for _t, v in store.series("lab", "pi-1", ["latency_p50_ms"], since_ms=0)[0].points] == [4.0, 5.0, 6.0]


def test_series_goes_over_a_boot_with_other_metrics(store):
    import msgspec

    fewer = msgspec.structs.replace(birth(boot=8, seq=1), metrics=METRICS[2:])
    after = Window(seq=2, start_ms=T0 + 10_000, duration_ms=10_000, values=pack_values([9.0, 12.0]))
    batch = WindowBatch(boot=8, windows=(after,), schema=schema_crc(METRICS[2:], SKETCHES))
    store.apply([received(m) for m in (birth(), windows(window(2)), fewer, batch)])
    p50, requests, unknown = store.series("lab", "pi-1", ["latency_p50_ms", "requests", "nonsense"], since_ms=0)
    assert [v for _t, v in p50.points] == [1.5, 9.0]
    assert len(requests.points) == 1
    assert (unknown.unit, unknown.points) == ("", ())


def test_refusals_are_counted_per_release(store):
    for name in ("pi-1", "pi-2"):
        store.apply(
            [
                received(m, device=name)
                for m in (birth(), reported(), event(3, "install_refused", version="3.0.0", code="selftest.mismatch"))
            ]
        )
    releases = {view.version: view for view in store.fleet(T0).releases}
    assert (releases["1.0.0"].serving, releases["3.0.0"].refusing) == (2, 2)
    attention = store.fleet(T0).attention
    assert [(item.title, item.devices) for item in attention] == [("refused fashion@3.0.0", 2)]


def test_pages_hold_every_device_once(store):
    names = [f"pi-{i:02d}" for i in range(23)]
    store.apply([received(birth(), device=name) for name in random.Random(0).sample(names, len(names))])
    seen, after = [], ""
    while True:
        page = store.devices(now_ms=T0, after=after, limit=5)
        assert page.total == 23
        seen += [view.device for view in page.devices]
        after = page.next
        if not after:
            break
    assert seen == names


@pytest.mark.parametrize(("search", "count"), [("pi-2", 1), ("lab", 3), ("fashion", 1), ("%", 3), ("_", 0), ("nothing", 0)])
def test_search_matches_names_and_releases(store, search, count):
    store.apply([received(birth(), device=f"pi-{i}") for i in range(3)] + [received(reported(), device="pi-0")])
    assert store.devices(now_ms=T0, search=search).total == count


def test_batch_is_all_or_nothing(store, monkeypatch):
    store.apply([received(birth())])

    def cut(*_arguments):
        raise RuntimeError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(type(store._writer), "_event", cut)
        with pytest.raises(RuntimeError):
            store.apply([received(windows(window(3))), received(event(4))])
    assert store.device("lab", "pi-1", T0).gaps.received == 1
    store.apply([received(windows(window(3))), received(event(4))])
    assert store.device("lab", "pi-1", T0).gaps.received == 3
    assert store.stored == 3


def test_newer_schema_is_refused(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    with store._engine.begin() as connection:
        connection.execute(tables.meta.update().values(value="99"))
    store.close()
    with pytest.raises(EnvironmentFault) as caught:
        Store(str(tmp_path / "fleet.db"))
    assert caught.value.code == "store.newer"


def test_unwritable_place_is_refused(tmp_path):
    with pytest.raises(EnvironmentFault) as caught:
        Store(str(tmp_path / "no" / "such" / "folder.db"))
    assert caught.value.code == "store.unreachable"


def test_changes_name_the_devices(store):
    store.apply([received(birth(), device="pi-1")])
    stamp, changed = store.changes_since(0)
    assert changed == {("lab", "pi-1")}
    store.apply([received(birth(), device="pi-2")])
    assert store.changes_since(stamp)[1] == {("lab", "pi-2")}


@settings(deadline=None)
@given(st.lists(st.integers(1, 60)))
def test_ranges_are_a_set(numbers):
    ranges, reference = SeqRanges(), set()
    for number in numbers:
        assert ranges.add(number) == (number not in reference)
        reference.add(number)
    assert ranges.count == len(reference)
    assert ranges.highest == max(reference, default=0)
    assert {n for start, end in ranges.ranges for n in range(start, end + 1)} == reference
    assert ranges.missing(60) == 60 - len(reference)
    assert all(a[1] + 1 < b[0] for a, b in zip(ranges.ranges, ranges.ranges[1:], strict=False))
    assert SeqRanges(ranges.ranges).ranges == ranges.ranges
