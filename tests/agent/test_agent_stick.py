"""Installing from a stick: what is on it is verified offline; older, expired, revoked, damaged and foreign is refused."""

from __future__ import annotations

import secrets
import shutil
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from forging import role_signers

from edgekit.agent.inbox import Inbox, Request
from edgekit.agent.stick import StickSource
from edgekit.errors import DeviceError, EdgekitError, TrustError, UsageError
from edgekit.repository.ceremony import refresh_repository, rotate
from edgekit.repository.stick import make_stick
from edgekit.schema.manifest import Requires
from edgekit.schema.state import Floors
from edgekit.trust.offline import read_stick

NOW = datetime.now(UTC)


@pytest.fixture
def stick(world, tmp_path):
    world.publish("1.0", seed=1)
    make_stick(world.folder, tmp_path / "usb", names=("m",))
    return tmp_path / "usb"


def read(world, stick, *, floors=None, now=NOW, root=None):
    return read_stick(stick, root=root or world.root.read_bytes(), floors=floors or Floors(), now=now)


def refused(world, stick, **changes) -> str:
    with pytest.raises(EdgekitError) as caught:
        read(world, stick, **changes)
    return caught.value.code


def install(agent, stick):
    return Inbox(agent.state_dir).ask(Request(id=secrets.token_hex(8), stick=str(stick)), timeout_s=30)


def test_stick_long_after_the_timestamp_expired(world, stick):
    found = read(world, stick, now=NOW + timedelta(days=30))
    assert [release.info.version for release in found.releases] == ["1.0"]
    assert (found.floors.root, found.floors.targets, found.floors.timestamp, found.floors.time) == (1, 2, 0, None)


@pytest.mark.fault("F11")
def test_stick_of_expired_targets_or_root(world, stick):
    assert refused(world, stick, now=NOW + timedelta(days=91)) == "trust.expired"
    behind = Floors(time=NOW + timedelta(days=91))
    assert refused(world, stick, floors=behind, now=datetime(1970, 1, 1, tzinfo=UTC)) == "trust.expired"


@pytest.mark.fault("F11")
def test_stick_older_than_what_the_device_has_seen(world, stick, tmp_path):
    world.publish("2.0", seed=2)
    make_stick(world.folder, tmp_path / "newer", names=("m@2.0",))
    floors = read(world, tmp_path / "newer").floors
    assert refused(world, stick, floors=floors) == "trust.rollback"
    assert refused(world, stick, floors=msgspec.structs.replace(floors, targets=0, root=5)) == "trust.rollback"


@pytest.mark.fault("F11")
def test_stick_signed_by_a_key_that_was_revoked_since(world, stick, tmp_path):
    old = stick / "metadata" / "2.targets.json"
    rotate(world.folder, "targets", old="targets", new="generate")
    make_stick(world.folder, tmp_path / "newer", names=("m",))
    assert read(world, tmp_path / "newer").floors.root == 2
    for path in (tmp_path / "newer" / "metadata").glob("*.targets.json"):
        path.unlink()
    shutil.copy(old, tmp_path / "newer" / "metadata" / "9.targets.json")
    assert refused(world, tmp_path / "newer") == "trust.signature"


@pytest.mark.fault("F11")
def test_stick_with_a_root_that_a_stranger_made(world, stick, tmp_path):
    from edgekit.repository.ceremony import init_repository

    init_repository(tmp_path / "other" / "repo")
    shutil.copy(tmp_path / "other" / "repo" / "metadata" / "1.root.json", stick / "metadata" / "2.root.json")
    assert refused(world, stick) in {"trust.rollback", "trust.signature"}


@pytest.mark.fault("F11")
@pytest.mark.parametrize("name", ["2.targets.json", "root"])
def test_stick_with_a_flipped_byte(world, stick, name):
    if name == "root":
        changed = world.root.read_bytes().replace(b'"version":1', b'"version":2')
        assert refused(world, stick, root=changed) == "trust.signature"
        return
    path = stick / "metadata" / name
    data = path.read_bytes()
    at = data.index(b'"counter":1') + 10
    path.write_bytes(data[:at] + b"9" + data[at + 1 :])
    assert refused(world, stick) == "trust.signature"


