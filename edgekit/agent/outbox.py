"""The spool: every stored message is on disk before it is sent, and leaves only when the broker has accepted it.

One SQLite file in WAL mode. A row is one message of one (boot, seq); windows are kept one by one, so that the backlog can be
sent many windows a message. Events and states are written with a full sync, windows without (a power cut may cost the last
second of windows, never an event and never the file).

A damaged file is set aside; where there can be no file (a full disk at the start) the spool is a small one in memory.

Over the byte cap the oldest windows go first, then states that a newer one replaces, then the oldest events; how many went,
and which, is told by a ``messages_dropped`` event, so that the server's gaps have a reason.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

Kind = Literal["birth", "rep", "ev", "w"]
ROW_OVERHEAD_BYTES = 64
DROP_FRACTION = 0.25
MEMORY_BYTES = 1 << 20
_SCHEMA = """
create table if not exists spool (
    id integer primary key autoincrement,
    boot integer not null,
    seq integer not null,
    kind text not null,
    schema integer not null default 0,
    payload blob not null,
    unique (boot, seq)
);
create index if not exists spool_kind on spool (kind, id);
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One message as it lies in the spool."""

    id: int
    boot: int
    seq: int
    kind: Kind
    schema: int
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What the cap cost: how many messages of which boot, and their seq range."""

    boot: int
    kind: Kind
    count: int
    first_seq: int
    last_seq: int


class Outbox:
    """The spool. Used from one thread."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        try:
            self._db, self._count, self._bytes = self._open(path)
        except sqlite3.OperationalError as error:
            logger.error("event=outbox_unusable path=%s error=%r spool=memory", path, str(error))  # noqa: TRY400 - it says all
            self._max_bytes = min(max_bytes, MEMORY_BYTES)
            self._db, self._count, self._bytes = self._open(None)
        except sqlite3.DatabaseError:
            self._set_aside(path)
            self._db, self._count, self._bytes = self._open(path)

    @staticmethod
    def _open(path: Path | None) -> tuple[sqlite3.Connection, int, int]:
        db = sqlite3.connect(":memory:" if path is None else path, isolation_level=None, timeout=5)
        try:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=normal")
            db.execute("pragma cache_size=-256")
            db.execute("pragma wal_autocheckpoint=200")
            db.executescript(_SCHEMA)
            row = db.execute("select count(*), coalesce(sum(length(payload)), 0) from spool").fetchone()
        except sqlite3.Error:
            db.close()
            raise
        if path is not None:
            path.chmod(0o600)
        return db, int(row[0]), int(row[1]) + int(row[0]) * ROW_OVERHEAD_BYTES

    @staticmethod
    def _set_aside(path: Path) -> None:
        """A damaged spool must not stop the agent; it is kept for people to look at."""
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.replace(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))

    @property
    def count(self) -> int:
        """Messages that wait."""
        return self._count

    @property
    def size_bytes(self) -> int:
        """What they take, about."""
        return self._bytes

    def put(self, *, boot: int, seq: int, kind: Kind, payload: bytes, schema: int = 0) -> tuple[int, list[Dropped]]:
        """Store one message.

        Returns:
            Its row id, and what had to go to make room.
        """
        size = len(payload) + ROW_OVERHEAD_BYTES
        dropped = self._make_room(size) if self._bytes + size > self._max_bytes else []
        is_full_sync = kind != "w"
        if is_full_sync:
            self._db.execute("pragma synchronous=full")
        try:
            cursor = self._db.execute(
                "insert into spool (boot, seq, kind, schema, payload) values (?, ?, ?, ?, ?)",
                (boot, seq, kind, schema, payload),
            )
        finally:
            if is_full_sync:
                self._db.execute("pragma synchronous=normal")
        self._count, self._bytes = self._count + 1, self._bytes + size
        return int(cursor.lastrowid or 0), dropped

    def _make_room(self, size: int) -> list[Dropped]:
        """Drop the oldest until a quarter of the cap is free: one loss report stands for many messages."""
        goal = self._bytes + size - self._max_bytes + int(self._max_bytes * DROP_FRACTION)
        freed = 0
        ids: list[tuple[int]] = []
        groups: dict[tuple[int, Kind], list[int]] = {}
        query = (
            "select id, boot, seq, kind, length(payload) from spool where kind in ('w', 'ev') "
            "or kind = 'rep' and id < (select max(id) from spool where kind = 'rep') order by kind desc, id"
        )
        for row_id, boot, seq, kind, length in self._db.execute(query):
            ids.append((row_id,))
            groups.setdefault((boot, kind), []).append(seq)
            freed += length + ROW_OVERHEAD_BYTES
            if freed >= goal:
                break
        self._remove(ids)
        return [
            Dropped(boot=boot, kind=kind, count=len(seqs), first_seq=min(seqs), last_seq=max(seqs))
            for (boot, kind), seqs in groups.items()
        ]

    def _remove(self, ids: Sequence[tuple[int]]) -> None:
        count = size = 0
        self._db.execute("begin")
        try:
            for row_id in ids:
                row = self._db.execute("select length(payload) from spool where id = ?", row_id).fetchone()
                if row is not None:
                    self._db.execute("delete from spool where id = ?", row_id)
                    count, size = count + 1, size + int(row[0]) + ROW_OVERHEAD_BYTES
            self._db.execute("commit")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise
        self._count, self._bytes = self._count - count, self._bytes - size

    def confirm(self, ids: Sequence[int]) -> None:
        """The broker accepted these: forget them."""
        self._remove([(row_id,) for row_id in ids])

    def read(self, *, kinds: Sequence[Kind], after: int = 0, limit: int = 100, boot: int | None = None) -> list[Row]:
        """Waiting messages, oldest first.

        Args:
            kinds: which.
            after: only rows with a greater id.
            limit: at most so many.
            boot: only this boot's; None for all.
        """
        marks = ",".join("?" * len(kinds))
        where = "" if boot is None else " and boot = ?"
        columns = "id, boot, seq, kind, schema, payload"
        query = f"select {columns} from spool where id > ? and kind in ({marks}){where} order by id limit ?"  # noqa: S608 - marks
        values = (after, *kinds, *(() if boot is None else (boot,)), limit)
        return [
            Row(id=r[0], boot=r[1], seq=r[2], kind=r[3], schema=r[4], payload=r[5]) for r in self._db.execute(query, values)
        ]

    def newest_id(self) -> int:
        """The id of the newest message; 0 when nothing waits."""
        return int(self._db.execute("select coalesce(max(id), 0) from spool").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()
