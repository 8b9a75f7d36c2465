"""Durable files: a reader sees the old bytes or the new ones, never a part, also after a power cut.

>>> write_durably(Path("timestamp.json"), b"{}")  # doctest: +SKIP
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

TEMPORARY_PREFIX = ".new-"
"""Temporary files begin so; one is left behind only by a power cut in the middle of a write."""


PRIVATE_FILE = 0o600


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
    make_folder(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in (content,) if isinstance(content, bytes) else content:
                file.write(chunk)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sweep_temporaries(folder: Path) -> None:
    """Remove what a power cut left behind; only for the one process that writes into the folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)
