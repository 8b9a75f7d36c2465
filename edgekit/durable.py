"""Durable files: a reader sees the old bytes or the new ones, never a part, also after a power cut.

>>> write_durably(Path("timestamp.json"), b"{}")  # doctest: +SKIP
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

TEMPORARY_PREFIX = ".new-"
"""Temporary files begin so; one is left behind only by a power cut in the middle of a write."""


PRIVATE_FILE = 0o600
_WRITE_BACK_BYTES = 8 << 20


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, *, mode: int = 0o755) -> None:
    """Make a folder and its parents where missing, durably."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    folder.mkdir(mode=mode, exist_ok=True)
    sync_folder(folder.parent)


def write_durably(path: Path, content: bytes | Iterable[bytes], *, mode: int = 0o644) -> None:
    """Write or replace a file: temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file; its folder is made where missing.
        content: the bytes, or chunks of them; an error that they raise leaves the old file, and no temporary one.
        mode: of the new file.

    Raises:
        OSError: when the disk refuses; the old file is as it was, and the temporary one is gone.
    """
    temporary = _write_temporary(path.parent, content, mode)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_durably(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Create a file, whole or not at all, which has its final mode from the first moment on; never replaces one.

    Args:
        path: a file that does not exist yet; its folder is made where missing.
        content: the bytes.
        mode: of the file.

    Raises:
        FileExistsError: something has that name.
        OSError: when the disk refuses; no file is there then.
    """
    temporary = _write_temporary(path.parent, content, mode)
    try:
        _claim(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _claim(temporary: Path, path: Path) -> None:
    """Give a file its name, unless something else has it."""
    try:
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)


def _write_temporary(folder: Path, content: bytes | Iterable[bytes], mode: int) -> Path:
    """A new file with durable content in a folder, which is made where missing; none is left after an error."""
    make_folder(folder)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=TEMPORARY_PREFIX)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            written = 0
            for chunk in (content,) if isinstance(content, bytes) else content:
                file.write(chunk)
                written += len(chunk)
                if written >= _WRITE_BACK_BYTES:  # the disk works while the next chunks come: less is left for the fsync
                    file.flush()
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    written = 0
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sweep_temporaries(folder: Path) -> None:
    """Remove what a power cut left behind; only for the one process that writes into the folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)
