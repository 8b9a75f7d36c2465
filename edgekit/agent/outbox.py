"""The spool: every stored message is on disk before it is sent, and leaves only when the broker has accepted it.

One SQLite file in WAL mode. A row is one message of one (boot, seq); windows are kept one by one, so that the backlog can be
sent many windows a message. Windows and samples are written without a full sync (a power cut may cost the last second of them,
never an event, a state or a label, and never the file).

A damaged file is set aside; where there can be no file (a full disk at the start) the spool is a small one in memory.

Over the byte cap nothing is given up before it is made coarse: the oldest windows are merged by ten, then by sixty. Only when
there is nothing left to merge the least important goes (``DROP_ORDER``), the oldest first: what the broker refused, samples,
windows, states that a newer one replaces, labels, events. What went is told with its sequence numbers, so that the server's
gaps have a reason. The same holds for what outlived its time.

A row that is on its way is neither merged nor dropped: see :attr:`Outbox.held`.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import msgspec

logger = logging.getLogger(__name__)

Kind = Literal["birth", "rep", "ev", "lb", "w", "x"]
ROW_OVERHEAD_BYTES = 64
DROP_FRACTION = 0.25
MERGE_BYTES = 64 << 10
"""What one round of merging frees: small enough not to be felt."""
LEVELS = (10, 60)
"""How many windows a merged one stands for, at most."""
KEEP_FINE = 30
"""So many of the newest windows are never merged: half an hour of minutes."""
MEMORY_BYTES = 1 << 20
BATCH_ROWS = 200
DAY_S = 86400.0
TTL_S: Mapping[Kind, float] = {"ev": 365 * DAY_S, "lb": 90 * DAY_S, "w": 90 * DAY_S, "x": 7 * DAY_S}
"""How long a message is worth sending; births and states are replaced, not outlived."""
EARLIEST_MS = 1_735_689_600_000
"""2025: a stamp before it is of a clock that was not set, and says nothing of age."""
_LIGHT: frozenset[Kind] = frozenset({"w", "x"})
_SCHEMA = """
create table if not exists spool (
    id integer primary key autoincrement,
    boot integer not null,
    seq integer not null,
    kind text not null,
    schema integer not null default 0,
    payload blob not null,
    level integer not null default 0,
    merged blob not null default x'',
    stored_ms integer not null default 0,
    attempts integer not null default 0,
    is_dead integer not null default 0,
    unique (boot, seq)
);
"""
_LATER = {
    "level": "integer not null default 0",
    "merged": "blob not null default x''",
    "stored_ms": "integer not null default 0",
    "attempts": "integer not null default 0",
    "is_dead": "integer not null default 0",
}
_INDICES = """
create index if not exists spool_kind on spool (kind, id);
create index if not exists spool_level on spool (kind, level, id);
"""
_COLUMNS = "id, boot, seq, kind, schema, payload"
DROP_ORDER = (
    "is_dead = 1",
    "kind = 'x'",
    "kind = 'w'",
    "kind = 'rep' and id < (select max(id) from spool where kind = 'rep')",
    "kind = 'lb'",
    "kind = 'ev'",
)
"""What goes first when there is nothing left to merge."""

Merge = Callable[[Sequence[bytes], int], tuple[bytes, tuple[int, ...]] | None]
Reason = Literal["full", "expired", "refused"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One message as it lies in the spool."""

    id: int
    boot: int
    seq: int
    kind: Kind
    schema: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Fine:
    """A window that may be merged."""

    id: int
    boot: int
    seq: int
    schema: int
    payload: bytes
    stored_ms: int


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What was given up: how many messages of which boot and kind, and their sequence numbers as ranges, flat."""

    boot: int
    kind: Kind
    count: int
    ranges: tuple[int, ...]
    reason: Reason = "full"

    @property
    def first_seq(self) -> int:
        """The lowest number."""
        return self.ranges[0]

    @property
    def last_seq(self) -> int:
        """The highest."""
        return self.ranges[-1]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def flatten(seqs: Iterable[int]) -> tuple[int, ...]:
    """Numbers as ranges, flat: first and last of each.

    >>> flatten([5, 1, 2, 3])
    (1, 3, 5, 5)
    """
    ranges: list[int] = []
    for seq in sorted(set(seqs)):
        if ranges and seq == ranges[-1] + 1:
            ranges[-1] = seq
        else:
            ranges += [seq, seq]
    return tuple(ranges)


class Outbox:
    """The spool. Used from one thread."""

    def __init__(
        self, path: Path, *, max_bytes: int, merge: Merge | None = None, ttl_s: Mapping[Kind, float] | None = None
    ) -> None:
        """Open or create it.

        Args:
            path: the file.
            max_bytes: what the messages may take.
            merge: makes one window of several; None drops them instead.
            ttl_s: how long messages are kept, by kind; None is ``TTL_S``.
        """
        self._max_bytes = max_bytes
        self._merge = merge
        self._ttl_s = TTL_S if ttl_s is None else ttl_s
        self.held: set[int] = set()
        """Rows that are on their way to the broker."""
        try:
            self._open(path)
        except sqlite3.OperationalError as error:
            logger.error("event=outbox_unusable path=%s error=%r spool=memory", path, str(error))  # noqa: TRY400 - it says all
            self._max_bytes = min(max_bytes, MEMORY_BYTES)
            self._open(None)
        except sqlite3.DatabaseError:
            self._set_aside(path)
            self._open(path)

    def _open(self, path: Path | None) -> None:
        db = sqlite3.connect(":memory:" if path is None else path, isolation_level=None, timeout=5)
        try:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=normal")
            db.execute("pragma cache_size=-256")
            db.execute("pragma wal_autocheckpoint=200")
            db.executescript(_SCHEMA)
            known = {row[1] for row in db.execute("pragma table_info(spool)")}
            for name in _LATER.keys() - known:  # an older agent's file
                db.execute(f"alter table spool add column {name} {_LATER[name]}")
            db.executescript(_INDICES)
            query = "select count(*), coalesce(sum(length(payload)), 0), coalesce(sum(is_dead), 0) from spool"
            row = db.execute(query).fetchone()
        except sqlite3.Error:
            db.close()
            raise
        if path is not None:
            path.chmod(0o600)
        self._db, self._rows, self._bytes = db, int(row[0]), int(row[1]) + int(row[0]) * ROW_OVERHEAD_BYTES
        self._dead = int(row[2])

    @staticmethod
    def _set_aside(path: Path) -> None:
        """A damaged spool must not stop the agent; it is kept for people to look at."""
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.replace(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))

    @property
    def count(self) -> int:
        """Messages that wait to be sent."""
        return self._rows - self._dead

    @property
    def dead(self) -> int:
        """Messages that the broker refused again and again; they are kept while there is room."""
        return self._dead

    @property
    def size_bytes(self) -> int:
        """What all of them take, about."""
        return self._bytes

    def put(self, *, boot: int, seq: int, kind: Kind, payload: bytes, schema: int = 0) -> tuple[int, list[Dropped]]:
        """Store one message.

        Returns:
            Its row id, and what had to go to make room.
        """
        size = len(payload) + ROW_OVERHEAD_BYTES
        dropped = self._make_room(size) if self._bytes + size > self._max_bytes else []
        is_full_sync = kind not in _LIGHT
        if is_full_sync:
            self._db.execute("pragma synchronous=full")
        try:
            cursor = self._db.execute(
                "insert into spool (boot, seq, kind, schema, payload, stored_ms) values (?, ?, ?, ?, ?, ?)",
                (boot, seq, kind, schema, payload, _now_ms()),
            )
        finally:
            if is_full_sync:
                self._db.execute("pragma synchronous=normal")
        self._rows, self._bytes = self._rows + 1, self._bytes + size
        return int(cursor.lastrowid or 0), dropped

    # --- making room

    def _make_room(self, size: int) -> list[Dropped]:
        """Merge the oldest windows; where that is not enough, drop until a quarter of the cap is free."""
        short = self._bytes + size - self._max_bytes
        if self._merge is not None:
            goal = self._bytes - short - min(MERGE_BYTES, self._max_bytes // 8)
            for level, span in enumerate(LEVELS):
                self._merge_level(level, span, goal)
                if self._bytes <= goal:
                    return []
            if self._bytes + size <= self._max_bytes:
                return []
        return self._drop(self._bytes + size - self._max_bytes + int(self._max_bytes * DROP_FRACTION))

    def _merge_level(self, level: int, span: int, goal: int) -> None:
        """Merge runs of windows of one boot and schema, oldest first, until the spool takes no more than ``goal`` bytes."""
        newest = self._db.execute("select id from spool where kind = 'w' order by id desc limit 1 offset ?", (KEEP_FINE,))
        last = int((newest.fetchone() or (0,))[0])
        run: list[_Fine] = []
        after = spanned = 0
        while self._bytes > goal:
            rows = self._db.execute(
                "select id, boot, seq, schema, payload, merged, stored_ms from spool "
                "where kind = 'w' and level = ? and is_dead = 0 and id > ? and id <= ? order by id limit ?",
                (level, after, last, BATCH_ROWS),
            ).fetchall()
            for row_id, boot, seq, schema, payload, merged, stored_ms in rows:
                after = row_id
                if row_id in self.held:
                    continue
                stands_for = _count(_ranges(merged, seq))
                if run and ((boot, schema) != (run[0].boot, run[0].schema) or spanned + stands_for > span):
                    self._merge_run(run, level + 1)
                    run, spanned = [], 0
                run.append(_Fine(row_id, boot, seq, schema, payload, stored_ms))
                spanned += stands_for
                if spanned >= span:
                    self._merge_run(run, level + 1)
                    run, spanned = [], 0
                if self._bytes <= goal:
                    return
            if len(rows) < BATCH_ROWS:
                return

    def _merge_run(self, run: Sequence[_Fine], level: int) -> None:
        """Put one window in the place of several; a single one only moves up."""
        ids, last = [(row.id,) for row in run], run[-1]
        merged = self._merge([row.payload for row in run], last.schema) if self._merge is not None and len(run) > 1 else None
        if merged is None:
            self._db.executemany(f"update spool set level = {level} where id = ?", ids)  # noqa: S608 - a number
            return
        payload, ranges = merged
        before = sum(len(row.payload) + ROW_OVERHEAD_BYTES for row in run)
        values = (last.id, last.boot, last.seq, last.schema, payload, level, msgspec.msgpack.encode(ranges), last.stored_ms)
        self._db.execute("begin")
        try:
            self._db.executemany("delete from spool where id = ?", ids)
            self._db.execute(
                "insert into spool (id, boot, seq, kind, schema, payload, level, merged, stored_ms) "
                "values (?, ?, ?, 'w', ?, ?, ?, ?, ?)",
                values,
            )
            self._db.execute("commit")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise
        self._rows += 1 - len(run)
        self._bytes += len(payload) + ROW_OVERHEAD_BYTES - before

    def _drop(self, goal: int) -> list[Dropped]:
        """Give up what matters least, oldest first, until so many bytes are free: one report stands for many messages."""
        freed = 0
        ids: list[tuple[int]] = []
        lost: dict[tuple[int, Kind], list[int]] = {}
        seen: set[int] = set()
        for condition in DROP_ORDER:
            query = f"select id, boot, seq, kind, length(payload), merged from spool where {condition} order by id"  # noqa: S608 - ours
            for row_id, boot, seq, kind, length, merged in self._db.execute(query):
                if freed >= goal:
                    break
                if row_id in self.held or row_id in seen:
                    continue
                seen.add(row_id)
                ids.append((row_id,))
                lost.setdefault((boot, kind), []).extend(_ranges(merged, seq))
                freed += length + ROW_OVERHEAD_BYTES
        self._remove(ids)
        return _losses(lost, "full")

    def expire(self, now_ms: int) -> list[Dropped]:
        """Give up what outlived its time.

        Args:
            now_ms: Unix time by a clock that is right; what was stored under a clock that was not set never expires.
        """
        ids: list[tuple[int]] = []
        lost: dict[tuple[int, Kind], list[int]] = {}
        for kind, seconds in self._ttl_s.items():
            rows = self._db.execute(
                "select id, boot, seq, merged from spool where kind = ? and stored_ms between ? and ? order by id",
                (kind, EARLIEST_MS, now_ms - int(seconds * 1000)),
            )
            for row_id, boot, seq, merged in rows:
                if row_id not in self.held:
                    ids.append((row_id,))
                    lost.setdefault((boot, kind), []).extend(_ranges(merged, seq))
        if ids:
            self._remove(ids)
        return _losses(lost, "expired")

    # --- what the broker says

    def _remove(self, ids: Sequence[tuple[int]]) -> None:
        count = size = dead = 0
        self._db.execute("begin")
        try:
            for row_id in ids:
                row = self._db.execute("select length(payload), is_dead from spool where id = ?", row_id).fetchone()
                if row is not None:
                    self._db.execute("delete from spool where id = ?", row_id)
                    count, size = count + 1, size + int(row[0]) + ROW_OVERHEAD_BYTES
                    dead += int(row[1])
            self._db.execute("commit")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise
        self._rows, self._bytes, self._dead = self._rows - count, self._bytes - size, self._dead - dead

    def confirm(self, ids: Sequence[int]) -> None:
        """The broker accepted these: forget them."""
        self._remove([(row_id,) for row_id in ids])

    def refuse(self, ids: Sequence[int], *, most: int) -> list[Row]:
        """The broker refused these: after ``most`` times they are set aside.

        Returns:
            Those that were set aside now.
        """
        buried = []
        for row_id in ids:
            self._db.execute("update spool set attempts = attempts + 1 where id = ? and is_dead = 0", (row_id,))
            query = f"select {_COLUMNS} from spool where id = ? and is_dead = 0 and attempts >= ?"  # noqa: S608 - ours
            if (row := self._db.execute(query, (row_id, most)).fetchone()) is not None:
                self._db.execute("update spool set is_dead = 1 where id = ?", (row_id,))
                buried.append(_row(row))
        self._dead += len(buried)
        return buried

    def revive(self) -> int:
        """Try what was set aside once more; how many."""
        number = self._db.execute("update spool set is_dead = 0, attempts = 0 where is_dead = 1").rowcount
        self._dead = 0
        return number

    # --- reading

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
        query = f"select {_COLUMNS} from spool where id > ? and is_dead = 0 and kind in ({marks}){where} order by id limit ?"  # noqa: S608 - marks
        values = (after, *kinds, *(() if boot is None else (boot,)), limit)
        return [_row(row) for row in self._db.execute(query, values)]

    def newest_id(self) -> int:
        """The id of the newest message; 0 when nothing waits."""
        return int(self._db.execute("select coalesce(max(id), 0) from spool").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _row(row: tuple[int, int, int, str, int, bytes]) -> Row:
    return Row(id=row[0], boot=row[1], seq=row[2], kind=cast("Kind", row[3]), schema=row[4], payload=row[5])


def _ranges(merged: bytes, seq: int) -> tuple[int, ...]:
    return msgspec.msgpack.decode(merged, type=tuple[int, ...]) if merged else (seq, seq)


def _count(ranges: Sequence[int]) -> int:
    return sum(ranges[at + 1] - ranges[at] + 1 for at in range(0, len(ranges), 2))


def _losses(lost: Mapping[tuple[int, Kind], Sequence[int]], reason: Reason) -> list[Dropped]:
    found = []
    for (boot, kind), flat in lost.items():
        seqs = [seq for at in range(0, len(flat), 2) for seq in range(flat[at], flat[at + 1] + 1)]
        found.append(Dropped(boot=boot, kind=kind, count=len(seqs), ranges=flatten(seqs), reason=reason))
    return found
