"""Power cuts while a device polls, installs and tidies up: what served goes on serving, floors never fall, and it recovers."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import threading
import time
import types
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from edgekit.agent.config import AgentConfig
from edgekit.agent.deltas import make_from_delta
from edgekit.agent.desired import DesiredDesk
from edgekit.agent.journal import Journal
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts, active_slot, make_plan
from edgekit.agent.slots import SlotStore
from edgekit.agent.source import RepositorySource
from edgekit.agent.state_store import STATE_FILE, StateStore, prepare_dir
from edgekit.agent.steps import Installer
from edgekit.agent.updater import Updater
from edgekit.bundle.delta.make import make_delta
from edgekit.bundle.opening import load_identities, open_sealed
from edgekit.bundle.reader import parse_manifest, read_bundle
from edgekit.bundle.sealing import make_identity, seal_models
from edgekit.bundle.writer import Draft
from edgekit.durable import sync_folder
from edgekit.errors import DeviceError, TrustError
from edgekit.schema.base import decode_json
from edgekit.schema.desired import DesiredState
from edgekit.schema.digest import digest_bytes, digest_file, hex_of
from edgekit.schema.manifest import BlobRef
from edgekit.schema.release import DeltaRef, Release
from edgekit.schema.state import AgentState, Floors, Slot
from edgekit.trust import download
from edgekit.trust.desired_signer import sign_desired
from edgekit.trust.download import download_blob
from edgekit.trust.keys import save_public_key
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer
from tests.crash.crashy_disk import Explorer, Recorder, survivors
from tests.crash.office import VERSIONS, Office, scratch_folder

NOW = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
"""A device goes by the real clock."""
FACTS = DeviceFacts(arch="x86-64", cpu="c", isa=(), cores=1, ram_mb=1000, os="Linux", runtimes={"onnxruntime": "1.32.0"})
DEVICE = "cam-7"
SYNC_BYTES = 1 << 16
"""A download is fsynced after so many bytes."""


class Shop:
    """A repository as it was after each of three releases."""

    def __init__(self, folder: Path) -> None:
        self.office = Office(folder, NOW)
        self.folder, self.server = folder, self.office.server
        work = folder / "work"
        work.mkdir()
        self.office.init(work)
        self.stages = {}
        for version in VERSIONS:
            self.office.publish(work, version)
            self.stages[version] = Path(shutil.copytree(work / "repo", folder / f"repo-{version}"))
        self.root = (work / "repo" / "metadata" / "1.root.json").read_bytes()
        self._numbers = itertools.count()

    def offer(self, version: str) -> None:
        """From now on the repository is the one that ends with this release."""
        self.server.root = self.stages[version]

    def refresh(self, cache: Path) -> tuple[Release, ...]:
        """What a device without floors takes from what is offered."""
        return self._device(cache).refresh().releases

    def fetch_manifest(self, release: Release) -> bytes:
        return self._device(self.scratch()).fetch_manifest(release)

    def _device(self, cache: Path) -> TrustedRepository:
        return TrustedRepository(cache, self.server.url, root=self.root, floors=Floors(), now=datetime.now(UTC), model="kws")

    def blob(self, ref: BlobRef) -> Path:
        return self.stages[VERSIONS[-1]] / "blobs" / "sha256" / hex_of(ref.digest)

    def scratch(self) -> Path:
        return self.folder / f"scratch-{next(self._numbers)}"


class Device:
    """The updater of an agent on a state folder; the model's worker, which writes nothing durable, is left out."""

    def __init__(self, shop: Shop, state_dir: Path) -> None:
        self.config = AgentConfig(
            device=DEVICE, state_dir=str(state_dir), model="kws", repository=shop.server.url, disk_reserve_bytes=0
        )
        prepare_dir(state_dir)
        self.store = StateStore.open(state_dir, device=DEVICE)
        self.slots = SlotStore(state_dir)
        journal = Journal(Outbox(shop.scratch(), max_bytes=1 << 20), self.config, "0")
        self.updater = Updater(self.config, self.store, self.slots, journal, shop.root, self, self._facts, lambda: None)
        self.updater.recover()

    async def _facts(self) -> DeviceFacts:
        return FACTS

    async def prove(self, _model):
        return types.SimpleNamespace(serve=lambda: None, discard=lambda: None)

    def poll(self) -> None:
        """One round, after which what was installed is on probation."""
        asyncio.run(self.updater.poll())
        assert not self.updater.last_error, self.updater.last_error

    def update(self) -> None:
        """One round and its probation's good end; an older probation ends first."""
        self.updater.commit()
        self.poll()
        self.updater.commit()

    def on_probation(self, version: str) -> Slot:
        """The slot that serves, and has not earned its place yet."""
        slot = active_slot(self.store.state)
        assert (slot.version, self.store.state.probation.counter) == (version, slot.counter)
        return slot

    def check(self) -> None:
        """What the state says of the slots is true."""
        installer = Installer(self.config, self.store, self.slots, FACTS)
        for slot in self.store.state.slots:
            if slot.status in {"verified", "active", "good"}:
                installer.model_of(slot)


