"""A disk that is full: how to know it, and what to say."""

from __future__ import annotations

import errno
from pathlib import Path

from edgekit.errors import DeviceError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def disk_full(path: Path, needed: int, free: int) -> DeviceError:
    """The error for a disk that cannot take an installation."""
    return DeviceError(
        "device.disk_full",
        f"{path}: {needed} B are needed for the installation and {free} B are free.",
        hint="Free some space on this disk; the agent tries again by itself.",
    )
