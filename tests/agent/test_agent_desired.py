"""The fleet's desired state on a device: signed or refused, kept, and followed; the latest one wins."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from edgekit.agent.config import AgentConfig, ProbationConfig
from edgekit.agent.desired import DesiredDesk, jitter_share, starts_at
from edgekit.agent.plan import active_slot
from edgekit.agent.state_store import StateStore
from edgekit.agent.updater import _restricted
from edgekit.errors import DeviceError
from edgekit.schema.desired import DesiredModel, DesiredState, UpdatePolicy
from edgekit.telemetry.codec import decode
from edgekit.trust.desired_signer import sign_desired
from edgekit.trust.keys import save_public_key
from edgekit.trust.signer import generate_signer
from tests.agent.test_agent_updater import Round

DIRECTOR, SECOND, STRANGER = generate_signer(), generate_signer(), generate_signer()


def now():
    return datetime.now(UTC)


class Fleet:
    """A director that makes desired states, and a device's desk over a temporary folder."""

    def __init__(self, folder, **settings):
        keys = folder / "fleet-keys"
        keys.mkdir(parents=True)
        for number, signer in enumerate((DIRECTOR, SECOND)):
            save_public_key(signer.public_key, keys / f"{number}.pub")
        self.round = Round(folder / "state")
        config = self.round.bench.config
        self.config = msgspec.structs.replace(config, fleet_keys=str(keys), **settings)
        self.round.updater.config = self.config
        self.open()

    def open(self):
        self.round.bench.store = self.round.updater.store = StateStore.open(self.round.bench.folder, device="d")
        self.desk = DesiredDesk.open(self.config, self.round.bench.store, self.round.journal)
        self.round.updater.chooser = self.desk

    def want(self, release, *, seq, signers=(DIRECTOR,), device="d", issued=None, ends=None, policy=None, models=None):
        state = DesiredState(
            device=device,
            seq=seq,
            issued_at=issued or now() - timedelta(minutes=1),
            expires_at=ends or now() + timedelta(hours=1),
            models=models
            or ({"m": DesiredModel(counter=release.info.counter, manifest=release.manifest_digest)} if release else {}),
            policy=policy or UpdatePolicy(),
        )
        return sign_desired(state, signers)

    def events(self):
        return [(found.kind, found.code) for found in (decode(row.payload) for row in self.round.events())]

    def poll(self):
        self.round.poll()
        slot = active_slot(self.round.bench.store.state)
        return slot.counter if slot else 0


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path)


def test_device_runs_what_is_desired_and_not_the_newest(fleet):
    first, _ = fleet.round.bench.shelf.publish(1), fleet.round.bench.shelf.publish(2)
    assert fleet.poll() == 0  # nobody desired anything
    assert fleet.desk.take(fleet.want(first, seq=1))
    assert fleet.poll() == 1
    assert fleet.poll() == 1
    assert ("desired_accepted", "") in fleet.events()


def test_release_of_another_channel_may_be_desired(fleet):
    release = fleet.round.bench.shelf.publish(1)
    other = msgspec.structs.replace(release, info=msgspec.structs.replace(release.info, channel="pilot"))
    fleet.round.bench.shelf.releases[:] = [other]
    fleet.desk.take(fleet.want(other, seq=1))
    assert fleet.poll() == 1


@pytest.mark.fault("F15")
def test_same_desired_state_again_is_no_news_and_a_mended_release_is_accepted(fleet):
    shelf = fleet.round.bench.shelf
    bad = shelf.publish(1)
    data = fleet.want(bad, seq=1)
    assert fleet.desk.take(data)
    fleet.round.proven = failing()
    assert fleet.poll() == 0
    count = len(fleet.events())
    for _ in range(3):
        assert not fleet.desk.take(data)
        assert fleet.poll() == 0
    assert len(fleet.events()) == count  # neither told nor tried again
    fleet.round.proven = type(fleet.round)(fleet.round.bench.folder / "x").proven
    assert fleet.desk.take(fleet.want(shelf.publish(2), seq=2))
    assert fleet.poll() == 2


def failing():
    from edgekit.agent.child import SelfTestFailed

    return SelfTestFailed(DeviceError("selftest.mismatch", "no"), is_final=True)


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    ("named", "code"),
    [
        ({"seq": 5}, "desired.replayed"),
        ({"seq": 4}, "desired.replayed"),
        ({"seq": 6, "device": "another"}, "desired.other_device"),
        ({"seq": 6, "ends": now() - timedelta(seconds=1), "issued": now() - timedelta(hours=1)}, "desired.expired"),
        ({"seq": 6, "issued": now() + timedelta(days=3), "ends": now() + timedelta(days=4)}, "desired.from_future"),
        ({"seq": 6, "signers": (STRANGER,)}, "trust.signature"),
    ],
)
def test_desired_state_refused_with_one_event(fleet, named, code):
    shelf = fleet.round.bench.shelf
    assert fleet.desk.take(fleet.want(shelf.publish(1), seq=5))
    assert fleet.poll() == 1
    bad = fleet.want(shelf.publish(2), **named)
    for _ in range(2):
        assert not fleet.desk.take(bad)
    assert fleet.poll() == 1
    assert [found for kind, found in fleet.events() if kind == "desired_refused"] == [code]
    assert fleet.round.bench.store.state.desired_seq == 5


