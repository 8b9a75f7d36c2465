"""The steps of an installation that touch disk and network. Each is idempotent, and its intent is on disk before it begins.

The one rule: nothing here changes the active slot. Bytes are fetched into ``parts/`` first, so the slot with the previous
good model is given up only when everything that replaces it is on this disk and verified.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from edgekit.agent.config import AgentConfig
from edgekit.agent.deltas import MAX_FAILED_DELTAS, make_from_delta
from edgekit.agent.disk import FULL, disk_full
from edgekit.agent.faults import checkpoint
from edgekit.agent.limits import needed_ram_mb
from edgekit.agent.link import Model
from edgekit.agent.plan import (
    DeviceFacts,
    Plan,
    active_slot,
    check_manifest,
    choose_variant,
    contract_changes,
    needed_blobs,
    new_outcome,
    next_attempt,
    slot_of,
)
from edgekit.agent.slots import SlotStore
from edgekit.agent.state_store import StateStore
from edgekit.agent.validity import find_recall
from edgekit.agent.vitals import MEGA, disk_free_bytes, memory_free_bytes
from edgekit.bundle.opening import CURABLE_PREFIX, DAMAGED_CODE, content_of, find_identities, opened_variant
from edgekit.bundle.reader import parse_manifest
from edgekit.durable import make_folder
from edgekit.errors import ArtifactError, DeviceError, EdgekitError, TrustError
from edgekit.schema.digest import hex_of
from edgekit.schema.manifest import BlobRef, Manifest, Variant
from edgekit.schema.release import Release
from edgekit.schema.state import AgentState, Floors, Outcome, Phase, Probation, Slot, SlotName

logger = logging.getLogger(__name__)


class ReleaseRefused(Exception):  # noqa: N818 - a verdict, caught by the updater
    """This device will not install this release, now or later."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Source(Protocol):
    """Where releases come from: the update repository, verified."""

    def fetch_manifest(self, release: Release) -> bytes:
        """The manifest's verified bytes."""

    def fetch_blob(self, ref: BlobRef, part_dir: Path) -> Path:
        """Download a blob, resuming; the verified file's path."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a release brings to this device: ``variant`` names the opened contents, ``refs`` the blobs as they travel."""

    manifest: Manifest
    manifest_bytes: bytes
    variant: Variant
    refs: tuple[BlobRef, ...]


@contextmanager
def _final(*, code: str | None = None) -> Iterator[None]:
    """A damaged or unsuitable release is refused for good."""
    try:
        yield
    except (ArtifactError, DeviceError) as error:
        raise ReleaseRefused(code or error.code, error.message) from error


