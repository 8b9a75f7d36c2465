"""The device's own log of remote commands: one JSON line each, chained by hashes, never rewritten.

Whoever changes or removes a line in the middle breaks the chain from there on; the end is held by the events that the fleet
stored. When the file reaches its size it is kept as ``audit.log.1`` and the new one goes on with the chain.

    >>> AuditLog(Path("/var/lib/edgekit")).check()  # doctest: +SKIP
    (12, True)
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from edgekit.durable import PRIVATE_FILE, sync_folder
from edgekit.errors import ArtifactError
from edgekit.schema.base import decode_json
from edgekit.schema.command import AuditEntry

FILE = "audit.log"
MAX_BYTES = 1 << 20
_TAIL_BYTES = 8192


def _chain(entry: AuditEntry, before: str) -> str:
    bare = msgspec.json.encode(msgspec.structs.replace(entry, chain=before), order="deterministic")
    return hashlib.sha256(bare).hexdigest()


class AuditLog:
    """The log of one state folder."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / FILE
        self._last: AuditEntry | None = None

    def _read_last(self) -> AuditEntry | None:
        for path in (self.path, self._older):
            entries = _entries(_tail(path))
            if entries:
                return entries[-1]
        return None

    @property
    def _older(self) -> Path:
        return self.path.with_name(f"{FILE}.1")

    def write(
        self,
        what: Literal["received", "refused", "finished"],
        *,
        command_id: str,
        kind: str,
        keyids: tuple[str, ...] = (),
        code: str = "",
        detail: str = "",
    ) -> None:
        """One more line, on the disk before this returns.

        Raises:
            OSError: when the disk refuses: what is not written down is not carried out.
        """
        self._last = self._last or self._read_last()
        entry = AuditEntry(
            number=self._last.number + 1 if self._last else 1,
            at=datetime.now(UTC),
            what=what,
            id=command_id,
            kind=kind,
            keyids=keyids,
            code=code,
            detail=detail[:500],
        )
        entry = msgspec.structs.replace(entry, chain=_chain(entry, self._last.chain if self._last else ""))
        self._rotate()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)
        try:
            is_new = os.fstat(descriptor).st_size == 0
            torn = not is_new and os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + msgspec.json.encode(entry, order="deterministic") + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(self.path.parent)
        self._last = entry

    def _rotate(self) -> None:
        if self.path.is_file() and self.path.stat().st_size >= MAX_BYTES:
            self.path.replace(self._older)

    def read(self) -> list[AuditEntry]:
        """Every line that can be read, the oldest first."""
        return [entry for path in (self._older, self.path) for entry in _entries(_all(path))]

    def check(self) -> tuple[int, bool]:
        """How many lines there are, and whether none was changed, taken out or added in between."""
        entries = self.read()
        lines = sum(data.count(b"\n") for data in (_all(self._older), _all(self.path)))
        is_whole = lines == len(entries)
        for before, entry in zip([None, *entries], entries, strict=False):
            chain = before.chain if before else ""
            is_first = before is None and entry.number > 1 and self._older.exists()  # the chain's beginning was rotated away
            if not is_first and (entry.chain != _chain(entry, chain) or entry.number != (before.number + 1 if before else 1)):
                is_whole = False
        return len(entries), is_whole


def _all(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def _entries(data: bytes) -> list[AuditEntry]:
    """The lines that can be read: one that a power cut tore is skipped."""
    found = []
    for line in data.splitlines():
        try:
            found.append(decode_json(line, AuditEntry))
        except ArtifactError:
            continue
    return found
