"""State file, lock, slots and the steps that fill them, on a real file system."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from edgekit.agent.config import AgentConfig, ProbationConfig
from edgekit.agent.plan import DeviceFacts, active_slot, make_plan, slot_of
from edgekit.agent.slots import SlotStore
from edgekit.agent.state_store import DirLock, StateStore, prepare_dir
from edgekit.agent.steps import Installer, ReleaseRefused
from edgekit.durable import write_durably
from edgekit.errors import DeviceError, EnvironmentFault, RepositoryError
from edgekit.schema.base import encode_json
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.manifest import Requires
from edgekit.schema.release import Release, ReleaseInfo
from edgekit.schema.state import Slot
from tests.agent.world import NOW, build_manifest

FACTS = DeviceFacts(arch="x86-64", cpu="c", isa=(), cores=1, ram_mb=1000, os="Linux", runtimes={"onnxruntime": "1.32.0"})


class Shelf:
    """A source of releases at the agent's seam: blobs in memory, faults on demand."""

    def __init__(self):
        self.manifests, self.blobs, self.releases = {}, {}, []
        self.fetched, self.fault = [], None

    def publish(self, counter, *, blobs=None, requires=None, version=None):
        version = version or f"{counter}.0"
        blobs = blobs or {(0, "model"): f"model {counter}".encode() * 100, (0, "golden"): b"golden"}
        data = encode_json(build_manifest(version=version, blobs=blobs, requires=requires))
        info = ReleaseInfo(
            name="m",
            version=version,
            channel="production",
            counter=counter,
            published_at=NOW,
            installed_bytes=sum(map(len, blobs.values())),
            runtimes=("onnxruntime",),
        )
        path = f"models/m/{version}/manifest.json"
        release = Release(info=info, manifest_path=path, manifest_digest=digest_bytes(data), manifest_size_bytes=len(data))
        self.manifests[release.manifest_digest] = data
        self.blobs |= {digest_bytes(blob): blob for blob in blobs.values()}
        self.releases.append(release)
        return release

    def fetch_manifest(self, release):
        return self.manifests[release.manifest_digest]

    def fetch_blob(self, ref, part_dir):
        if self.fault:
            raise self.fault
        self.fetched.append(ref.digest)
        path = part_dir / hex_of(ref.digest)
        path.write_bytes(self.blobs[ref.digest])
        return path


class Bench:
    """An installer over a temporary state folder."""

    def __init__(self, folder: Path, **settings):
        settings = {"probation": ProbationConfig(inferences=0, seconds=0)} | settings
        self.config = AgentConfig(device="d", state_dir=str(folder), model="m", disk_reserve_bytes=0, **settings)
        prepare_dir(folder)
        self.folder, self.shelf = folder, Shelf()
        self.slots = SlotStore(folder)
        self.store = StateStore.open(folder, device="d")
        self.installer = Installer(self.config, self.store, self.slots, FACTS)

    def plan(self):
        return make_plan(self.store.state, self.shelf.releases, model="m", channel="production")

    def install(self, *, until=None):
        plan, contents = self.plan(), None
        for step in plan.steps:
            if step == until:
                return plan
            self.installer.enter(step, plan)
            match step:
                case "fetch":
                    contents = self.installer.fetch(plan, self.shelf)
                case "stage":
                    self.installer.stage(plan, contents)
                case "verify":
                    contents = contents or self.installer.contents_of(slot_of(self.store.state, plan.slot))
                    self.installer.verify(plan, contents)
                case "switch":
                    self.installer.switch(plan)
        self.installer.settle()
        return plan

    def reopen(self):
        self.store = StateStore.open(self.folder, device="d")
        self.installer = Installer(self.config, self.store, self.slots, FACTS)
        return self.store.state


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "state")


def test_install_fills_the_slot_and_raises_the_floor(bench):
    release = bench.shelf.publish(1)
    bench.install()
    state = bench.reopen()
    active = active_slot(state)
    assert (active.status, active.version, active.counter) == ("active", "1.0", 1)
    assert active.manifest == release.manifest_digest
    assert state.floors.releases == {"m": 1}
    assert state.phase == "idle"
    assert bench.installer.model_of(active).manifest.version == "1.0"
    assert oct(bench.folder.stat().st_mode & 0o777) == "0o700"


