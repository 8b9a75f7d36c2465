"""Durable files: a reader sees the old bytes or the new ones, never a part, also after a power cut.

>>> write_durably(Path("timestamp.json"), [b"{}"])  # doctest: +SKIP
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
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


def write_durably(path: Path, chunks: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Write or replace a file: temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file; its folder is made where missing.
        chunks: the content; an error that they raise leaves the old file, and no temporary one.
        mode: of the new file.
    """
    make_folder(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
