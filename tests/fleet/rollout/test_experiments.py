from __future__ import annotations

import numpy as np
import pytest
from rollout_world import FleetWorld
from sqlalchemy import insert, select

from edgekit.errors import UsageError
from edgekit.fleet import tables
from edgekit.fleet.audit import Audit
from edgekit.fleet.rollout.experiments import DAY_MS, ExperimentRequest, Experiments


@pytest.fixture
def world(database_url):
    world = FleetWorld(database_url, ["fine"] * 40)
    world.experiments = Experiments(world.store, world.desk)
    world.boot = 0
    yield world
    world.store.close()


def begin(world, **asked):
    request = ExperimentRequest(**({"model": "kws", "champion": "1.0.0", "challenger": "2.0.0", "margin": 0.05} | asked))
    find = world.service.find_release
    return world.experiments.start(
        request,
        champion=find("kws", request.champion),
        challenger=find("kws", request.challenger),
        actor="operator",
        now_ms=world.now,
    )


def label(world, accuracy, *, each=50, seed=1):
    """A window of every device, with labels that came for it: right as often as its release is."""
    random, row = np.random.default_rng(seed), tables.devices.c
    world.boot += 1
    with world.store.write() as connection:
        numbers = {name: number for number, name in connection.execute(select(row.id, row.device))}
        connection.execute(
            insert(tables.model_windows),
            [
                {
                    "device_id": numbers[device.name],
                    "boot": 9999,
                    "seq": world.boot,
                    "model_digest": f"{device.serving[1]:02x}" * 6,
                    "profile": 0,
                    "start_ms": world.now,
                    "duration_ms": 10_000,
                    "requests": each,
                    "errors": 0,
                    "rejected": 0,
                    "samples": each,
                    "sketched": 0,
                    "labelled": each,
                    "right": int(random.binomial(each, accuracy[device.serving[1]])),
                }
                for device in world.devices
            ],
        )


def test_better_challenger_is_found_and_kept(world):
    number = begin(world)
    world.round()
    world.round()
    view = world.experiments.view(number)
    assert view.devices == view.serving
    assert 10 <= view.devices["challenger"] <= 30
    assert view.judgement.verdict == "keep going"
    for turn in range(40):
        world.round()
        label(world, {1: 0.7, 2: 0.85}, seed=turn)
        world.experiments.turn(world.now)
        if world.experiments.view(number).state == "decided":
            break
    view = world.experiments.view(number)
    assert (view.state, view.reason) == ("decided", "challenger is better")
    assert view.judgement.low > 0
    world.experiments.stop(number, keep="challenger", actor="operator", reason="it is", now_ms=world.now)
    world.round()
    assert {device.serving[1] for device in world.devices} == {2}
    actions = [entry.action for entry in Audit(world.store).page(subject=f"experiment:{number}").entries]
    assert actions == ["experiment.stopped", "experiment.decided", "experiment.started"]


def test_worse_challenger_is_sent_back(world):
    number = begin(world, split=0.3)
    world.round()
    for turn in range(40):
        world.round()
        label(world, {1: 0.9, 2: 0.6}, seed=turn)
        world.experiments.turn(world.now)
    assert world.experiments.view(number).reason == "challenger is worse"
    world.experiments.stop(number, keep="champion", actor="operator", reason="", now_ms=world.now)
    world.round()
    assert {device.serving[1] for device in world.devices} == {1}


def test_device_that_has_not_switched_counts_for_nobody(world):
    for device in world.devices[:20]:
        device.fate = "silent"
    number = begin(world)
    for _ in range(3):
        world.round()
    label(world, {1: 0.5, 2: 0.5})
    view = world.experiments.view(number)
    judged = view.judgement
    assert judged.challenger_devices == view.serving["challenger"] < view.devices["challenger"]
    assert judged.champion_devices == view.devices["champion"]


def test_experiment_that_learns_nothing_ends_undecided(world):
    number = begin(world, days=2.0)
    world.experiments.turn(world.now + DAY_MS)
    assert world.experiments.view(number).state == "running"
    world.experiments.turn(world.now + 3 * DAY_MS)
    assert world.experiments.view(number).reason == "its time is over, undecided"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"challenger": "1.0.0"}, "the same release"),
        ({"champion": "3.0.0"}, "is older than"),
        ({"champion": "2.0.0", "challenger": "3.0.0"}, "0 devices serve"),
        ({"split": 0.0001}, "on the sides"),
        ({"margin": 0.0}, "margin"),
        ({"to": "device=cam-0001"}, "1 devices serve"),
    ],
)
def test_experiment_refused(world, asked, words):
    with pytest.raises(UsageError, match=words):
        begin(world, **asked)
    assert world.experiments.views() == ()


def test_experiment_and_rollout_do_not_overlap(world):
    number = begin(world)
    with pytest.raises(UsageError, match="is not stopped"):
        begin(world)
    with pytest.raises(UsageError, match="experiment 1 of kws is not stopped"):
        world.start()
    world.experiments.stop(number, keep=None, actor="operator", reason="", now_ms=world.now)
    world.start()
    with pytest.raises(UsageError, match="rollout 1 of kws is running"):
        begin(world)
    with pytest.raises(UsageError, match="is over"):
        world.experiments.stop(number, keep=None, actor="operator", reason="", now_ms=world.now)