def refused_as(action) -> str:
    try:
        action()
    except TrustError as error:
        return error.code
    return ""


@pytest.fixture(scope="module")
def shop():
    folder = scratch_folder()
    made = Shop(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # a part that the power cut damaged is asked for again after a pause
        monkeypatch.setattr(download, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda _seconds: None))
        yield made
    made.office.close()
    shutil.rmtree(folder)


# --- the agent's life


@dataclass
class Saved:
    """Every state that was saved, in order."""

    states: list[AgentState]

    @classmethod
    def watch(cls, monkeypatch, recorder: Recorder) -> Saved:
        """Once a save has returned, a power cut leaves that state or a later one."""
        saved = cls([])
        save = StateStore._save

        def watched(self, state):
            if not saved.states or state != saved.states[-1]:
                saved.states.append(state)
            try:
                return save(self, state)
            finally:
                recorder.promise(len(saved.states) - 1)

        monkeypatch.setattr(StateStore, "_save", watched)
        return saved

    def check(self, state_dir: Path, promised: int) -> None:
        path = state_dir / STATE_FILE
        if not path.exists():
            assert promised < 0, "the state is gone"
            return
        found = decode_json(path.read_bytes(), AgentState)
        assert found in self.states[max(0, promised) :], f"the state is older than number {promised}"


def check_life(shop, saved):
    """Whatever a power cut left, the next start serves what served, and installs what is offered now."""

    def check(folder, promised):
        state_dir = folder / "state"
        saved.check(state_dir, promised)
        served = active_slot(saved.states[promised]) if promised >= 0 else None
        device = Device(shop, state_dir)
        device.check()
        before = active_slot(device.store.state)
        assert served is None or before.counter >= served.counter, "it went back"
        shop.offer("3.0")
        device.update()
        device.check()
        after = device.store.state
        assert active_slot(after).version == "3.0"
        assert after.phase == "idle"
        if promised >= 0:
            floors = saved.states[promised].floors
            assert all(
                getattr(after.floors, role) >= getattr(floors, role) for role in ("root", "timestamp", "snapshot", "targets")
            )
            assert after.floors.releases["kws"] >= floors.releases.get("kws", 0)

    return check


def explore_first_install(shop, folder):
    with pytest.MonkeyPatch.context() as monkeypatch, Recorder(folder / "work", promised=-1) as recorder:
        saved = Saved.watch(monkeypatch, recorder)
        shop.offer("1.0")
        Device(shop, folder / "work" / "state").update()
    return Explorer("first install", recorder.trace, check_life(shop, saved), folder)


def explore_next_installs(shop, folder):
    """The second fills the other slot, with a blob that both releases have; the third takes the place of the first."""
    shop.offer("1.0")
    Device(shop, folder / "work" / "state").update()
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = Recorder(folder / "work", promised=0)
        saved = Saved.watch(monkeypatch, recorder)
        saved.states.append(StateStore.open(folder / "work" / "state", device=DEVICE).state)
        with recorder:
            for version in ("2.0", "3.0"):
                shop.offer(version)
                Device(shop, folder / "work" / "state").update()
    return Explorer("next installs", recorder.trace, check_life(shop, saved), folder)