def test_second_install_keeps_the_first_as_good(bench):
    bench.shelf.publish(1)
    bench.install()
    bench.shelf.publish(2)
    bench.install()
    state = bench.store.state
    assert active_slot(state).counter == 2
    assert sorted(slot.status for slot in state.slots) == ["active", "good"]


def test_blob_of_the_active_slot_not_fetched_again(bench):
    bench.shelf.publish(1)
    bench.install()
    bench.shelf.fetched.clear()
    bench.shelf.publish(2)
    bench.install()
    assert bench.shelf.fetched == [digest_bytes(b"model 2" * 100)]
    bench.installer.model_of(active_slot(bench.store.state))


def test_rollback_release_fetches_nothing(bench):
    bench.shelf.publish(1)
    bench.install()
    bench.shelf.publish(2)
    bench.install()
    bench.shelf.fetched.clear()
    old = bench.shelf.releases[0]
    bench.shelf.releases.append(msgspec.structs.replace(old, info=msgspec.structs.replace(old.info, counter=3)))
    bench.install()
    active = active_slot(bench.store.state)
    assert (active.version, active.counter, bench.shelf.fetched) == ("1.0", 3, [])
    assert bench.store.state.floors.releases == {"m": 3}


@pytest.mark.parametrize("requires", [Requires(runtime="litert"), Requires(runtime="onnxruntime", arch=("aarch64",))])
def test_unsupported_release_refused_before_any_blob(bench, requires):
    bench.shelf.publish(1, requires=[requires])
    with pytest.raises(ReleaseRefused) as caught:
        bench.install()
    assert caught.value.code == "device.unsupported"
    assert bench.shelf.fetched == []


def test_manifest_of_another_release_refused(bench):
    release = bench.shelf.publish(1)
    bench.shelf.manifests[release.manifest_digest] = encode_json(build_manifest(version="9.9"))
    with pytest.raises(ReleaseRefused, match=r"says m@9\.9"):
        bench.install()


def test_garbage_manifest_refused(bench):
    release = bench.shelf.publish(1)
    bench.shelf.manifests[release.manifest_digest] = b"{}"
    with pytest.raises(ReleaseRefused) as caught:
        bench.install()
    assert caught.value.code == "manifest.malformed"


def test_network_failure_leaves_the_good_slot_alone(bench):
    for counter in (1, 2):
        bench.shelf.publish(counter)
        bench.install()
    bench.shelf.publish(3)
    bench.shelf.fault = RepositoryError("repository.unreachable", "gone")
    with pytest.raises(RepositoryError):
        bench.install()
    assert sorted(slot.status for slot in bench.store.state.slots) == ["active", "good"]


def test_damaged_blob_in_active_slot_found(bench):
    bench.shelf.publish(1)
    bench.install()
    active = active_slot(bench.store.state)
    path = bench.slots.blob(active.name, active.model_digest)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeviceError) as caught:
        bench.installer.model_of(active)
    assert caught.value.code == "slot.damaged"


def test_blob_replaced_by_a_link_refused(bench, tmp_path):
    bench.shelf.publish(1)
    bench.install()
    active = active_slot(bench.store.state)
    path = bench.slots.blob(active.name, active.model_digest)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeviceError):
        bench.installer.model_of(active)


@pytest.mark.parametrize("where", ["fetch", "stage"])
def test_disk_full_leaves_no_partial_slot_and_recovers(bench, monkeypatch, where):
    bench.shelf.publish(1)
    bench.install()
    bench.shelf.publish(2)
    full = OSError(errno.ENOSPC, "No space left on device")
    if where == "fetch":
        bench.shelf.fault = full
    else:
        monkeypatch.setattr("edgekit.agent.slots.sync_file", lambda _path: (_ for _ in ()).throw(full))
    with pytest.raises(DeviceError, match="B are free") as caught:
        bench.install()
    assert caught.value.code == "device.disk_full"
    assert "Free some space" in caught.value.hint
    state = bench.reopen()
    assert [slot.status for slot in state.slots if slot.name != state.active] == ["empty"]
    assert list((bench.folder / "parts").iterdir()) == []
    bench.installer.model_of(active_slot(state))
    bench.shelf.fault = None
    monkeypatch.undo()
    bench.install()
    assert active_slot(bench.store.state).counter == 2


