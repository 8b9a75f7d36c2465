from __future__ import annotations

import random

import pytest
from rollout_world import FleetWorld, release

from edgekit.errors import UsageError
from edgekit.fleet.audit import Audit
from edgekit.fleet.rollout.plan import position
from edgekit.fleet.rollout.requests import RolloutRequest, make_spec


@pytest.fixture
def make(tmp_path):
    worlds = []

    def build(fates, **more):
        world = FleetWorld(str(tmp_path / f"fleet-{len(worlds)}.db"), fates, **more)
        worlds.append(world)
        return world

    yield build
    for world in worlds:
        world.store.close()


def test_rollout_passes_wave_by_wave(make):
    world = make(["fine"] * 100)
    number = world.start()
    seen = []
    for _ in range(60):
        world.round()
        view = world.view(number)
        seen.append((view.progress.wave, sum(device.serving[1] == 2 for device in world.devices)))
        if view.progress.state == "done":
            break
    assert view.progress.state == "done"
    share = {wave: max(count for at, count in seen if at == wave) for wave in range(4)}
    assert share[0] == 5
    assert 5 <= share[1] <= 25
    assert 35 <= share[2] <= 65
    assert share[3] == 100
    assert all(device.installed == ["2.0.0"] for device in world.devices)
    assert [wave.committed for wave in view.waves] == [wave.devices for wave in view.waves]
    actions = [entry.action for entry in reversed(Audit(world.store).page(subject=f"rollout:{number}").entries)]
    assert actions == ["rollout.started", *["rollout.wave_begun"] * 3, "rollout.done"]


def test_rollout_over_postgres(postgres_url):
    world = FleetWorld(postgres_url, ["fine"] * 28 + ["fail"] * 2)
    number = world.start(waves="canary:3,100%", max_failed=0.2, required_success=0.9)
    assert world.run(number).progress.state == "done"
    world.service.roll_back(number, actor="operator", reason="no", now_ms=world.now)
    assert world.run(number).progress.state == "rolled_back"
    assert {device.serving for device in world.devices} == {("1.0.0", 1)}
    world.store.close()


def test_wave_soaks_before_the_next(make):
    world = make(["fine"] * 20)
    number = world.start(soak_min=30.0, waves="canary:2,100%")
    for _ in range(30):
        world.round()
    assert sum(device.serving[1] == 2 for device in world.devices) == 2
    assert "to soak" in world.view(number).waits_for
    for _ in range(5):
        world.round()
    assert sum(device.serving[1] == 2 for device in world.devices) == 20


@pytest.mark.fault("F26")
@pytest.mark.parametrize(("max_failed", "required"), [(0.02, 0.95), (0.10, 0.95), (0.02, 0.5)])
def test_thousand_devices_with_failing_and_silent_ones_halt_at_the_stated_bound(make, max_failed, required):
    """5 % fail, 10 % are silent: whatever is asked for, no more devices fail than the bound and one batch of the wave says."""
    fates = ["fail"] * 50 + ["silent"] * 100 + ["fine"] * 850
    random.Random(3).shuffle(fates)
    world = make(fates)
    number = world.start(
        waves="canary:20,10%,50%,100%", max_failed=max_failed, required_success=required, is_rolled_back_on_halt=False
    )
    view = world.run(number, minutes=2.0)
    assert view.progress.state == "halted"
    assert "silent" in view.progress.reason or "failed" in view.progress.reason
    limit = view.progress.thresholds[view.progress.wave]
    members = [device for device in world.devices if position(release("2.0.0").manifest_digest, "lab", device.name) < limit]
    assert len([device for device in world.devices if device.installed]) <= len(members) < 1000
    failed = sum(wave.failed for wave in view.waves)
    silent = sum(wave.silent for wave in view.waves)
    assert failed > view.allowed_failures or len(members) - failed - silent < required * len(members)
    before = [len(device.installed) for device in world.devices]
    for _ in range(30):
        world.round(minutes=5.0)
    assert [len(device.installed) for device in world.devices] == before  # nobody else gets it


def test_silent_devices_are_no_success(make):
    """Nobody fails, and still a wave that hears nothing from two of ten devices is not passed."""
    world = make(["silent"] * 2 + ["fine"] * 8)
    number = world.start(waves="100%", required_success=0.9, is_rolled_back_on_halt=False)
    for _ in range(19):
        world.round()
    assert world.view(number).progress.state == "running"
    view = world.run(number)
    assert view.progress.state == "halted"
    assert "2 of 10 devices are silent" in view.progress.reason
    assert (view.waves[0].silent, view.waves[0].failed) == (0, 0)  # they were asked to stay: nobody is waited for
    assert view.waves[0].waiting == 2


def test_halt_rolls_back_by_itself(make):
    world = make(["fine"] * 18 + ["fail"] * 2)
    number = world.start(waves="100%", max_failed=0.05)
    view = world.run(number)
    assert view.progress.state == "rolled_back"
    assert {device.serving for device in world.devices} == {("1.0.0", 1)}
    assert view.waves[0].reverted + view.waves[0].failed == 20
    actions = [entry.action for entry in Audit(world.store).page(subject=f"rollout:{number}").entries]
    assert actions[:3] == ["rollout.rolled_back", "rollout.rolling_back", "rollout.halted"]