def explore_recovery(shop, folder):
    """The power is cut again while the device recovers from a half-built slot."""
    shop.offer("1.0")
    device = Device(shop, folder / "work" / "state")
    device.update()
    shop.offer("2.0")
    build = SlotStore.build

    def interrupted(self, *args, **named):
        build(self, *args, **named)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(SlotStore, "build", interrupted)
        with pytest.raises(KeyboardInterrupt):
            device.poll()
    assert sorted(slot.status for slot in device.store.state.slots) == ["active", "staging"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = Recorder(folder / "work", promised=0)
        saved = Saved.watch(monkeypatch, recorder)
        saved.states.append(StateStore.open(folder / "work" / "state", device=DEVICE).state)
        with recorder:
            Device(shop, folder / "work" / "state").update()
    return Explorer("recovery", recorder.trace, check_life(shop, saved), folder)


def explore_damaged_state(shop, folder):
    """A state file that cannot be read is kept for people; what the slots say of themselves goes on serving."""
    state_dir = folder / "work" / "state"
    shop.offer("1.0")
    Device(shop, state_dir).update()
    (state_dir / STATE_FILE).write_bytes(b"{damaged")
    with Recorder(folder / "work", promised=False) as recorder:
        store = StateStore.open(state_dir, device=DEVICE)
        recorder.promise(True)
        store.update(phase="fetch")

    def check(folder, is_set_aside):
        aside = folder / "state" / "state.damaged"
        assert aside.exists() or not is_set_aside, "what was set aside is gone"
        assert not aside.exists() or aside.read_bytes() == b"{damaged"
        device = Device(shop, folder / "state")
        device.check()
        assert active_slot(device.store.state).version == "1.0"
        assert device.store.state.floors.releases == {"kws": 1}

    return Explorer("damaged state", recorder.trace, check, folder)


def explore_commit(shop, folder):
    """A model that passed its probation is what serves after a power cut, even when the state is lost with it."""
    device = new_device_on_probation(shop, folder / "work" / "state")
    with Recorder(folder / "work", promised=False) as recorder:
        device.updater.commit()
        recorder.promise(True)

    def check(folder, is_committed):
        state_dir = folder / "state"
        without = Path(shutil.copytree(state_dir, folder / "without", ignore=shutil.ignore_patterns(STATE_FILE)))
        device = Device(shop, state_dir)
        device.check()
        state = device.store.state
        assert active_slot(state).version == "2.0"
        assert state.floors.releases == {"kws": 2} or (not is_committed and state.probation.counter == 2)
        lost = StateStore.open(without, device=DEVICE).state
        assert lost.floors.releases == {"kws": active_slot(lost).counter}
        assert active_slot(lost).version == "2.0" or not is_committed, "a lost state went back below the floor"

    return Explorer("commit", recorder.trace, check, folder)


def explore_rollback(shop, folder):
    """A model that failed its probation never serves again; the one before it does."""
    device = new_device_on_probation(shop, folder / "work" / "state")
    with Recorder(folder / "work", promised=False) as recorder:
        device.updater.give_up(device.on_probation("2.0"), DeviceError("probation.failures", "it failed"))
        recorder.promise(True)

    def check(folder, is_rolled_back):
        device = Device(shop, folder / "state")
        device.check()
        state = device.store.state
        assert state.floors.releases == {"kws": 1}
        assert active_slot(state).version == ("1.0" if state.probation is None else "2.0")
        assert state.probation is None or not is_rolled_back, "it is on probation again"
        assert bool(state.refusals) == (state.probation is None), "it would be installed again"
        shop.offer("3.0")
        device.update()
        assert active_slot(device.store.state).version == "3.0"

    return Explorer("rollback", recorder.trace, check, folder)


def new_device_on_probation(shop, state_dir):
    """The first release committed, the second on probation."""
    shop.offer("1.0")
    Device(shop, state_dir).update()
    shop.offer("2.0")
    device = Device(shop, state_dir)
    device.poll()
    device.on_probation("2.0")
    return device


def explore_desired(shop, folder):
    """What the device said that it accepted it acts on after a power cut."""
    keys, director = folder / "keys", generate_signer()
    keys.mkdir()
    save_public_key(director.public_key, keys / "director.pub")
    device = Device(shop, folder / "work" / "state")
    config = msgspec.structs.replace(device.config, fleet_keys=str(keys))
    now = datetime.now(UTC)
    desired = DesiredState(device=DEVICE, seq=4, issued_at=now, expires_at=now + timedelta(days=1), models={})
    journal = Journal(Outbox(shop.scratch(), max_bytes=1 << 20), config, "0")
    device.store.update(phase="idle")
    with Recorder(folder / "work", promised=False) as recorder:
        assert DesiredDesk.open(config, device.store, journal).take(sign_desired(desired, (director,)))
        recorder.promise(True)

    def check(folder, is_accepted):
        state_dir = folder / "state"
        there = msgspec.structs.replace(config, state_dir=str(state_dir))
        desk = DesiredDesk.open(there, StateStore.open(state_dir, device=DEVICE), journal)
        assert desk.state is not None or not is_accepted, "what was accepted is gone"
        assert desk.state is None or desk.store.state.desired_seq == 4

    return Explorer("desired", recorder.trace, check, folder)


# --- its parts, each with what it promises when it returns


def explore_fetch(shop, folder):
    """What was fetched is not fetched again."""
    state_dir = folder / "work" / "state"
    device = Device(shop, state_dir)
    shop.offer("1.0")
    source = RepositorySource(device.config, shop.root, Floors(), threading.Event())
    plan = make_plan(AgentState(device=DEVICE), source.refresh().releases, model="kws", channel="production")
    with Recorder(folder / "work", promised=()) as recorder:
        contents = Installer(device.config, device.store, device.slots, FACTS).fetch(plan, source)
        recorder.promise(contents.refs)

    def check(folder, refs):
        for ref in refs:
            assert digest_file(folder / "state" / "parts" / hex_of(ref.digest)) == ref.digest
        device = Device(shop, folder / "state")
        shop.offer("1.0")
        device.update()
        device.check()
        assert active_slot(device.store.state).version == "1.0"

    return Explorer("fetch", recorder.trace, check, folder)


def explore_download(shop, folder):
    """What was fetched of a large file is not fetched again, but for the last bytes; then the file is there."""
    content = random.Random(1).randbytes(5 * SYNC_BYTES)
    ref = BlobRef(path="model.onnx", role="model", digest=digest_bytes(content), size_bytes=len(content))
    served = folder / "served"
    for name in ("metadata", "blobs/sha256"):
        (served / name).mkdir(parents=True)
    (served / "blobs" / "sha256" / hex_of(ref.digest)).write_bytes(content)
    part_dir = folder / "work" / "state" / "parts"
    (folder / "work" / "state").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch, Recorder(folder / "work", promised=0) as recorder:
        monkeypatch.setattr(download, "SYNC_BYTES", SYNC_BYTES)
        shop.server.root = served
        download_blob(
            shop.server.url, ref, part_dir, on_progress=lambda done, _size: recorder.promise(max(0, done - SYNC_BYTES))
        )
        recorder.promise(len(content))

    def check(folder, promised):
        parts = folder / "state" / "parts"
        if promised == len(content):
            assert (parts / hex_of(ref.digest)).is_file(), "the file is gone"
        kept = next((path.read_bytes() for path in parts.glob(f"{hex_of(ref.digest)}*")), b"")
        assert content[:promised] == kept[:promised], f"not the first {promised} bytes"
        shop.server.root = served
        assert digest_file(download_blob(shop.server.url, ref, parts)) == ref.digest

    return Explorer("download", recorder.trace, check, folder)


def explore_cache(shop, folder):
    """Metadata that was seen is not gone back from, even by a device that lost its floors."""
    shop.offer("1.0")
    shop.refresh(folder / "work" / "cache")
    with Recorder(folder / "work", promised=False) as recorder:
        shop.offer("2.0")
        shop.refresh(folder / "work" / "cache")
        recorder.promise(True)

    def check(folder, has_seen):
        if has_seen:
            shop.offer("1.0")
            assert refused_as(lambda: shop.refresh(folder / "cache")) == "trust.rollback"
        shop.offer("3.0")
        assert {release.info.version for release in shop.refresh(folder / "cache")} == set(VERSIONS)

    return Explorer("metadata cache", recorder.trace, check, folder)


def explore_build(shop, folder):
    """A slot that was built is whole, and says itself what it is; whoever fetched the parts need not have fsynced them."""
    work = folder / "work"
    shop.offer("2.0")
    first, second = (release for release in shop.refresh(folder / "cache") if release.info.version in {"1.0", "2.0"})
    slots = SlotStore(work / "state")
    (work / "parts").mkdir()
    (work / "state").mkdir()

    def build(name, release, donor):
        manifest = shop.fetch_manifest(release)
        parts = []
        for ref in parse_manifest(manifest).blobs:
            part = work / "parts" / hex_of(ref.digest)
            if donor is None or not slots.has_blob(donor, ref):
                shutil.copyfile(shop.blob(ref), part)
            parts.append((ref, part))
        slots.build(name, release, manifest, parts, donor)

    with Recorder(work, promised=0) as recorder:
        build("a", first, None)
        recorder.promise(1)
        build("b", second, "a")
        recorder.promise(2)

    def check(folder, count):
        found = [SlotStore(folder / "state").recover(name) for name in ("a", "b")]
        for number, slot in enumerate(found):
            assert slot is not None or number >= count, f"slot {number} is not whole"
            assert slot is None or slot.counter == number + 1

    return Explorer("build", recorder.trace, check, folder)


def explore_clear(shop, folder):
    """A slot that was given up, because its release was refused, is not found when the state is rebuilt."""
    state_dir = folder / "work" / "state"
    shop.offer("1.0")
    Device(shop, state_dir).update()
    slots = SlotStore(state_dir)
    with Recorder(folder / "work", promised=False) as recorder:
        slots.clear("a")
        recorder.promise(True)

    def check(folder, is_cleared):
        assert SlotStore(folder / "state").recover("a") is None or not is_cleared, "it is back"

    return Explorer("clear", recorder.trace, check, folder)


def explore_sealed(shop, folder):
    """What was opened is on the disk: the sealed part is removed right after."""
    work = folder / "work"
    recipient = make_identity(folder / "device.age", folder / "device.age.pub")
    bundle = read_bundle(shop.office.bundles["1.0"])
    blobs = {ref.digest: b"".join(bundle.chunks(ref.digest)) for ref in bundle.manifest.blobs}
    draft = seal_models(Draft(bundle.manifest, blobs), [recipient])
    ref = next(ref for ref in draft.manifest.blobs if ref.sealed is not None)
    content = draft.blobs[ref.digest]
    (work / "part").write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    with Recorder(work, promised=False) as recorder:
        open_sealed(work / "part", work / "model", ref, load_identities(folder / "device.age"))
        sync_folder(work)
        recorder.promise(True)

    def check(folder, is_opened):
        assert not is_opened or digest_file(folder / "model") == ref.sealed.digest

    return Explorer("open sealed", recorder.trace, check, folder)


def explore_delta(shop, folder):
    """What was made of a delta lies under its name whole, or not at all: it is not hashed before it is used."""
    work = folder / "work"
    old = random.Random(1).randbytes(20_000)
    new = old[:10_000] + b"changed" + old[10_000:]
    (work / "base").write_bytes(old)
    (folder / "new").write_bytes(new)
    made = make_delta(work / "base", folder / "new")
    (work / "delta").write_bytes(made.content)
    ref = DeltaRef(
        base=digest_bytes(old),
        target=digest_bytes(new),
        digest=digest_bytes(made.content),
        size_bytes=len(made.content),
        codec=made.codec,
    )
    with Recorder(work, promised=False) as recorder:
        make_from_delta(work / "delta", work / "base", work / "out", ref, size_bytes=len(new))
        recorder.promise(True)

    def check(folder, is_made):
        out = folder / "out"
        assert out.exists() or not is_made, "what was made is gone"
        assert not out.exists() or out.read_bytes() == new
        if not is_made:
            make_from_delta(folder / "delta", folder / "base", out, ref, size_bytes=len(new))
            assert out.read_bytes() == new

    return Explorer("delta", recorder.trace, check, folder)


LIVES = [explore_recovery, explore_first_install, explore_next_installs]
PARTS = [
    explore_clear,
    explore_sealed,
    explore_delta,
    explore_build,
    explore_cache,
    explore_download,
    explore_desired,
    explore_commit,
    explore_rollback,
    explore_damaged_state,
    explore_fetch,
]
SCENARIOS = [*PARTS, *LIVES]
"""The cheapest first: an fsync that one of them needs is not tried with the next."""
REDUNDANT = {
    # the manifest is written into the same folder right after, and it is what makes a slot
    "folder: sync_folder < write_durably < agent/slots.py:build write_durably(self.path(name) / RELEASE_FILE",
    # the state, which has its number, is written into the same folder right after
    "folder: sync_folder < write_durably < agent/desired.py:take write_durably(self.config.state_path / ENVELOPE_FILE",
}


@pytest.fixture(scope="module")
def explorers(shop):
    made = {}

    def explorer(explore):
        if explore not in made:
            (folder := shop.folder / explore.__name__).mkdir()
            (folder / "work").mkdir()
            made[explore] = explore(shop, folder)
        return made[explore]

    return explorer


@pytest.mark.fault("F3")
@pytest.mark.fault("F3")
@pytest.mark.parametrize("explore", SCENARIOS, ids=lambda explore: explore.__name__.removeprefix("explore_"))
def test_device_after_a_power_cut_at_any_moment(explorers, explore):
    found = list(explorers(explore).violations())
    assert not found, "\n".join(map(str, found[:10]))


@pytest.mark.fault("F3")
@pytest.mark.fault("F3")
def test_fsync_of_the_device_forgotten(explorers):
    left = survivors([explorers(explore) for explore in SCENARIOS], redundant=REDUNDANT)
    assert not left, "\n".join(map(str, left.values()))
