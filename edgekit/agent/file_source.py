"""A bundle that was handed over as a file, as a source of one release.

A file has no signed metadata: nobody says that it is fresh, which counter it has, or that it was not withdrawn. Either metadata
that this agent verified lists its manifest: then that record decides, floors and all. Or it is signed by a key of
``publisher_keys``: then it must not be older than what was committed here, and it takes the next counter after everything that
this device knows of, so that it stays until something newer is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.agent.background import in_background
from edgekit.agent.config import AgentConfig
from edgekit.agent.plan import active_slot, is_refused, parse_version
from edgekit.agent.units import Unit
from edgekit.bundle.reader import Bundle, read_bundle, verify_bundle
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import ArtifactError, EdgekitError, TrustError, UsageError
from edgekit.schema.base import decode_json
from edgekit.schema.digest import hex_of
from edgekit.schema.manifest import BlobRef, Manifest
from edgekit.schema.release import Release, ReleaseInfo
from edgekit.schema.state import AgentState, Slot
from edgekit.trust.keys import load_public_keys

LOCAL_CHANNEL = "local"


@dataclass(frozen=True, kw_only=True)
class GivenFile:
    """A bundle, whose model it is, what it counts as, and on whose word."""

    bundle: Bundle
    unit: Unit
    release: Release
    authority: str

    def why_not(self, state: AgentState) -> str:
        """Why there is nothing to be installed."""
        info, active = self.release.info, active_slot(state)
        name = f"{info.name}@{info.version}"
        if active is not None and active.manifest == self.release.manifest_digest:
            return f"{name} serves already"
        if state.probation is not None and active is not None:
            return f"{active.model}@{active.version} is on probation; try again when that is over"
        if is_refused(state, self.release.manifest_digest):
            return f'{name} was refused here before; after a rollback by hand: "edgekit agent rollback --allow-again"'
        floor = state.floors.releases.get(info.name, 0)
        if info.counter < floor:
            return f"{name} is release {info.counter}, this device accepts {floor} and newer"
        return f"{name} was recalled, or is older than what serves"


class FileSource:
    """The bundle's blobs, hashed on their way."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def fetch_manifest(self, _release: Release) -> bytes:
        """The manifest's verified bytes."""
        return self._bundle.manifest_bytes

    def fetch_blob(self, ref: BlobRef, part_dir: Path) -> Path:
        """Copy a blob.

        Raises:
            TrustError: ``bundle.digest_mismatch`` when the file has changed since it was read.
            OSError: when the disk refuses.
        """
        final = part_dir / hex_of(ref.digest)
        write_durably(final, self._bundle.chunks(ref.digest), mode=PRIVATE_FILE)
        return final


async def open_file(path: Path, name: str, config: AgentConfig, units: Sequence[Unit]) -> GivenFile:
    """Read a bundle and decide on whose word it may be installed.

    Args:
        path: where it lies.
        name: what it was called, for messages.
        config: the agent's settings.
        units: the models that the agent runs.

    Raises:
        UsageError: ``model.unknown``.
        TrustError: ``bundle.untrusted_key``, ``install.untrusted``, ``install.older`` and whatever the reader refuses.
    """
    try:
        bundle = await in_background(lambda: read_bundle(path), name="bundle")
    except (ArtifactError, TrustError) as error:  # every byte is looked at before anything is done with it
        raise TrustError(error.code, error.message.replace(path.name, name), hint=error.hint) from error
    manifest = bundle.manifest
    unit = next((unit for unit in units if unit.config.model == manifest.name), None)
    if unit is None:
        names = ", ".join(unit.config.model for unit in units if unit.config.model) or "no model"
        raise UsageError("model.unknown", f"{name}: it holds {manifest.name}; this agent runs {names}.")
    offered = await unit.updater.look()
    listed = next((release for release in offered if release.manifest_digest == bundle.manifest_digest), None)
    if listed is not None:
        info = listed.info
        authority = f"The repository's signed metadata lists it as release {info.counter} on {info.channel}."
        return GivenFile(bundle=bundle, unit=unit, release=listed, authority=authority)
    keyids = await in_background(lambda: _check_publisher(path, name, config), name="bundle")
    check_not_older(unit, manifest, name)
    release = local_release(bundle, next_counter(unit, offered))
    authority = (
        f"No repository metadata speaks of it: it was taken on the word of {', '.join(key[:12] for key in keyids)} and of who "
        f"handed it over; it counts as release {release.info.counter}, and a newer one of the repository replaces it."
    )
    return GivenFile(bundle=bundle, unit=unit, release=release, authority=authority)


def _check_publisher(path: Path, name: str, config: AgentConfig) -> tuple[str, ...]:
    keys = load_public_keys(Path(config.publisher_keys)) if config.publisher_keys else ()
    if not keys:
        raise TrustError(
            "install.untrusted",
            f"{name}: no repository metadata lists it, and this device was given no publisher's key.",
            hint="Set publisher_keys to a folder with the publisher's .pub file, or bring the release on a stick.",
        )
    try:
        return verify_bundle(path, keys, is_hashed=False).keyids
    except EdgekitError as error:
        error.message = error.message.replace(path.name, name)
        raise


def check_not_older(unit: Unit, manifest: Manifest, name: str) -> None:
    """Refuse a bundle that is older than what was committed on this device.

    Raises:
        TrustError: ``install.older``.
    """
    floor = unit.store.state.floors.releases.get(manifest.name, 0)
    for slot in unit.store.state.slots:
        is_known = slot.model == manifest.name and (slot.status in {"active", "good"} or 0 < slot.counter <= floor)
        if not is_known or slot.manifest is None:
            continue
        if parse_version(manifest.version) < parse_version(slot.version):
            raise TrustError(
                "install.older",
                f"{name}: {manifest.name}@{manifest.version} is older than {slot.version}, which was installed here.",
                hint='To go back: "edgekit agent rollback", or publish the old release again.',
            )


def _is_local(unit: Unit, slot: Slot) -> bool:
    """Whether a slot came from a file itself."""
    try:
        release = decode_json((unit.slots.path(slot.name) / "release.json").read_bytes(), Release)
    except (OSError, ArtifactError):
        return False
    return release.info.channel == LOCAL_CHANNEL


def next_counter(unit: Unit, offered: Sequence[Release]) -> int:
    """One more than everything that this device knows of; what replaces another file takes its place.

    Otherwise a second file would stand in the way of the release that the repository publishes next.
    """
    state, model = unit.store.state, unit.config.model
    active = active_slot(state)
    known = [state.floors.releases.get(model, 0), *(release.info.counter for release in offered if release.info.name == model)]
    if active is not None and active.model == model:
        if _is_local(unit, active) and active.counter >= max(known):
            return active.counter
        known.append(active.counter)
    return max(known) + 1


def local_release(bundle: Bundle, counter: int) -> Release:
    """What a bundle counts as that no metadata lists."""
    manifest = bundle.manifest
    info = ReleaseInfo(
        name=manifest.name,
        version=manifest.version,
        channel=LOCAL_CHANNEL,
        counter=counter,
        published_at=manifest.created_at,
        installed_bytes=sum(ref.size_bytes for ref in manifest.blobs),
        runtimes=tuple(dict.fromkeys(variant.requires.runtime for variant in manifest.variants)),
        notes="installed by hand from a file",
    )
    return Release(
        info=info,
        manifest_path=f"models/{manifest.name}/{manifest.version}/{LOCAL_CHANNEL}/manifest.json",
        manifest_digest=bundle.manifest_digest,
        manifest_size_bytes=len(bundle.manifest_bytes),
    )
