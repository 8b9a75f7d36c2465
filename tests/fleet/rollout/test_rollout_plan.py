"""The rules of a rollout at their edges, and what gates make of figures."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_world import MINUTE, T0, FleetWorld
from sqlalchemy import insert, select, update

from edgekit.fleet import tables
from edgekit.fleet.rollout.gates import Figures, pass_relative, read_gate
from edgekit.fleet.rollout.plan import parse_waves, position, step, thresholds, wave_of
from edgekit.fleet.rollout.records import DeviceProgress, GateReading, Progress, RolloutSpec, Wave
from edgekit.fleet.rollout.requests import parse_gate
from edgekit.fleet.rollout.tables import desired
from edgekit.telemetry.histogram import LatencyHistogram

SPEC = RolloutSpec(
    model="kws",
    version="2.0.0",
    counter=2,
    manifest="sha256:" + "ab" * 32,
    selector="",
    waves=(Wave(name="half", share=0.5), Wave(name="all", share=1.0)),
    soak_ms=0,
    deadline_ms=10 * MINUTE,
    max_failed=0.1,
    required_success=0.5,
    is_rolled_back_on_halt=False,
)
RUNNING = Progress(thresholds=(0.5, 1.0))


def devices(**stages: int) -> list[DeviceProgress]:
    """So many devices of the first wave at each stage."""
    found = []
    for stage, count in stages.items():
        for _ in range(count):
            number = len(found)
            found.append(
                DeviceProgress(
                    device_id=number,
                    site="lab",
                    device=f"cam-{number}",
                    position=number / 1000,
                    stage="asked" if stage == "silent" else stage,
                    asked_ms=T0 - (11 * MINUTE if stage == "silent" else 0),
                )
            )
    return found


def decide(spec=SPEC, progress=RUNNING, readings=(), **stages):
    return step(spec, progress, devices(**stages), readings, T0)


@pytest.mark.parametrize(("failed", "state"), [(2, "running"), (3, "halted")])
def test_exactly_one_failure_more_than_the_bound_halts(failed, state):
    assert decide(committed=15, asked=5 - failed, failed=failed).progress.state == state


@pytest.mark.parametrize(("silent", "state"), [(10, "running"), (11, "halted")])
def test_exactly_one_silent_device_too_many_halts(silent, state):
    assert decide(asked=20 - silent, silent=silent).progress.state == state


def test_failures_and_silence_count_together():
    spec = msgspec.structs.replace(SPEC, max_failed=0.5)
    assert decide(spec, asked=10, silent=6, failed=4).progress.state == "running"
    assert decide(spec, asked=9, silent=6, failed=5).progress.state == "halted"


def test_small_wave_allows_no_failure():
    assert decide(committed=4, failed=1).progress.state == "halted"


def test_only_members_of_waves_begun_are_asked():
    found = devices(waiting=4)
    later = [msgspec.structs.replace(device, device_id=9, position=0.7) for device in found[:1]]
    assert step(SPEC, RUNNING, [*found, *later], (), T0).ask == (0, 1, 2, 3)


def test_batch_bounds_what_is_asked_at_once():
    assert len(decide(msgspec.structs.replace(SPEC, max_batch=3), waiting=10).ask) == 3


def reading(verdict, samples=10):
    return GateReading(gate=parse_gate("error_share<=1%"), verdict=verdict, value=0.5, samples=samples)


def test_violated_gate_halts_before_the_soak_is_over():
    spec = msgspec.structs.replace(SPEC, soak_ms=60 * MINUTE)
    decision = decide(spec, readings=[reading("violated")], committed=10)
    assert decision.progress.state == "halted"
    assert "error_share is 0.5" in decision.progress.reason


def test_gate_without_figures_passes_nothing_and_halts_in_the_end():
    waiting = decide(readings=[reading("unknown")], committed=10)
    assert (waiting.progress.state, waiting.progress.wave) == ("running", 0)
    late = msgspec.structs.replace(RUNNING, soaking_since_ms=T0 - 11 * MINUTE)
    assert decide(progress=late, readings=[reading("unknown")], committed=10).progress.state == "halted"
    assert decide(progress=late, readings=[reading("ok")], committed=10).progress.wave == 1


def test_halted_rollout_asks_those_under_way_to_stay():
    decision = decide(progress=msgspec.structs.replace(RUNNING, state="halted"), asked=3, committed=2, waiting=5)
    assert (decision.ask, decision.revert, decision.withdraw) == ((), (), (0, 1, 2))


def test_rolling_back_asks_everybody_who_has_or_may_get_it():
    decision = decide(progress=msgspec.structs.replace(RUNNING, state="rolling_back"), asked=1, committed=2, failed=3)
    assert decision.revert == (1, 2, 0)
    assert decision.progress.state == "rolling_back"
    assert decide(progress=msgspec.structs.replace(RUNNING, state="rolling_back"), reverted=3).progress.state == "rolled_back"


@given(
    st.lists(st.sampled_from(["waiting", "asked", "silent", "committed", "failed"]), max_size=60),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_step_never_asks_twice_and_never_after_a_halt(stages, max_failed, required):
    spec = msgspec.structs.replace(SPEC, max_failed=max_failed, required_success=required)
    counts = {stage: stages.count(stage) for stage in dict.fromkeys(stages)}
    decision = decide(spec, **counts)
    waiting = {device.device_id for device in devices(**counts) if device.stage == "waiting"}
    assert set(decision.ask) <= waiting
    assert len(set(decision.ask)) == len(decision.ask)
    if decision.progress.state != "running":
        assert decision.ask == () or decision.progress.state == "done"


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=50))
def test_every_place_has_one_wave_and_counts_are_kept(places):
    limits = thresholds(parse_waves("canary:3,20%,50%"), places)
    assert list(limits) == sorted(limits)
    assert limits[-1] == 1.0
    members = [sum(wave_of(place, limits) == number for place in places) for number in range(len(limits))]
    assert sum(members) == len(places)
    if len(set(places)) == len(places) > 3:
        assert members[0] == 3


def test_places_are_spread_and_differ_by_release():
    first = [position("sha256:aa", "lab", f"cam-{n}") for n in range(2000)]
    second = [position("sha256:bb", "lab", f"cam-{n}") for n in range(2000)]
    assert abs(sum(place < 0.1 for place in first) - 200) < 60
    both = sum(a < 0.1 and b < 0.1 for a, b in zip(first, second, strict=True))
    assert both < 50  # not always the same devices first


# gates


def figures(requests=1000, errors=0, latency=5.0, classes=()):
    found = Figures(requests=requests, errors=errors)
    found.latency = LatencyHistogram()
    found.latency.add(latency, requests)
    if classes:
        import numpy as np

        found.classes = {len(classes): np.array(classes)}
    return found


@pytest.mark.parametrize(
    ("gate", "canary", "control", "verdict"),
    [
        ("error_share<=1%", figures(errors=10), figures(), "ok"),
        ("error_share<=1%", figures(errors=11), figures(), "violated"),
        ("error_share<=1%", figures(requests=99, errors=99), figures(), "unknown"),
        ("error_share<=1% min 2000", figures(errors=500), figures(), "unknown"),
        ("latency_p95_ratio<=1.5", figures(latency=7), figures(latency=5), "ok"),
        ("latency_p95_ratio<=1.5", figures(latency=9), figures(latency=5), "violated"),
        ("latency_p95_ratio<=1.5", figures(latency=9), Figures(), "unknown"),
        ("latency_p95_ms<6", figures(latency=5), Figures(), "ok"),
        ("score_psi<=0.1", figures(classes=(500, 500)), figures(classes=(520, 480)), "ok"),
        ("score_psi<=0.1", figures(classes=(900, 100)), figures(classes=(500, 500)), "violated"),
        ("score_psi<=0.1", figures(classes=(900, 100)), figures(classes=(5, 5)), "unknown"),
        ("score_psi<=0.1", figures(classes=(900, 100)), figures(classes=(5, 5, 5)), "unknown"),
        ("critical_alerts<=0", Figures(), Figures(), "violated"),
    ],
)
def test_gate_measures(gate, canary, control, verdict):
    assert read_gate(parse_gate(gate), canary, control, critical_alerts=2).verdict == verdict


def test_relative_gate_passes_when_nobody_is_left_to_compare_with():
    ratio, share = parse_gate("latency_p95_ratio<=1.5"), parse_gate("error_share<=1%")
    now = tuple(read_gate(gate, Figures(), Figures(), critical_alerts=0) for gate in (ratio, share))
    assert [reading.verdict for reading in pass_relative(now)] == ["ok", "unknown"]
    slow = (read_gate(ratio, figures(latency=9), figures(latency=5), critical_alerts=0),)
    assert pass_relative(slow) == slow


# with a store


@pytest.fixture
def world(tmp_path):
    world = FleetWorld(str(tmp_path / "fleet.db"), ["fine"] * 20)
    yield world
    world.store.close()


def window(world, version: int, *, requests: int, errors: int, latency_ms: float = 0.0) -> None:
    """A window of every device that serves a version."""
    latency = LatencyHistogram()
    latency.add(latency_ms or 1.0, requests)
    row = tables.devices.c
    with world.store.write() as connection:
        numbers = dict(tuple(item) for item in connection.execute(select(row.device, row.id)))
        for device in world.devices:
            if device.serving[1] == version:
                device.windows = getattr(device, "windows", 0) + 1
                connection.execute(
                    insert(tables.model_windows).values(
                        device_id=numbers[device.name], boot=9, seq=device.windows, profile=0,
                        model_digest=f"{version:02x}" * 6,
                        start_ms=world.now, duration_ms=10_000, requests=requests, errors=errors, rejected=0,
                        samples=requests, sketched=0, labelled=0, right=0,
                        latency=latency.encode() if latency_ms else None,
                    )
                )  # fmt: skip


def test_release_whose_requests_fail_is_taken_back_from_the_canary(world):
    number = world.start(waves="canary:4,100%", gates=("error_share<=2% min 50",), soak_min=30.0)
    for _ in range(4):
        world.round()
        window(world, 1, requests=100, errors=0)
        window(world, 2, requests=100, errors=10)
    view = world.run(number, rounds=10)
    assert view.progress.state == "rolled_back"
    assert view.progress.reason.startswith("error_share is 0.1 (control 0)")
    assert {device.serving[1] for device in world.devices} == {1}


def test_sound_release_passes_its_gate(world):
    number = world.start(waves="canary:4,100%", gates=("error_share<=2% min 50",), soak_min=2.0)
    for _ in range(12):
        world.round()
        window(world, 1, requests=100, errors=50)  # what the old one does is not held against the new one
        window(world, 2, requests=100, errors=1)
    assert world.view(number).progress.state == "done"


def test_gate_against_the_rest_ends_with_the_rest(world):
    number = world.start(waves="canary:4,100%", gates=("latency_p95_ratio<=1.5 min 50",), soak_min=2.0)
    for _ in range(16):
        world.round()
        window(world, 1, requests=100, errors=0, latency_ms=5.0)
        window(world, 2, requests=100, errors=0, latency_ms=6.0)
    assert world.view(number).progress.state == "done"


def test_device_that_leaves_the_release_later_has_failed(world):
    number = world.start(waves="100%", soak_min=60.0, is_rolled_back_on_halt=False)
    for _ in range(3):
        world.round()
    assert world.view(number).waves[0].committed == 20
    device = world.devices[3]
    device.serving, device.fate = ("1.0.0", 1), "silent"
    world.say(lambda each: [each.report(world.now)] if each is device else [])
    world.service.turn(world.now)
    view = world.view(number)
    assert (view.waves[0].failed, view.progress.state) == (1, "halted")
    page = world.service.devices(number, stage="failed")
    assert page.devices[0].detail == "it serves another release now"


def test_failure_from_before_the_device_was_asked_does_not_count(world):
    device = world.devices[0]
    world.say(lambda each: [each.event("install_refused", world.now, counter=2)] if each is device else [])
    number = world.start(waves="100%")
    world.service.turn(world.now)
    world.service.turn(world.now)
    assert world.view(number).waves[0].failed == 0
    assert world.run(number).progress.state == "done"


def test_failure_between_two_waves_is_not_the_later_waves(world):
    number = world.start(waves="canary:2,100%", soak_min=3.0, required_success=1.0)
    world.round()
    last = next(device for device in world.devices if not device.installed and device.last_seq == 0)
    world.say(lambda each: [each.event("install_refused", world.now, counter=2)] if each is last else [])
    last.fate = "silent"
    for _ in range(12):
        world.round()
    view = world.view(number)
    assert (view.progress.state, view.progress.wave) == ("running", 1)
    assert (view.waves[1].failed, view.waves[1].pending) == (0, 1)


def test_numbers_never_go_back_even_when_the_database_does(world):
    world.start(waves="100%")
    world.round()
    before = max(device.last_seq for device in world.devices)
    with world.store.read() as connection:
        issued = connection.execute(select(desired.c.seq)).scalars().all()
    assert min(issued) >= T0 > before
    with world.store.write() as connection:  # a backup of long ago
        connection.execute(update(desired).values(seq=1))
        from edgekit.fleet.desired import Wish

        world.now += MINUTE
        world.desk.want(connection, {1: Wish(model="kws", release=None)}, now_ms=world.now)
        assert connection.execute(select(desired.c.seq).where(desired.c.device_id == 1)).scalar() > max(issued)