def test_rolled_back_release_can_be_followed_by_a_mended_one(make):
    world = make(["fine"] * 9 + ["fail"])
    world.run(world.start(waves="100%", max_failed=0.0))
    for device in world.devices:
        device.fate = "fine"
    number = world.start("3.0.0", waves="50%")
    assert world.run(number).progress.state == "done"
    assert {device.serving for device in world.devices} == {("3.0.0", 3)}


def test_paused_rollout_asks_nobody(make):
    world = make(["fine"] * 30)
    number = world.start(waves="canary:3,100%", soak_min=1.0)
    world.round()
    world.service.pause(number, actor="operator", reason="lunch", now_ms=world.now)
    for _ in range(20):
        world.round()
    assert sum(device.serving[1] == 2 for device in world.devices) == 3
    world.service.resume(number, actor="operator", reason="back", now_ms=world.now)
    assert world.run(number).progress.state == "done"


def test_resumed_rollout_forgives_what_failed(make):
    world = make(["fine"] * 9 + ["fail"])
    number = world.start(waves="100%", max_failed=0.0, is_rolled_back_on_halt=False)
    assert world.run(number).progress.state == "halted"
    world.service.resume(number, actor="operator", reason="a known bad camera", now_ms=world.now)
    view = world.run(number)
    assert view.progress.state == "done"
    assert (view.waves[0].committed, view.waves[0].failed) == (9, 1)


def test_next_wave_waits_for_approval(make):
    world = make(["fine"] * 10)
    number = world.start(waves="canary:2,100%", needs_approval=True)
    for _ in range(30):
        world.round()
    assert "approve" in world.view(number).waits_for
    world.service.approve(number, actor="operator", now_ms=world.now)
    assert world.run(number).progress.state == "done"


def test_device_that_appears_later_has_its_place(make):
    world = make(["fine"] * 10)
    number = world.start(waves="100%")
    assert world.run(number).progress.state == "done"
    from rollout_world import Device

    late = Device(77, "fine")
    world.devices.append(late)
    world.say(lambda device: [device.birth(world.now), device.report(world.now)] if device is late else [])
    for _ in range(3):
        world.round()
    assert late.serving == ("2.0.0", 2)


def test_selector_keeps_others_out(make):
    world = make(["fine"] * 10)
    number = world.start(to="device=cam-0003|cam-0004", waves="100%")
    assert world.run(number).progress.state == "done"
    assert [device.name for device in world.devices if device.installed] == ["cam-0003", "cam-0004"]


def test_dry_run_names_what_the_rollout_then_asks(make):
    world = make(["fine"] * 40)
    request = RolloutRequest(model="kws", version="2.0.0", waves="canary:4,30%", gates=(), soak_min=1.0)
    spec = make_spec(request, world.service.find_release("kws", "2.0.0"))
    planned = world.service.dry_run(spec, world.now)
    assert sum(len(wave) for wave in planned.waves) == 40
    number = world.service.start(spec, actor="operator", now_ms=world.now)
    asked = []
    for _ in range(30):
        world.round()
        now = {f"lab/{device.name}" for device in world.devices if device.installed}
        if now - set().union(*asked):
            asked.append(now - set().union(*asked))
        if world.view(number).progress.state == "done":
            break
    assert [sorted(wave) for wave in planned.waves] == [sorted(wave) for wave in asked]


def test_second_rollout_of_a_model_waits_its_turn(make):
    world = make(["fine"] * 4)
    world.start()
    with pytest.raises(UsageError, match=r"rollout 1 of kws@2\.0\.0 is running"):
        world.start("3.0.0")


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"version": "9.9.9"}, "rollout.no_release"),
        ({"to": "site=nowhere"}, "rollout.nobody"),
        ({"waves": "50%,10%"}, "rollout.waves"),
        ({"waves": "many"}, "rollout.waves"),
        ({"gates": ("eror_share<=1%",)}, "rollout.gate"),
        ({"max_failed": 2.0}, "rollout.limits"),
    ],
)
def test_rollout_refused(make, asked, code):
    world = make(["fine"])
    with pytest.raises(UsageError) as caught:
        world.start(**asked)
    assert caught.value.code == code


def test_restored_backup_issues_no_old_number(make, tmp_path):
    import shutil

    world = make(["fine"] * 3)
    world.start(waves="100%")
    world.round()
    world.store.close()
    shutil.copy(world.url, tmp_path / "backup.db")
    world.open()
    before = [device.last_seq for device in world.devices]
    world.round()
    first = [device.last_seq for device in world.devices]
    assert all(now > was for now, was in zip(first, before, strict=True))
    world.store.close()
    shutil.copy(tmp_path / "backup.db", world.url)
    for side in ("-wal", "-shm"):
        (tmp_path / f"fleet-0.db{side}").unlink(missing_ok=True)
    world.open()
    world.now += 1000
    with world.store.write() as connection:
        from edgekit.fleet.desired import Wish

        world.desk.want(connection, {1: Wish(model="kws", release=None)}, now_ms=world.now)
    from edgekit.fleet.rollout.tables import desired

    with world.store.read() as connection:
        assert connection.execute(desired.select().where(desired.c.device_id == 1)).one().seq > first[0]
