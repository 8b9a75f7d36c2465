"""The two slots on disk: ``slots/{a,b}/`` with ``manifest.json``, ``release.json`` and ``blobs/<hex>``.

The state file says what a slot is; this module only moves bytes. A slot under construction has the status ``staging`` in the
state before its first byte is written, so a half-built slot is never taken for a whole one.

A slot is born with a mark, ``trial``, which is taken away when its model was committed: a state that was lost is rebuilt from
slots that proved themselves. Slots share no file: what damages one leaves the other whole.

A blob that travels sealed lies in a slot opened, under the digest of its content: that is what is hashed and loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from edgekit.bundle.opening import Identities, content_of, open_sealed, opened_variant
from edgekit.durable import PRIVATE_FILE, sync_file, sync_folder, write_durably
from edgekit.errors import ArtifactError, DeviceError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.digest import digest_bytes, digest_file, hex_of, is_same_digest
from edgekit.schema.manifest import BlobRef, Manifest
from edgekit.schema.release import Release
from edgekit.schema.state import Slot, SlotName

MANIFEST_FILE = "manifest.json"
RELEASE_FILE = "release.json"
BLOB_DIR = "blobs"
TRIAL_FILE = "trial"
SLOT_NAMES: tuple[SlotName, ...] = ("a", "b")


class SlotStore:
    """The slots' folders."""

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir / "slots"

    def path(self, name: SlotName) -> Path:
        """A slot's folder."""
        return self._dir / name

    def blob_dir(self, name: SlotName) -> Path:
        """A slot's folder of blobs."""
        return self.path(name) / BLOB_DIR

    def blob(self, name: SlotName, digest: str) -> Path:
        """Where a blob is, or would be."""
        return self.blob_dir(name) / hex_of(digest)

    def size_bytes(self, name: SlotName) -> int:
        """What clearing the slot would free at most."""
        return sum(entry.stat().st_size for entry in self.path(name).rglob("*") if entry.is_file())

    def clear(self, name: SlotName) -> None:
        """Remove everything in a slot."""
        path = self.path(name)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
        if self._dir.is_dir():
            sync_folder(self._dir)

    def build(
        self,
        name: SlotName,
        release: Release,
        manifest: bytes,
        parts: Sequence[tuple[BlobRef, Path]],
        donor: SlotName | None,
        *,
        identities: Identities | None = None,
    ) -> None:
        """Fill an empty slot: blobs are moved or opened from ``parts``, or copied from the ``donor`` slot where it has them.

        Args:
            name: the slot.
            release: signed metadata's record of the release; kept beside the manifest for recovery.
            manifest: the manifest's bytes as they were verified.
            parts: every blob with the file that it was downloaded to.
            donor: the other slot, whose blobs may be copied.
            identities: what opens the parts that are sealed; each is removed once its content is on the disk.

        Raises:
            OSError: when the disk refuses.
            ArtifactError, DeviceError: as :func:`edgekit.bundle.opening.open_sealed`.
        """
        self.clear(name)
        blobs = self.blob_dir(name)
        blobs.mkdir(mode=0o700, parents=True)
        for ref, part in parts:
            target = self.blob(name, content_of(ref).digest)
            if part.is_file() and ref.sealed is not None:
                assert identities is not None, "who has the sealed part has what opens it"
                try:
                    open_sealed(part, target, ref, identities)
                finally:
                    part.unlink()  # a part that does not open is of no use, whatever the reason
            elif part.is_file():
                part.replace(target)
            elif donor is not None and not target.exists():
                shutil.copyfile(self.blob(donor, target.name), target, follow_symlinks=False)
                target.chmod(PRIVATE_FILE)
            sync_file(target)
        sync_folder(blobs)
        (self.path(name) / TRIAL_FILE).touch(mode=PRIVATE_FILE)
        write_durably(self.path(name) / RELEASE_FILE, encode_json(release), mode=PRIVATE_FILE)
        write_durably(self.path(name) / MANIFEST_FILE, manifest, mode=PRIVATE_FILE)
        sync_folder(self._dir)
        sync_folder(self._dir.parent)

    def end_trial(self, name: SlotName) -> None:
        """The slot's model was committed."""
        path = self.path(name) / TRIAL_FILE
        if path.exists():
            path.unlink()
            sync_folder(self.path(name))

    def read_manifest(self, slot: Slot) -> Manifest:
        """The manifest of a slot, checked against the digest that the state has.

        Raises:
            DeviceError: ``slot.damaged``.
        """
        path = self.path(slot.name) / MANIFEST_FILE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(path, f"{error.strerror}; expected the manifest {slot.manifest}") from error
        found = digest_bytes(data)
        if slot.manifest is None or not is_same_digest(found, slot.manifest):
            raise _damaged(path, f"its digest is {found}, the state says {slot.manifest}")
        return decode_json(data, Manifest, name=str(path))

    def has_blob(self, name: SlotName, ref: BlobRef) -> bool:
        """Whether a slot holds an undamaged copy of a blob, opened where it travels sealed."""
        content = content_of(ref)
        path = self.blob(name, content.digest)
        try:
            return not path.is_symlink() and path.stat().st_size == content.size_bytes and digest_file(path) == content.digest
        except OSError:
            return False

    def find(self, digest: str) -> Path | None:
        """A blob by its content's digest, in whichever slot has it; not hashed."""
        for name in SLOT_NAMES:
            path = self.blob(name, digest)
            if path.is_file() and not path.is_symlink():
                return path
        return None

    def verify(self, name: SlotName, refs: Sequence[BlobRef]) -> None:
        """Hash the blobs of a slot.

        Raises:
            DeviceError: ``slot.damaged`` naming the first blob that does not fit.
        """
        for ref in map(content_of, refs):
            if not self.has_blob(name, ref):
                raise _damaged(self.blob(name, ref.digest), f"not the blob {ref.digest} ({ref.path}, {ref.size_bytes} B)")

    def recover(self, name: SlotName) -> Slot | None:
        """What a slot says of itself, if it is whole: for a lost state file only."""
        path = self.path(name)
        try:
            data = (path / MANIFEST_FILE).read_bytes()
            manifest = decode_json(data, Manifest)
            release = decode_json((path / RELEASE_FILE).read_bytes(), Release)
        except (OSError, ArtifactError):
            return None
        refs = {ref.digest: ref for ref in map(content_of, manifest.blobs)}
        present = {entry.name for entry in self.blob_dir(name).iterdir()} if self.blob_dir(name).is_dir() else set()
        for variant in (opened_variant(manifest, each) for each in manifest.variants):
            needed = [refs[digest] for digest in (variant.model, variant.golden) if digest in refs]
            whole = len(needed) == 2 and all(hex_of(ref.digest) in present and self.has_blob(name, ref) for ref in needed)
            if whole and digest_bytes(data) == release.manifest_digest:
                return Slot(
                    name=name,
                    status="verified" if (path / TRIAL_FILE).exists() else "good",
                    model=manifest.name,
                    version=manifest.version,
                    counter=release.info.counter,
                    manifest=release.manifest_digest,
                    model_digest=variant.model,
                    variant=variant.name,
                    valid_until=release.info.valid_until,
                    fallback=release.info.fallback,
                )
        return None


def _damaged(path: Path, detail: str) -> DeviceError:
    return DeviceError(
        "slot.damaged", f"{path}: {detail}.", hint="The agent falls back to the other slot, and fetches the release again."
    )