class Installer:
    """The steps, over one state folder."""

    def __init__(self, config: AgentConfig, store: StateStore, slots: SlotStore, facts: DeviceFacts) -> None:
        self._config = config
        self._store = store
        self._slots = slots
        self._facts = facts
        self._parts = config.state_path / "parts"
        self.failed_deltas: list[EdgekitError] = []
        """Of this installation, for the report."""
        self.delta_saved_bytes = 0

    def enter(self, phase: Phase, plan: Plan) -> None:
        """Write down what is about to be done."""
        state = self._store.state
        before = state.attempts if state.intent in {"", plan.intent} else 0
        attempt = next_attempt(state.attempt, plan.release.manifest_digest, phase, self.parts_bytes())
        self._store.update(
            phase=phase,
            intent=plan.intent,
            attempts=before + 1 if phase == "selftest" else before,
            step="",
            attempt=attempt,
        )
        logger.info("event=step phase=%s release=%s slot=%s", phase, plan.intent, plan.slot)
        checkpoint(phase)

    def settle(self) -> None:
        """Nothing is being done any more."""
        self._store.update(phase="idle", intent="", attempts=0, step="", attempt=None)

    def parts_bytes(self) -> int:
        """What has been downloaded."""
        return sum(path.stat().st_size for path in self._parts.iterdir()) if self._parts.is_dir() else 0

    def precheck(self, plan: Plan, contents: Contents) -> None:
        """What can be known before the download: the contract with the clients, and memory. Disk, runtime: beside it.

        Raises:
            ReleaseRefused: ``precheck.contract``, naming what changed.
            DeviceError: ``precheck.memory``, for as long as the memory is short.
        """
        self._store.update(step="precheck")
        checkpoint("precheck")
        self._check_contract(plan, contents.manifest)
        needed, free = needed_ram_mb(contents.manifest, contents.variant), memory_free_bytes() / MEGA
        if needed and self._config.selftest.ram_factor and free < needed:
            raise DeviceError(
                "precheck.memory",
                f"{plan.intent}: its self-test needs {needed:g} MB of memory and {free:.0f} MB are free.",
                hint="The agent tries again by itself; end other programs, or publish a smaller variant.",
            )

    def _check_contract(self, plan: Plan, manifest: Manifest) -> None:
        active = active_slot(self._store.state)
        if active is None or self._config.allow_contract_change or plan.release.info.allows_contract_change:
            return
        try:
            serving = self._slots.read_manifest(active)
        except (DeviceError, ArtifactError):
            return  # it is found damaged elsewhere
        if serving.name == manifest.name and (changes := contract_changes(serving.contract, manifest.contract)):
            raise ReleaseRefused(
                "precheck.contract",
                f"{plan.intent}: clients of {active.model}@{active.version} would break: {'; '.join(changes)}. "
                "Set allow_contract_change = true where they are ready for it.",
            )

    def read(self, plan: Plan, data: bytes) -> Contents:
        """Understand a manifest.

        Raises:
            ReleaseRefused: it is damaged, not what metadata says, or nothing in it runs here.
            TrustError: ``release.recalled``: for as long as the recall stands.
        """
        with _final():
            manifest = parse_manifest(data, name=plan.release.manifest_path)
            check_manifest(manifest, plan.release)
            variant = choose_variant(manifest, self._facts)
            refs = needed_blobs(manifest, variant)
            find_identities(refs, self._config.age_identity, name=plan.intent)
        opened = opened_variant(manifest, variant)
        recall = find_recall(self._store.state.recalls, (plan.release.manifest_digest, variant.model, opened.model))
        if recall is not None:
            raise TrustError("release.recalled", f"{plan.intent}: was recalled: {recall.reason}.")
        return Contents(manifest=manifest, manifest_bytes=data, variant=opened, refs=refs)

    def fetch(self, plan: Plan, source: Source) -> Contents:
        """Fetch the manifest, check that it fits, then fetch the blobs that are not here yet.

        Raises:
            ReleaseRefused: as :meth:`read`.
            DeviceError: ``device.disk_full``.
            EdgekitError: what the source raises.
        """
        contents = self.read(plan, source.fetch_manifest(plan.release))
        self.precheck(plan, contents)
        with self._reclaiming(plan):
            make_folder(self._parts, mode=0o700)
            missing = [ref for ref in contents.refs if not self._find(ref, plan.slot)]
            self._drop_parts(keep=missing)
            self._check_disk(plan, contents.refs, missing)
            for ref in missing:
                if not self._apply_delta(plan, ref, source):
                    self._check_metered(ref)
                    source.fetch_blob(ref, self._parts)
                checkpoint("fetched_blob")
        return contents

    def _check_metered(self, ref: BlobRef) -> None:
        """Where bytes cost money, a whole model is never fetched unasked; small blobs and what came already go on."""
        config = self._config
        if not config.metered or config.metered_full or ref.role != "model" or ref.size_bytes <= config.metered_limit_bytes:
            return
        raise DeviceError(
            "device.metered",
            f"{ref.path}: {ref.size_bytes} bytes over a metered link, no usable delta; not fetched.",
            hint="Set metered_full = true, bring it on a stick, or wait for another link.",
        )

    def _apply_delta(self, plan: Plan, ref: BlobRef, source: Source) -> bool:
        """Make a blob from one that is here already, where the release says how; a failure is remembered.

        Returns:
            Whether the blob lies in the parts now, verified.
        """
        if self._part(ref).is_file():
            return True
        for delta in plan.release.info.deltas:
            if delta.target != ref.digest or delta.digest in self._store.state.failed_deltas:
                continue
            base = self._slots.find(delta.base)
            if base is None:
                continue
            path = source.fetch_blob(
                BlobRef(path=f"{ref.path} (delta)", role="model", digest=delta.digest, size_bytes=delta.size_bytes), self._parts
            )
            try:
                make_from_delta(path, base, self._part(ref), delta, size_bytes=ref.size_bytes)
            except (ArtifactError, TrustError, DeviceError) as error:
                logger.warning("event=delta_failed delta=%s code=%s error=%r", delta.digest, error.code, error.message)
                if error.code == "device.disk_full":
                    raise
                kept = (*self._store.state.failed_deltas, delta.digest)[-MAX_FAILED_DELTAS:]
                self._store.update(failed_deltas=kept)
                self.failed_deltas.append(error)
            else:
                logger.info("event=delta_applied blob=%s bytes=%d of=%d", ref.path, delta.size_bytes, ref.size_bytes)
                self.delta_saved_bytes += ref.size_bytes - delta.size_bytes
                return True
            finally:
                path.unlink(missing_ok=True)
        return False

    def _find(self, ref: BlobRef, target: SlotName) -> SlotName | None:
        """A slot other than the target that holds the blob."""
        donor: SlotName = "a" if target == "b" else "b"
        return donor if self._slots.has_blob(donor, ref) else None

    def _part(self, ref: BlobRef) -> Path:
        return self._parts / hex_of(ref.digest)

    def _drop_parts(self, *, keep: Sequence[BlobRef]) -> None:
        names = {hex_of(ref.digest) for ref in keep}
        for path in self._parts.iterdir():
            if path.name.split(".")[0] not in names:
                path.unlink(missing_ok=True)

    def _check_disk(self, plan: Plan, refs: Sequence[BlobRef], missing: Sequence[BlobRef]) -> None:
        """Refuse early what cannot fit; give the other slot up first where that makes the difference."""
        have = sum(path.stat().st_size for path in self._parts.iterdir())
        opening = max((ref.sealed.size_bytes for ref in missing if ref.sealed), default=0)  # both lie there for a moment
        copied = sum(content_of(ref).size_bytes for ref in refs if ref not in missing)  # from the other slot
        needed = sum(ref.size_bytes for ref in missing) + copied + opening - have + self._config.disk_reserve_bytes
        free = disk_free_bytes(self._parts)
        if free >= needed:
            return
        if free + self._slots.size_bytes(plan.slot) >= needed and active_slot(self._store.state):
            logger.warning("event=slot_given_up slot=%s reason=disk_space", plan.slot)
            self._store.update_slot(Slot(name=plan.slot))
            self._slots.clear(plan.slot)
            free = disk_free_bytes(self._parts)
        if free < needed:
            raise disk_full(self._parts, needed, free)

    @contextmanager
    def _reclaiming(self, plan: Plan) -> Iterator[None]:
        """On a full disk: no half-built slot stays, the space is free again, and the error says what was needed."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise DeviceError("device.disk_error", f"{plan.intent}: {error}.", hint="Check the disk.") from error
            free = disk_free_bytes(self._config.state_path)
            self._discard(plan)
            raise disk_full(self._config.state_path, plan.release.info.installed_bytes, free) from error
        except DeviceError as error:
            if error.code == "device.disk_full":
                self._discard(plan)
            raise

    def _discard(self, plan: Plan) -> None:
        """Give back what an installation took. Freeing comes first: the state file needs space too."""
        self._drop_parts(keep=())
        if slot_of(self._store.state, plan.slot).status == "staging":
            self._slots.clear(plan.slot)
            self._store.update_slot(Slot(name=plan.slot))

    def stage(self, plan: Plan, contents: Contents) -> None:
        """Build the slot from the parts and the other slot's blobs.

        Raises:
            ReleaseRefused: a sealed blob is not for this device, or does not hold what the manifest says.
            DeviceError: ``device.disk_full``.
        """
        donor: SlotName = "a" if plan.slot == "b" else "b"
        with self._reclaiming(plan), self._opening():
            identities = find_identities(contents.refs, self._config.age_identity, name=plan.intent)
            self._store.update_slot(self._describe(plan, contents, "staging"))
            checkpoint("staging")
            parts = [(ref, self._part(ref)) for ref in contents.refs]
            self._slots.build(plan.slot, plan.release, contents.manifest_bytes, parts, donor, identities=identities)

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """What cannot be opened here is refused, and does not stay."""
        try:
            yield
        except (ArtifactError, DeviceError) as error:
            if error.code != DAMAGED_CODE and not error.code.startswith(CURABLE_PREFIX):
                raise
            self._drop_parts(keep=())
            raise ReleaseRefused(error.code, error.message) from error

    def verify(self, plan: Plan, contents: Contents) -> None:
        """Hash the slot as it lies on the disk, then call it verified.

        Raises:
            DeviceError: ``slot.damaged``; the slot is cleared, so that the next try begins with the download.
        """
        try:
            self._slots.read_manifest(self._describe(plan, contents, "staging"))
            self._slots.verify(plan.slot, contents.refs)
        except DeviceError:
            self._store.update_slot(Slot(name=plan.slot))
            self._slots.clear(plan.slot)
            raise
        self._store.update_slot(self._describe(plan, contents, "verified"))

    def _describe(self, plan: Plan, contents: Contents, status: str) -> Slot:
        return Slot(
            name=plan.slot,
            status=status,  # type: ignore[arg-type]
            model=contents.manifest.name,
            version=contents.manifest.version,
            counter=plan.release.info.counter,
            manifest=plan.release.manifest_digest,
            model_digest=contents.variant.model,
            variant=contents.variant.name,
            valid_until=plan.release.info.valid_until,
            fallback=plan.release.info.fallback,
        )

    def contents_of(self, slot: Slot) -> Contents:
        """What a filled slot holds.

        Raises:
            DeviceError: ``slot.damaged``.
        """
        manifest = self._slots.read_manifest(slot)
        for variant in manifest.variants:
            opened = opened_variant(manifest, variant)
            if opened.model == slot.model_digest:
                break
        else:
            raise DeviceError("slot.damaged", f"slot {slot.name}: its manifest has no variant {slot.model_digest}.")
        data = (self._slots.path(slot.name) / "manifest.json").read_bytes()
        return Contents(manifest=manifest, manifest_bytes=data, variant=opened, refs=needed_blobs(manifest, variant))

    def model_of(self, slot: Slot) -> Model:
        """What a worker needs to serve a slot; every blob is hashed first.

        Raises:
            DeviceError: ``slot.damaged``.
        """
        contents = self.contents_of(slot)
        self._slots.verify(slot.name, contents.refs)
        return Model(manifest=contents.manifest, variant=contents.variant, blob_dir=str(self._slots.blob_dir(slot.name)))

    def switch(self, plan: Plan) -> None:
        """Make the slot the active one, in one write: on probation, or with its floor raised where there is none."""
        state = self._store.state
        info = plan.release.info
        slot = msgspec.structs.replace(
            slot_of(state, plan.slot),
            status="active",
            counter=info.counter,
            valid_until=info.valid_until,
            fallback=info.fallback,
        )
        before = active_slot(state)
        slots = {slot.name: slot}
        if before and before.name != slot.name:
            slots[before.name] = msgspec.structs.replace(before, status="good")
        is_new = before is None or before.name != slot.name
        is_trial = self._config.probation.is_on and is_new
        self._store.update(
            slots=tuple(slots.get(old.name, old) for old in state.slots),
            active=slot.name,
            floors=state.floors if is_trial else _raised(state.floors, slot),
            probation=_trial(slot) if is_trial else None,
        )
        if not is_trial:
            self._slots.end_trial(slot.name)
        checkpoint("switched")


def _trial(slot: Slot) -> Probation:
    assert slot.manifest is not None
    return Probation(slot=slot.name, manifest=slot.manifest, counter=slot.counter)


def _raised(floors: Floors, slot: Slot) -> Floors:
    releases = floors.releases | {slot.model: max(slot.counter, floors.releases.get(slot.model, 0))}
    return msgspec.structs.replace(floors, releases=releases)


def commit(store: StateStore, slots: SlotStore, outcome: Outcome) -> None:
    """End a probation well, in one write: the floor is raised, and the report of it waits to be stored."""

    def change(state: AgentState) -> AgentState:
        active = active_slot(state)
        assert active is not None and state.probation is not None  # noqa: PT018 - one claim
        return msgspec.structs.replace(
            state,
            floors=_raised(state.floors, active),
            probation=None,
            step="",
            outcomes=new_outcome(state, outcome),
        )

    checkpoint("committing")
    state = store.transform(change)
    checkpoint("committed")
    if state.active is not None:
        slots.end_trial(state.active)


def settle_trials(store: StateStore, slots: SlotStore) -> None:
    """Take the marks away that an interruption left on slots that were committed."""
    state = store.state
    for slot in state.slots:
        is_trial = state.probation is not None and state.probation.slot == slot.name
        if slot.status in {"active", "good"} and not is_trial:
            slots.end_trial(slot.name)
