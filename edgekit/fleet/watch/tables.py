"""Tables of the watch: what the ingest marks as changed, the references, sums by interval, detectors' states, findings.

Everything here follows from ``model_windows`` and can be made again from it. ``window_marks`` is written by the ingest in the
transaction of the windows themselves and only ever appended to, so that several ingesting servers never wait for each other;
the watch deletes the marks that it has seen, by id, in the transaction that writes what it made of them.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, LargeBinary, String, Table, UniqueConstraint

from edgekit.fleet.tables import metadata

MARK_MS = 10_000
"""Time is marked in steps of this."""

window_marks = Table(
    "window_marks",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("model_digest", String(16), nullable=False),
    Column("start_ms", BigInteger, nullable=False),
    Column("end_ms", BigInteger, nullable=False),
)

watch_profiles = Table(
    "watch_profiles",
    metadata,
    Column("crc", BigInteger, primary_key=True),
    Column("model_digest", String(16), primary_key=True),
    Column("model", String(64), nullable=False),
    Column("version", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("labels", LargeBinary, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("added_ms", BigInteger, nullable=False),
)

watches = Table(
    "watches",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("model", String(64), nullable=False),
    Column("crc", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("frontier_ms", BigInteger, nullable=False),
    Column("interval_ms", BigInteger, nullable=False),
    Column("updated_ms", BigInteger, nullable=False),
    Column("state", LargeBinary, nullable=True),
    UniqueConstraint("model", "crc"),
)

watch_intervals = Table(
    "watch_intervals",
    metadata,
    Column("watch_id", ForeignKey("watches.id"), primary_key=True),
    Column("slice", String(200), primary_key=True),
    Column("start_ms", BigInteger, primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("latency", LargeBinary, nullable=True),
    sqlite_with_rowid=False,
)
Index("watch_intervals_by_time", watch_intervals.c.watch_id, watch_intervals.c.start_ms)

watch_facts = Table(
    "watch_facts",
    metadata,
    Column("watch_id", ForeignKey("watches.id"), primary_key=True),
    Column("start_ms", BigInteger, primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("evidence", LargeBinary, nullable=True),
)

watch_snapshots = Table(
    "watch_snapshots",
    metadata,
    Column("watch_id", ForeignKey("watches.id"), primary_key=True),
    Column("frontier_ms", BigInteger, primary_key=True),
    Column("state", LargeBinary, nullable=False),
)

watch_findings = Table(
    "watch_findings",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("watch_id", ForeignKey("watches.id"), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("slice", String(200), nullable=False),
    Column("stream", String(200), nullable=False),
    Column("since_ms", BigInteger, nullable=False),
    Column("noticed_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    Column("effect", Float, nullable=True),
    Column("evidence", Float, nullable=True),
    Column("text", String(500), nullable=False),
)
Index("watch_findings_by_watch", watch_findings.c.watch_id, watch_findings.c.ended_ms)

watch_settings = Table(
    "watch_settings",
    metadata,
    Column("model", String(64), primary_key=True),
    Column("alarms", Float, nullable=False),
    Column("days", Float, nullable=False),
    Column("effect_floor", Float, nullable=False),
    Column("interval_s", Integer, nullable=False),
    Column("slices", String(1000), nullable=False),
)