@pytest.mark.fault("F17")
def test_damaged_envelope_refused(fleet):
    data = bytearray(fleet.want(fleet.round.bench.shelf.publish(1), seq=1))
    data[len(data) // 2] ^= 1
    assert not fleet.desk.take(bytes(data))
    assert [kind for kind, _ in fleet.events()] == ["desired_refused"]
    assert fleet.poll() == 0


@pytest.mark.fault("F17")
def test_one_signature_of_two_is_not_enough(tmp_path):
    fleet = Fleet(tmp_path, fleet_threshold=2)
    release = fleet.round.bench.shelf.publish(1)
    assert not fleet.desk.take(fleet.want(release, seq=1))
    assert fleet.desk.take(fleet.want(release, seq=1, signers=(DIRECTOR, SECOND)))


@pytest.mark.fault("F17")
def test_release_that_nobody_published_refused_once(fleet):
    release = fleet.round.bench.shelf.publish(1)
    fleet.round.bench.shelf.releases.clear()
    assert fleet.desk.take(fleet.want(release, seq=1))
    for _ in range(3):
        assert fleet.poll() == 0
    assert [code for kind, code in fleet.events() if kind == "desired_refused"] == ["desired.unknown_release"]


def test_what_was_accepted_survives_a_restart_and_a_lost_state(fleet):
    release = fleet.round.bench.shelf.publish(1)
    fleet.desk.take(fleet.want(release, seq=7))
    fleet.open()
    assert (fleet.desk.state.seq, fleet.round.bench.store.state.desired_seq) == (7, 7)
    (fleet.round.bench.folder / "state.json").unlink()
    fleet.open()
    assert fleet.round.bench.store.state.desired_seq == 7
    assert not fleet.desk.take(fleet.want(release, seq=6))
    assert fleet.poll() == 1


def test_expired_desired_state_begins_nothing_and_stops_nothing(fleet):
    shelf = fleet.round.bench.shelf
    fleet.desk.take(fleet.want(shelf.publish(1), seq=1))
    assert fleet.poll() == 1
    fleet.desk.take(fleet.want(shelf.publish(2), seq=2))
    fleet.desk.state = msgspec.structs.replace(fleet.desk.state, expires_at=now() - timedelta(seconds=1))
    assert fleet.poll() == 1
    assert ("desired_refused", "desired.expired") in fleet.events()


def test_policy_says_when(fleet):
    shelf = fleet.round.bench.shelf
    later = UpdatePolicy(not_before=now() + timedelta(seconds=30))
    fleet.desk.take(fleet.want(shelf.publish(1), seq=1, policy=later))
    assert fleet.poll() == 0
    assert 0 < fleet.desk.choose("m", shelf.releases).wait_s <= 30
    fleet.desk.take(fleet.want(shelf.releases[0], seq=2, policy=UpdatePolicy(jitter_s=0.0)))
    assert fleet.poll() == 1


def test_jitter_is_each_devices_own_and_spread():
    shares = [jitter_share(f"device-{number}", "sha256:aa") for number in range(200)]
    assert len(set(shares)) == 200
    assert 0.4 < sum(shares) / 200 < 0.6
    assert min(shares) >= 0
    assert max(shares) < 1
    state = DesiredState(device="d", seq=1, issued_at=now(), expires_at=now(), models={}, policy=UpdatePolicy(jitter_s=100.0))
    assert state.issued_at <= starts_at(state, "sha256:aa") < state.issued_at + timedelta(seconds=100)


def test_policy_can_only_forbid_more():
    metered = UpdatePolicy(is_metered=True, is_full_allowed=False)
    assert _restricted(AgentConfig(), None) == AgentConfig()
    found = _restricted(AgentConfig(), metered)
    assert (found.metered, found.metered_full) == (True, False)
    free = UpdatePolicy(is_metered=True, is_full_allowed=True)
    assert _restricted(AgentConfig(metered=True, metered_full=False), free).metered_full is False
    assert _restricted(AgentConfig(), free).metered_full is True


@pytest.mark.fault("F18")
@pytest.mark.parametrize(
    "where", ["fetch", "precheck", "fetched_blob", "stage", "staging", "verify", "selftest", "tested", "switch", "switched"]
)
def test_desired_state_that_changes_meanwhile_ends_on_the_latest(fleet, monkeypatch, where):
    shelf = fleet.round.bench.shelf
    first, second = shelf.publish(1), shelf.publish(2)
    fleet.desk.take(fleet.want(first, seq=1))
    changed = []

    def change(name):
        if name == where and not changed:
            changed.append(name)
            fleet.desk.take(fleet.want(second, seq=2))
            fleet.round.updater.superseded.set()

    for module in ("updater", "steps"):
        monkeypatch.setattr(f"edgekit.agent.{module}.checkpoint", change)
    fleet.poll()
    assert changed
    state = fleet.round.bench.store.state
    assert (state.phase, state.attempt, state.refusals) == ("idle", None, ())
    assert all(slot.status != "staging" for slot in state.slots)
    assert fleet.poll() == 2


@pytest.mark.fault("F18")
def test_desired_state_that_changes_on_probation_waits_for_its_end(tmp_path):
    fleet = Fleet(tmp_path, probation=ProbationConfig(inferences=10, seconds=0))
    fleet.round.updater.config = fleet.config
    shelf = fleet.round.bench.shelf
    fleet.desk.take(fleet.want(shelf.publish(1), seq=1))
    assert fleet.poll() == 1
    fleet.desk.take(fleet.want(shelf.publish(2), seq=2))
    assert fleet.poll() == 1
    fleet.round.updater.commit()
    assert fleet.poll() == 2


def test_desired_state_arrives_through_the_broker(world, make_agent, tmp_path):
    """The retained message of a fleet, from its topic to the model that serves."""
    import paho.mqtt.client as paho

    from tests.agent.world import Listener, free_port

    keys = tmp_path / "keys-of-the-fleet"
    keys.mkdir()
    save_public_key(DIRECTOR.public_key, keys / "director.pub")
    world.publish("1.0", seed=1)
    second = world.publish("2.0", seed=2)
    world.publish("3.0", seed=3)
    listener = Listener(free_port()).start()
    try:
        state = DesiredState(
            device="cam",
            seq=1,
            issued_at=now(),
            expires_at=now() + timedelta(hours=1),
            models={"m": DesiredModel(counter=second.info.counter, manifest=second.manifest_digest)},
        )
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="director", protocol=paho.MQTTv5)
        client.connect("127.0.0.1", listener.inner_port)
        client.loop_start()
        client.publish("ek/1/lab/cam/des", sign_desired(state, (DIRECTOR,)), qos=1, retain=True).wait_for_publish(10)
        agent = make_agent(fleet_keys=str(keys), broker=f"mqtt://127.0.0.1:{listener.port}").start()
        agent.wait_committed("2.0")
        assert agent.status()["state"]["desired_seq"] == 1
        client.disconnect()
        client.loop_stop()
        agent.stop()
    finally:
        listener.stop()


