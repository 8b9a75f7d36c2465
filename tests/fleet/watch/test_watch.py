"""The watch over a real store: what devices send is judged once, whenever it comes and whatever is killed meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from sqlalchemy import func, select
from watch_world import BUDGET, DIGEST, INTERVAL_MS, MODEL, T0, WatchWorld

from edgekit.errors import UsageError
from edgekit.fleet.audit import Audit
from edgekit.fleet.store import Store
from edgekit.fleet.watch import store
from edgekit.fleet.watch.service import Watch
from edgekit.fleet.watch.tables import watch_facts, watch_intervals, window_marks
from edgekit.fleet.watch.views import Budget
from edgekit.schema.message import Event, Label


@pytest.fixture
def world(tmp_path):
    made = WatchWorld(str(tmp_path / "fleet.db"))
    made.know()
    yield made
    made.store.close()


def stored(world, *, table=watch_intervals):
    """Every row that follows from the windows, to compare."""
    with world.store.read() as connection:
        return connection.execute(select(table).order_by(*table.primary_key.columns)).all()


def state_of(world):
    with world.store.read() as connection:
        return store.read_watches(connection, MODEL)[0].state


def page(world, number, **options):
    return world.watch.drift(MODEL, T0, now_ms=world.after(number), **options)


def count_marks(world):
    with world.store.read() as connection:
        return connection.execute(select(func.count()).select_from(window_marks)).scalar()


def test_drift_found_in_the_slice_where_it_is_on_both_databases(database_url):
    world = WatchWorld(database_url)
    world.know()
    for number in range(10):
        world.minute(number)
    world.run(10)
    assert not any(stream.is_alarm for stream in page(world, 10).streams)
    for number in range(10, 14):
        for name in world.names:
            shift = 1.0 if world.site(name) == "north" else 0.0
            world.send(name, world.window(name, T0 + number * INTERVAL_MS, world.inputs(shift)))
    assert world.run(14) == 4
    found = page(world, 14)
    north = next(stream for stream in found.streams if (stream.stream, stream.slice) == ("x[0]", "site=north"))
    assert north.is_alarm
    assert 10 <= (north.since_ms - T0) / INTERVAL_MS <= 11
    assert north.noticed_ms == world.after(14)
    assert not any(stream.is_alarm for stream in found.streams if stream.slice == "site=south")
    whole = next(stream for stream in found.streams if (stream.stream, stream.slice) == ("x[0]", "all"))
    assert {device.site for device in whole.top_devices[:3]} == {"north"}
    assert sum(bin_.now for bin_ in north.histogram) == pytest.approx(1.0)
    assert [point.samples for point in north.timeline] == [180] * 14
    assert north.statistics.psi == pytest.approx(north.effect)
    assert found.loss.coverage == pytest.approx(1.0)
    findings = [finding for finding in world.watch.findings(MODEL) if finding.stream == "x[0]"]
    assert [finding.kind for finding in findings] == ["drift"], "one finding for one cause"
    assert "site=north" in f"{findings[0].slice} {findings[0].text}"
    world.store.close()


def test_interval_that_is_not_over_waits(world):
    world.minute(0)
    assert world.watch.run(T0 + INTERVAL_MS + 119_000) == 0
    assert count_marks(world) == 1, "marks that wait become one"
    assert world.run(1) == 1
    assert count_marks(world) == 0


def test_nothing_new_is_not_judged_again(world):
    world.minute(0)
    assert [world.run(1), world.run(1)] == [1, 0]


def test_windows_that_come_late_give_what_they_would_have_given_in_time(tmp_path):
    """One device was cut off for twenty intervals in which it saw drift; its backlog arrives at the end."""
    early, late = (WatchWorld(str(tmp_path / f"{name}.db"), seed=3) for name in ("early", "late"))
    for world in (early, late):
        world.know()
    backlog = {world: [] for world in (early, late)}
    for number in range(45):
        for world in (early, late):
            for name in world.names:
                inputs = world.inputs(1.0 if 15 <= number < 35 else 0.0)
                window = world.window(name, T0 + number * INTERVAL_MS, inputs, labelled=5)
                if world is late and name in {"cam-1", "cam-2"} and 10 <= number < 30:
                    backlog[world].append((name, window))
                else:
                    world.send(name, window)
        for world in (early, late):
            world.run(number + 1)
    assert state_of(early) != state_of(late)
    for name, window in backlog[late]:
        late.send(name, window, is_late=True)
    assert late.run(45) == 20
    assert state_of(early) == state_of(late)
    assert [row.data for row in stored(early)] == [row.data for row in stored(late)]
    assert [row.evidence for row in stored(early, table=watch_facts)] == [
        row.evidence for row in stored(late, table=watch_facts)
    ]
    for world in (early, late):
        world.store.close()


def test_restart_between_any_two_runs_changes_nothing(tmp_path):
    whole, parts = (WatchWorld(str(tmp_path / f"{name}.db"), seed=4) for name in ("whole", "parts"))
    for world in (whole, parts):
        world.know()
        for number in range(12):
            world.minute(number, shift=0.6 if number > 6 else 0.0)
            if world is parts:
                world.watch = Watch(world.store)
                world.run(number + 1)
    whole.run(12)
    assert state_of(whole) == state_of(parts)
    assert [stream.since_ms for stream in page(whole, 12).streams] == [stream.since_ms for stream in page(parts, 12).streams]
    for world in (whole, parts):
        world.store.close()


def test_killed_in_a_run_and_every_window_is_counted_once(tmp_path):
    world = WatchWorld(str(tmp_path / "fleet.db"), seed=5)
    world.know()
    for number in range(30):
        world.minute(number)
    script = (
        "import os, signal, sys, random\n"
        "from edgekit.fleet.store import Store\n"
        "from edgekit.fleet.watch import service, store\n"
        "from edgekit.fleet.watch.service import Watch\n"
        "kill_at = int(sys.argv[2])\n"
        "calls = 0\n"
        "def counted(function):\n"
        "    def wrapper(*args, **kwargs):\n"
        "        global calls\n"
        "        calls += 1\n"
        "        if calls == kill_at:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return function(*args, **kwargs)\n"
        "    return wrapper\n"
        "for name in ('write_interval', 'write_evidence', 'write_snapshots', 'write_findings', 'drop_marks', 'save_state'):\n"
        "    setattr(store, name, counted(getattr(store, name)))\n"
        "service.MAX_INTERVALS = 7\n"
        "watch = Watch(Store(sys.argv[1]))\n"
        "for _ in range(8):\n"
        "    watch.run(int(sys.argv[3]))\n"
    )
    deaths = 0
    for kill_at in (1, 2, 9, 10, 11, 12, 15, 21, 1000):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "fleet.db"), str(kill_at), str(world.after(30))], check=False
        )
        deaths += done.returncode == -signal.SIGKILL
        assert done.returncode in {0, -signal.SIGKILL}
    assert deaths >= 5
    found = page(world, 30)
    assert sum(point.samples for point in next(each for each in found.streams if each.stream == "x[0]").timeline) == 30 * 6 * 60
    assert count_marks(world) == 0
    other = WatchWorld(str(tmp_path / "other.db"), seed=5)
    other.know()
    for number in range(30):
        other.minute(number)
    other.run(30)
    assert state_of(world) == state_of(other)
    for each in (world, other):
        each.store.close()


def test_merged_window_takes_the_place_of_those_it_stands_for(world):
    name = world.names[0]
    for number in range(3):
        world.minute(number)
    world.run(3)
    before = {at: counts.samples for at, counts in slices(world)}
    merged = world.window(name, T0, world.inputs(count=170), merged=(3, 6), seq=3)
    world.send(name, msgspec.structs.replace(merged, duration_ms=4 * INTERVAL_MS), is_late=True)
    assert world.run(4) >= 3
    after = {at: counts.samples for at, counts in slices(world)}
    assert before == {T0 + number * INTERVAL_MS: 360 for number in range(3)}
    assert after == {T0: 300 + 170, T0 + INTERVAL_MS: 300, T0 + 2 * INTERVAL_MS: 300}


def slices(world, name="all"):
    with world.store.read() as connection:
        row = store.read_watches(connection, MODEL)[0]
        found = store.read_slices(connection, row.id, since_ms=0, slices=[name])
    return [(at, counts) for at, counts, _ in found.get(name, [])]


def test_clock_set_right_moves_windows_to_where_they_belong(world):
    name = world.names[0]
    world.send(name, world.window(name, T0 + 9 * INTERVAL_MS, world.inputs()))
    world.run(12)
    assert [at for at, _ in slices(world)] == [T0 + 9 * INTERVAL_MS]
    delta = -5 * INTERVAL_MS
    fields = {"is_correction": True, "delta_ms": delta, "last_seq": 3}
    world.give(name, Event(boot=7, seq=4, time_ms=T0, kind="clock_stepped", fields=fields))
    world.run(12)
    assert [(at, counts.samples) for at, counts in slices(world)] == [(T0 + 4 * INTERVAL_MS, 60)]


def test_windows_before_their_reference_is_known_are_judged_when_it_is(tmp_path):
    world = WatchWorld(str(tmp_path / "fleet.db"))
    world.watch.set_budget(MODEL, BUDGET, actor="operator", now_ms=T0)
    for number in range(5):
        world.minute(number, shift=1.0, labelled=10)
    world.run(5)
    found = page(world, 5)
    assert not found.streams
    assert "reference profile" in found.note
    assert world.watch.quality(MODEL, now_ms=world.after(5), since_ms=T0).slices[0].labelled == 5 * 6 * 10
    world.know()
    assert world.run(5) == 5
    assert any(stream.is_alarm and stream.stream == "x[0]" for stream in page(world, 5).streams)
    world.store.close()


def test_labels_show_concept_drift_that_the_estimate_cannot_see(world):
    for number in range(6):
        world.minute(number, labelled=20)
    world.run(6)
    quiet = world.watch.quality(MODEL, now_ms=world.after(6), since_ms=T0).slices[0]
    assert not quiet.is_concept_drift
    assert quiet.estimated_low <= quiet.realised_high
    assert abs(quiet.gap) < 0.06
    for number in range(6, 12):
        world.minute(number, labelled=20, wrong=0.4)
    world.run(12)
    found = world.watch.quality(MODEL, now_ms=world.after(12), since_ms=T0 + 6 * INTERVAL_MS)
    whole = found.slices[0]
    assert whole.is_concept_drift
    assert whole.gap > 0.15
    assert whole.label_coverage == pytest.approx(20 / 60)
    assert len(found.timeline) == 6
    assert found.assumption == "no concept drift"
    signals = {(each.name, each.labels.get("slice", "")): each for each in world.watch.signals(world.after(12))}
    assert signals["accuracy.gap", "all"].value < -0.05
    concepts = [finding for finding in world.watch.findings(MODEL) if finding.kind == "concept_drift"]
    assert [finding.slice for finding in concepts] == ["all"], "one finding, not one for each slice"


def test_labels_of_their_own_are_joined_to_their_predictions(world):
    world.minute(0)
    world.run(1)
    name = world.names[0]
    common = {"boot": 7, "model_digest": "cd" * 6, "time_ms": T0 + 1000}
    world.give(name, Label(seq=50, prediction_id="p1", label="a", predicted="a", confidence=0.9, **common))
    world.give(name, Label(seq=51, prediction_id="p2", label="a", predicted="b", confidence=0.9, is_counted=True, **common))
    world.give(name, Label(seq=52, prediction_id="p3", label="a", **common))
    whole = world.watch.quality(MODEL, now_ms=world.after(1), since_ms=T0).slices[0]
    assert (whole.labelled, whole.realised) == (1, 1.0), "one is counted by the device, one nobody can judge"


def test_versions_stand_beside_each_other_by_class_of_devices(world):
    world.minute(0)
    world.run(1)
    found = world.watch.versions(MODEL, now_ms=world.after(1), since_ms=T0)
    assert [(view.version, view.device_class, view.devices) for view in found] == [
        ("1.0.0", "", 6),
        ("1.0.0", "aarch64", 4),
        ("1.0.0", "x86_64", 2),
    ]
    assert [view.samples for view in found] == [360, 240, 120]
    assert found[0].latency_p50_ms == pytest.approx(4.0, rel=0.1)
    assert 0.6 < found[0].estimated < 0.9


def test_contract_and_missing_values_are_counted(world):
    inputs = world.inputs()
    inputs[:30, 1] = np.nan
    for name in world.names:
        world.send(name, world.window(name, T0, inputs, verdicts={"impute x": 30, "reject x": 3}))
    world.run(1)
    stream = next(each for each in page(world, 1).streams if (each.stream, each.slice) == ("x[1]", "all"))
    assert stream.missing_share == pytest.approx(0.5)
    assert stream.reference_missing_share == 0.0
    assert stream.is_alarm
    assert next(each for each in world.watch.findings(MODEL) if each.stream == "x[1]").kind == "missing"
    quality = world.watch.quality(MODEL, now_ms=world.after(1), since_ms=T0)
    assert [(each.action, each.name, each.count) for each in quality.violations] == [("impute", "x", 180), ("reject", "x", 18)]
    signals = {(each.name, each.labels.get("stream", "")): each.value for each in world.watch.signals(world.after(1))}
    assert signals["missing.share", "x[1]"] == pytest.approx(0.5)
    assert signals["drift.evidence", "x[1]"] > 1
    assert signals["contract.violations", ""] > 0.3


def test_sketches_that_lie_or_do_not_fit_are_left_out(world):
    good = world.window(world.names[0], T0, world.inputs())
    model = good.models[0]
    many = msgspec.structs.replace(model, sketched=1)
    torn = msgspec.structs.replace(model, sketches=(b"\xff", *model.sketches[1:]))
    short = msgspec.structs.replace(model, sketches=model.sketches[:2])
    world.send(world.names[0], good)
    for name, wrong in zip(world.names[1:4], (many, torn, short), strict=True):
        world.send(name, msgspec.structs.replace(good, seq=3, models=(wrong,)))
    world.run(1)
    stream = next(each for each in page(world, 1).streams if (each.stream, each.slice) == ("x[0]", "all"))
    assert stream.timeline[0].samples == 60
    with world.store.read() as connection:
        row = store.read_watches(connection, MODEL)[0]
        assert store.read_facts(connection, row.id, since_ms=0)[0].unreadable == 3


def test_alarm_ends_when_the_world_is_as_before(world):
    for number in range(26):
        world.minute(number, shift=1.0 if number >= 20 else 0.0)
    world.run(26)
    assert any(finding.kind == "drift" for finding in world.watch.findings(MODEL))
    for number in range(26, 70):
        world.minute(number)
    world.run(70)
    assert not [finding for finding in world.watch.findings(MODEL) if finding.stream == "x[0]"]
    with world.store.read() as connection:
        row = store.read_watches(connection, MODEL)[0]
        ended = [item for item in store.read_findings(connection, row.id, is_open=False) if item.stream == "x[0]"]
    assert ended
    assert all(item.ended_ms == world.after(70) for item in ended)


def test_another_interval_begins_anew_and_is_in_the_audit_log(world):
    for number in range(4):
        world.minute(number)
    world.run(4)
    asked = msgspec.structs.replace(BUDGET, interval_s=120, slices=("site", "label.camera"))
    world.watch.set_budget(MODEL, asked, actor="ana", now_ms=world.after(4), reason="too fine")
    assert world.run(4) == 2
    found = page(world, 4)
    assert found.slices == ("all", "label.camera=dome", "site=north", "site=south")
    assert [point.samples for point in found.streams[0].timeline] == [720, 720]
    entry = Audit(world.store).page(subject=f"model:{MODEL}").entries[0]
    assert (entry.actor, entry.action, entry.reason) == ("ana", "watch.changed", "too fine")
    for wrong in ({"alarms": 0.0}, {"interval_s": 15}, {"slices": ("colour",)}, {"effect_floor": 2.0}, {"days": -1.0}):
        with pytest.raises(UsageError, match="budget"):
            world.watch.set_budget(MODEL, Budget(**wrong), actor="ana", now_ms=0)


def test_two_servers_on_one_database_do_not_overwrite_each_other(world):
    for number in range(3):
        world.minute(number)
    other = Watch(world.store)
    stale = other._plan
    plans = []

    def slow(*args, **kwargs):
        write = stale(*args, **kwargs)
        world.run(3)  # another server is faster
        plans.append(write)
        return write

    other._plan = slow
    assert other.run(world.after(3)) == 0
    assert len(plans) == 1
    assert sum(counts.samples for _at, counts in slices(world)) == 3 * 360


def test_server_offers_it_over_http(tmp_path):
    from fastapi.testclient import TestClient

    from edgekit.fleet.assembly import assemble
    from edgekit.fleet.config import FleetConfig
    from edgekit.fleet.watch.api import make_router

    world = WatchWorld(str(tmp_path / "fleet.db"))
    world.know()
    services = assemble(FleetConfig(database=str(tmp_path / "fleet.db"), data_dir=str(tmp_path / "data")), world.store)
    assert isinstance(services.watch, Watch)
    for number in range(3):
        world.minute(number)
    services.watch.run(world.after(3))

    from fastapi import FastAPI

    from edgekit.fleet.access.guard import LOCAL, Actor

    app = FastAPI()
    app.include_router(make_router(services))
    who = [LOCAL]

    @app.middleware("http")
    async def name_them(request, call_next):
        request.state.actor = who[0]
        return await call_next(request)

    client = TestClient(app)
    drift = client.get(f"/api/v1/drift/{MODEL}", params={"since_ms": T0}).json()
    assert {stream["stream"] for stream in drift["streams"]} == {"x[0]", "x[1]", "x[2]", "x[3]", "y.class", "y.confidence"}
    one = client.get(f"/api/v1/drift/{MODEL}", params={"since_ms": T0, "slice": "site=north"}).json()
    assert {stream["slice"] for stream in one["streams"]} == {"site=north"}
    assert client.get(f"/api/v1/quality/{MODEL}", params={"since_ms": T0}).json()["slices"][0]["slice"] == "all"
    assert client.get(f"/api/v1/models/{MODEL}/versions", params={"since_ms": T0}).json()["versions"][0]["version"] == "1.0.0"
    assert client.get("/api/v1/findings").json() == []
    assert client.get("/api/v1/drift/nobody").json()["note"]
    lines = client.get(f"/api/v1/drift/{MODEL}/windows", params={"since_ms": T0}).text.splitlines()
    assert len(lines) == 3 * 6
    budget = client.get(f"/api/v1/drift/{MODEL}/budget").json()
    assert client.put(f"/api/v1/drift/{MODEL}/budget", json=budget | {"alarms": 2}).status_code == 200
    assert services.watch.budget(MODEL).alarms == 2
    assert client.put(f"/api/v1/drift/{MODEL}/budget", json=budget | {"alarms": -1}).status_code == 400
    who[0] = Actor(name="eve", role="viewer")
    assert client.put(f"/api/v1/drift/{MODEL}/budget", json=budget).status_code == 403
    world.store.close()


def test_reference_comes_out_of_the_catalog(tmp_path):
    """A catalog that knows the release: its reference is fetched once, and kept."""
    from types import SimpleNamespace

    world = WatchWorld(str(tmp_path / "fleet.db"))
    asked = []
    info = SimpleNamespace(name=MODEL, version="1.0.0")
    release = SimpleNamespace(info=info, manifest_digest="sha256:" + "ee" * 32)
    manifest = SimpleNamespace(
        blobs=(SimpleNamespace(digest=DIGEST, size_bytes=1234),), contract=SimpleNamespace(labels=("a", "b", "c"))
    )

    def by_model_digest(prefix):
        asked.append(prefix)
        return SimpleNamespace(release=release)

    catalog = SimpleNamespace(
        by_model_digest=by_model_digest, manifest=lambda _release: manifest, profile=lambda _digest: (world.profile, world.crc)
    )
    world.watch = Watch(Store(str(tmp_path / "fleet.db")), catalog)
    world.watch.set_budget(MODEL, BUDGET, actor="operator", now_ms=T0)
    for number in range(3):
        world.minute(number)
        world.run(number + 1)
    assert asked == ["cd" * 6]
    assert page(world, 3).profile.version == "1.0.0"
    assert page(world, 3).streams
    assert world.watch.versions(MODEL, now_ms=world.after(3), since_ms=T0)[0].size_bytes == 1234


def test_old_sums_are_dropped(world):
    world.minute(0)
    world.run(1)
    assert world.watch.prune(world.after(1)) == 0
    assert world.watch.prune(world.after(1) + 36 * 86_400_000) > 0
    assert not slices(world)