@pytest.mark.fault("F11")
def test_stick_with_endless_linked_or_missing_metadata(world, stick, tmp_path):
    path = stick / "metadata" / "2.targets.json"
    good = path.read_bytes()
    path.unlink()
    assert refused(world, stick) == "stick.incomplete"
    with path.open("wb") as file:
        file.truncate(6_000_000)
    assert refused(world, stick) == "trust.length"
    path.unlink()
    (tmp_path / "elsewhere.json").write_bytes(good)
    path.symlink_to(tmp_path / "elsewhere.json")
    assert refused(world, stick) == "stick.unreadable"


@pytest.mark.fault("F11")
def test_blob_of_a_stick_changed_short_or_gone(world, stick, tmp_path):
    from edgekit.bundle.reader import parse_manifest

    source = StickSource(stick, root=world.root.read_bytes(), floors=Floors(), model="m")
    release = source.refresh().releases[0]
    ref = parse_manifest(source.fetch_manifest(release)).blobs[0]
    path = stick / "blobs" / "sha256" / ref.digest.removeprefix("sha256:")
    good = path.read_bytes()
    parts = tmp_path / "parts"
    parts.mkdir()
    for damaged, kind in (
        (good[:-1] + b"?", TrustError),
        (good[:-1], DeviceError),
        (good + b"?", DeviceError),
        (None, DeviceError),
    ):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        else:
            assert not path.exists()
        with pytest.raises(kind):
            source.fetch_blob(ref, parts)
        assert list(parts.iterdir()) == []
        path.write_bytes(good)
    assert source.fetch_blob(ref, parts).read_bytes() == good


def test_agent_without_a_repository_installs_from_a_stick(world, stick, make_agent):
    agent = make_agent(repository="", root=str(world.root)).start()
    wait_for_live(agent)
    answer = install(agent, stick)
    assert (answer.code, agent.served()) == ("", "1.0")
    assert "serves from slot" in answer.text
    again = Inbox(agent.state_dir).ask(Request(id="again", stick=str(stick)), timeout_s=30)
    assert again.code == ""
    assert "not older" in again.text


def wait_for_live(agent):
    from tests.agent.world import wait_for

    wait_for(lambda: agent.get("/v2/health/live")[0] == 200, what="health")


@pytest.mark.fault("F11")
def test_agent_refuses_an_older_a_foreign_and_a_pulled_stick(world, stick, make_agent, tmp_path):
    agent = make_agent(repository="", root=str(world.root)).start()
    wait_for_live(agent)
    world.publish("2.0", seed=2)
    make_stick(world.folder, tmp_path / "second", names=("m",))
    assert install(agent, tmp_path / "second").code == ""
    assert install(agent, stick).code == "trust.rollback"
    world.publish("3.0", seed=3, requires=[Requires(runtime="onnxruntime", arch=("aarch64",), isa=("sve", "amx_int8"))])
    make_stick(world.folder, tmp_path / "third", names=("m@3.0",))
    assert install(agent, tmp_path / "third").code == "device.unsupported"
    world.publish("4.0", seed=4)
    make_stick(world.folder, tmp_path / "fourth", names=("m@4.0",))
    for path in (tmp_path / "fourth" / "blobs" / "sha256").iterdir():
        path.unlink()
    assert install(agent, tmp_path / "fourth").code == "stick.unreadable"
    assert agent.served() == "2.0"


def test_stick_goes_only_into_a_folder_of_its_own(world, stick, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UsageError) as caught:
        make_stick(world.folder, tmp_path / "photos", names=("m",))
    assert caught.value.code == "stick.occupied"
    refresh_repository(world.folder, is_targets_too=True)
    made = make_stick(world.folder, stick, names=("m@1.0",))
    assert [path.name for path in (stick / "metadata").glob("*.targets.json")] == ["3.targets.json"]
    assert made.releases[0].info.version == "1.0"
    assert role_signers(world.folder, "root")  # keys are not on the stick
    assert not list(stick.rglob("*.pem"))


def test_old_targets_beside_a_new_root_are_refused(world, stick, tmp_path):
    """A new root is public: put beside an old stick's targets it must not make them acceptable."""
    world.publish("2.0", seed=2)
    make_stick(world.folder, tmp_path / "newer", names=("m",))
    floors = read(world, tmp_path / "newer").floors
    rotate(world.folder, "timestamp", old="timestamp", new="generate")
    shutil.copy(world.folder / "metadata" / "2.root.json", stick / "metadata" / "2.root.json")
    assert refused(world, stick, floors=floors) == "trust.rollback"