def test_older_release_in_the_other_slot_is_gone_back_to_and_left_again(world, make_agent, tmp_path):
    """A rollout that is taken back: nothing is fetched, no floor is lowered, and the release may be desired again."""
    import paho.mqtt.client as paho

    from tests.agent.world import Listener, assert_serves, free_port

    keys = tmp_path / "keys-of-the-fleet"
    keys.mkdir()
    save_public_key(DIRECTOR.public_key, keys / "director.pub")
    releases = [world.publish(f"{seed}.0", seed=seed) for seed in (1, 2)]
    listener = Listener(free_port()).start()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="director", protocol=paho.MQTTv5)

    def want(seq, release):
        wanted = DesiredModel(counter=release.info.counter, manifest=release.manifest_digest)
        state = DesiredState(
            device="cam", seq=seq, issued_at=now(), expires_at=now() + timedelta(hours=1), models={"m": wanted}
        )
        client.publish("ek/1/lab/cam/des", sign_desired(state, (DIRECTOR,)), qos=1, retain=True).wait_for_publish(10)

    try:
        client.connect("127.0.0.1", listener.inner_port)
        client.loop_start()
        want(1, releases[0])
        agent = make_agent(fleet_keys=str(keys), broker=f"mqtt://127.0.0.1:{listener.port}").start()
        agent.wait_committed("1.0")
        want(2, releases[1])
        agent.wait_committed("2.0")
        floors = agent.status()["state"]["floors"]["releases"]
        world.stop()  # the way back needs no repository
        want(3, releases[0])
        agent.wait_served("1.0")
        assert_serves(agent, 1)
        state = agent.status()["state"]
        assert state["floors"]["releases"] == floors
        assert [refusal["code"] for refusal in state["refusals"]] == ["desired.taken_back"]
        world.start()
        want(4, releases[1])
        agent.wait_committed("2.0")
        assert agent.status()["state"]["refusals"] == []
        client.disconnect()
        client.loop_stop()
        agent.stop()
    finally:
        listener.stop()
