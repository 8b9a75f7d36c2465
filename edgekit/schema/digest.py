"""SHA-256 digests, written ``sha256:<64 hex digits>``."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated

import msgspec

Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
CHUNK_BYTES = 1 << 20


def digest_bytes(data: bytes | memoryview) -> str:
    """The digest of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file, read in chunks."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return "sha256:" + state.hexdigest()


def hex_of(digest: str) -> str:
    """The 64 hex digits of a digest."""
    return digest.removeprefix("sha256:")


def short(digest: str) -> str:
    """The first 12 hex digits, for people."""
    return hex_of(digest)[:12]


def is_same_digest(left: str, right: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(left, right)