def test_release_that_cannot_fit_refused_before_the_download(bench, monkeypatch):
    bench.shelf.publish(1)
    monkeypatch.setattr("edgekit.agent.steps.disk_free_bytes", lambda _path: 10)
    with pytest.raises(DeviceError) as caught:
        bench.install()
    assert caught.value.code == "device.disk_full"
    assert bench.shelf.fetched == []


def test_good_slot_given_up_when_only_that_makes_room(bench, monkeypatch):
    for counter in (1, 2):
        bench.shelf.publish(counter)
        bench.install()
    bench.shelf.publish(3)
    free = iter([10, 10_000, 10_000])
    monkeypatch.setattr("edgekit.agent.steps.disk_free_bytes", lambda _path: next(free))
    bench.install()
    assert active_slot(bench.store.state).counter == 3


def test_install_into_a_slot_that_serves_again_superseded(bench):
    for counter in (1, 2):
        bench.shelf.publish(counter)
        bench.install()
    bench.shelf.publish(3)
    plan = bench.install(until="stage")
    contents = bench.installer.fetch(plan, bench.shelf)
    bench.store.update(active=plan.slot)
    with pytest.raises(DeviceError) as caught:
        bench.installer.stage(plan, contents)
    assert caught.value.code == "install.superseded"
    bench.installer.model_of(slot_of(bench.store.state, plan.slot))


@pytest.mark.parametrize("damage", [b"", b"\0" * 400, b"{", None, b'{"device":"d","schema_version":99}'])
def test_lost_state_rebuilt_from_the_slots(bench, damage):
    for counter in (1, 2):
        bench.shelf.publish(counter)
        bench.install()
    before = bench.store.state
    path = bench.folder / "state.json"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    state = bench.reopen()
    assert active_slot(state).counter == 2
    assert state.floors.releases == {"m": 2}
    assert active_slot(state) == active_slot(before)
    assert bench.plan() is None


def test_lost_state_ignores_a_damaged_slot(bench):
    for counter in (1, 2):
        bench.shelf.publish(counter)
        bench.install()
    active = active_slot(bench.store.state)
    bench.slots.blob(active.name, active.model_digest).write_bytes(b"rot")
    (bench.folder / "state.json").unlink()
    assert active_slot(bench.reopen()).counter == 1


def test_state_not_changed_in_memory_when_the_disk_refuses(bench, monkeypatch):
    def refuse(_path, _data, *, mode):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgekit.agent.state_store.write_durably", refuse)
    with pytest.raises(OSError, match="No space"):
        bench.store.update(phase="fetch")
    assert bench.store.state.phase == "idle"


def test_active_slot_never_overwritten_by_update_slot(bench):
    bench.shelf.publish(1)
    bench.install()
    with pytest.raises(DeviceError):
        bench.store.update_slot(Slot(name=bench.store.state.active))


def test_write_durably_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_durably(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftover_of_a_power_cut_is_swept_and_the_state_is_private(tmp_path):
    (tmp_path / ".new-abc").write_bytes(b"half")
    store = StateStore.open(tmp_path, device="pi")
    assert not (tmp_path / ".new-abc").exists()
    store.update(phase="fetch")
    assert [path.name for path in tmp_path.glob("state.json*")] == ["state.json"]
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o600


def test_second_lock_refused_and_names_the_holder(tmp_path):
    first = DirLock(tmp_path)
    first.acquire()
    with pytest.raises(EnvironmentFault, match=str(os.getpid())) as caught:
        DirLock(tmp_path).acquire()
    assert caught.value.code == "agent.already_running"
    first.release()
    again = DirLock(tmp_path)
    again.acquire()
    again.release()
