"""The audit log: who did what to a repository, each entry bound to the one before by its digest.

One JSON line an entry in ``audit.jsonl``. The newest entry's digest goes into the snapshot metadata, which is signed: cutting
the log off behind an entry that was published shows, as does changing one in the middle, and nothing more is published then.

    >>> read_log(Path("repository"))[-1].action  # doctest: +SKIP
    'publish'
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edgekit.durable import sync_folder
from edgekit.errors import TrustError
from edgekit.schema.base import Record
from edgekit.schema.digest import digest_bytes, short

AUDIT_FILE = "audit.jsonl"
ACTOR_VARIABLE = "EDGEKIT_ACTOR"
SNAPSHOT_FIELD = "x-edgekit-audit"


class AuditEntry(Record, frozen=True, kw_only=True):
    """One act. ``previous`` is the digest of the entry before, empty for the first."""

    seq: int
    at: datetime
    actor: str
    action: str
    subject: str
    previous: str
    details: dict[str, str] = {}  # noqa: RUF012 - msgspec copies it


def _encode(entry: AuditEntry) -> bytes:
    return msgspec.json.encode(entry, order="deterministic")


def entry_digest(entry: AuditEntry) -> str:
    """What the next entry is bound to."""
    return digest_bytes(_encode(entry))


def actor() -> str:
    """Who acts: ``EDGEKIT_ACTOR`` (a pipeline's name), else the user's login name."""
    named = os.environ.get(ACTOR_VARIABLE, "")
    if named:
        return named[:128]
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def read_log(folder: Path) -> tuple[AuditEntry, ...]:
    """The log of a repository, its chain verified; a last line that a power cut tore is no entry.

    Raises:
        TrustError: ``audit.broken`` naming the line.
    """
    entries, _ = _read(folder)
    return entries


def _read(folder: Path) -> tuple[tuple[AuditEntry, ...], int]:
    """The entries, and how many bytes they take."""
    path = folder / AUDIT_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return (), 0
    whole = data[: data.rfind(b"\n") + 1]
    entries: list[AuditEntry] = []
    previous = ""
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = msgspec.json.decode(line, type=AuditEntry)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _broken(path, number, f"cannot be read: {error}") from error
        if (entry.seq, entry.previous) != (number, previous) or _encode(entry) != line:
            raise _broken(path, number, "does not continue the line before; an entry was changed, added or removed")
        entries.append(entry)
        previous = entry_digest(entry)
    return tuple(entries), len(whole)


def _broken(path: Path, number: int, why: str) -> TrustError:
    return TrustError("audit.broken", f"{path}:{number}: this line {why}.", hint="Restore the log from its backup.")


def append(folder: Path, action: str, subject: str, *, now: datetime, details: Mapping[str, str] | None = None) -> AuditEntry:
    """Add an entry, durably; the caller holds the repository's lock.

    Raises:
        TrustError: ``audit.broken``: nothing is added to a log that was tampered with.
    """
    entries, size = _read(folder)
    entry = AuditEntry(
        seq=len(entries) + 1,
        at=now.astimezone(UTC),
        actor=actor(),
        action=action,
        subject=subject,
        previous=entry_digest(entries[-1]) if entries else "",
        details=dict(details or {}),
    )
    descriptor = os.open(folder / AUDIT_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "r+b") as file:
        file.truncate(size)
        file.seek(size)
        file.write(_encode(entry) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if not entries:
        sync_folder(folder)  # the name of a new log: signed metadata will speak of it
    return entry


def check_anchor(entries: tuple[AuditEntry, ...], field: object) -> None:
    """Compare the log with what the signed snapshot says of it.

    Args:
        entries: of :func:`read_log`.
        field: the snapshot's field ``x-edgekit-audit``; None in repositories from before the log.

    Raises:
        TrustError: ``audit.cut`` or ``audit.broken``.
    """
    if not isinstance(field, dict):
        return
    seq, digest = int(field.get("seq", 0)), str(field.get("digest", ""))
    if seq > len(entries):
        raise TrustError(
            "audit.cut",
            f"the audit log ends with entry {len(entries)}, the signed snapshot knows entry {seq} (sha256:{short(digest)}…).",
            hint="Entries were removed from its end. Restore the log from its backup; where there is none, go on with "
            '"edgekit repo audit --accept-loss REASON", which writes the loss down.',
        )
    if seq and entry_digest(entries[seq - 1]) != digest:
        raise TrustError(
            "audit.broken",
            f"entry {seq} of the audit log is not the one that the signed snapshot knows.",
            hint="It was rewritten.",
        )


def anchor(entry: AuditEntry) -> dict[str, object]:
    """What the snapshot says of the log."""
    return {"seq": entry.seq, "digest": entry_digest(entry)}
