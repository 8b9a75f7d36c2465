"""Small files of a stick: bounded, never through a link; needs nothing but the standard library."""

from __future__ import annotations

import os
from pathlib import Path

from edgekit.errors import DeviceError, TrustError


def unreadable(path: Path, error: OSError) -> DeviceError:
    """A stick that was pulled out, or has gone bad."""
    return DeviceError("stick.unreadable", f"{path}: cannot be read: {error.strerror or error}.", hint="Plug it in again.")


def read_bounded(path: Path, limit: int) -> bytes:
    """A small file of the stick; never a link, never more than ``limit`` bytes.

    Raises:
        TrustError: ``trust.length``.
        DeviceError: ``stick.unreadable``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > limit:
        raise TrustError("trust.length", f"{path.name}: longer than the {limit} bytes that it may have.")
    return data
