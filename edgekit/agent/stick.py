"""A stick as a source of releases: the same interface as the update repository, every byte hashed before it is used."""

from __future__ import annotations

import errno
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.agent.disk import FULL, disk_full
from edgekit.agent.vitals import disk_free_bytes
from edgekit.durable import sync_folder
from edgekit.errors import TrustError
from edgekit.schema.digest import CHUNK_BYTES, digest_bytes, hex_of, short
from edgekit.schema.manifest import BlobRef
from edgekit.schema.release import Release
from edgekit.schema.state import Floors
from edgekit.trust.stick_files import read_bounded, unreadable

if TYPE_CHECKING:
    from edgekit.trust.offline import StickContents


class StickSource:
    """One look at a stick.

    Args:
        folder: of the stick.
        root: the provisioned root metadata.
        floors: what this device has seen.
        model: the model that this device runs.
    """

    def __init__(self, folder: Path, *, root: bytes, floors: Floors, model: str) -> None:
        self._folder, self._root, self._floors, self._model = folder, root, floors, model

    def refresh(self) -> StickContents:
        """Verify the stick's metadata; errors as :func:`edgekit.trust.offline.read_stick`."""
        from edgekit.trust.offline import read_stick  # noqa: PLC0415 - tuf is loaded by those who look at a stick

        return read_stick(self._folder, root=self._root, floors=self._floors, now=datetime.now(UTC), model=self._model)

    def fetch_manifest(self, release: Release) -> bytes:
        """The manifest's verified bytes.

        Raises:
            TrustError: ``trust.digest`` or ``trust.length``.
            DeviceError: ``stick.unreadable``.
        """
        path = self._folder / "targets" / release.manifest_path
        path = path.with_name(f"{hex_of(release.manifest_digest)}.{path.name}")
        data = read_bounded(path, release.manifest_size_bytes)
        if digest_bytes(data) != release.manifest_digest:
            raise TrustError(
                "trust.digest", f"{path.name}: not the manifest that was signed.", hint="The stick is damaged; make it again."
            )
        return data

    def fetch_blob(self, ref: BlobRef, part_dir: Path) -> Path:
        """Copy a blob, hashing it on the way; it gets its name only when its digest is right.

        Raises:
            TrustError: ``trust.digest``.
            DeviceError: ``stick.unreadable`` or ``device.disk_full``.
        """
        source = self._folder / "blobs" / "sha256" / hex_of(ref.digest)
        final = part_dir / hex_of(ref.digest)
        part = part_dir / f"{final.name}.part"
        try:
            found = self._copy(source, part, ref.size_bytes)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in FULL:
                raise disk_full(part_dir, ref.size_bytes, disk_free_bytes(part_dir)) from error
            raise unreadable(source, error) from error
        if found != ref.digest:
            part.unlink(missing_ok=True)
            raise TrustError(
                "trust.digest",
                f"{ref.path} on the stick has sha256:{short(found)}…, the manifest says sha256:{short(ref.digest)}….",
                hint="The stick is damaged; make it again.",
            )
        part.replace(final)
        sync_folder(part_dir)
        return final

    @staticmethod
    def _copy(source: Path, part: Path, size: int) -> str:
        state, left = hashlib.sha256(), size
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file, part.open("wb") as out:
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                state.update(chunk)
                out.write(chunk)
                left -= len(chunk)
            if left or file.read(1):
                raise OSError(errno.EIO, "not of the size that was signed")
            out.flush()
            os.fsync(out.fileno())
        return "sha256:" + state.hexdigest()
