"""Write a bundle's files into a new folder, by the paths of its manifest: for tools that do not know bundles.

The paths were checked when the bundle was read (letters, digits and ``._+-``, no part begins with a dot), the folder must not
exist, and every file is new: nothing is written outside it, and nothing is replaced. The folder gets its name when all of it is
on the disk; each blob is hashed again on the way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from edgekit.bundle.reader import Bundle
from edgekit.durable import sync_folder
from edgekit.errors import ArtifactError, EnvironmentFault, UsageError
from edgekit.schema.manifest import BlobRef


def unpack_bundle(bundle: Bundle, folder: Path) -> tuple[BlobRef, ...]:
    """Write every blob.

    Args:
        bundle: read, and best verified.
        folder: does not exist yet.

    Returns:
        The blobs that were written; sealed ones stay sealed.

    Raises:
        UsageError: ``unpack.exists``.
        ArtifactError: ``unpack.paths`` when one blob's path is a folder of another's.
        EnvironmentFault: ``unpack.unwritable``.
        TrustError: ``bundle.digest_mismatch`` when the file changed since it was read.
    """
    refs = bundle.manifest.blobs
    _check_paths(bundle, refs)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError:
        raise UsageError("unpack.exists", f"{folder}: exists already; a new folder is wanted.", hint="Give another.") from None
    except OSError as error:
        raise EnvironmentFault("unpack.unwritable", f"{folder}: cannot be made: {error.strerror}.") from error
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for ref in refs:
            _write(bundle, ref, work / ref.path)
        work.chmod(0o755)
        sync_folder(work)
        work.replace(folder)  # the empty folder makes way
        sync_folder(folder.parent)
    except OSError as error:
        raise EnvironmentFault("unpack.unwritable", f"{folder}: cannot be written: {error.strerror}.") from error
    finally:
        if work.exists():
            shutil.rmtree(work, ignore_errors=True)
            folder.rmdir()
    return refs


def _check_paths(bundle: Bundle, refs: tuple[BlobRef, ...]) -> None:
    """A file can not be a folder, too."""
    paths = {ref.path for ref in refs}
    for ref in refs:
        for parent in Path(ref.path).parents:
            if str(parent) in paths:
                raise ArtifactError("unpack.paths", f"{bundle.path.name}: {parent} is a file and a folder in its manifest.")


def _write(bundle: Bundle, ref: BlobRef, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in bundle.chunks(ref.digest):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
