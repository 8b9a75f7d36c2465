"""The tables, in SQLAlchemy Core: the same for every database that it speaks to.

Windows are wide: one row a device and window, with the packed metric vector as it travelled. (device, boot, seq) is the key of
everything that is stored, so that a message that comes twice is one row.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql, sqlite

ROLLED_UNTIL = "rolled_until_ms"
"""The key in ``meta`` of the time before which windows are rolled up: who writes one from before marks its hour."""
MIN_PLAUSIBLE_MS = 1_577_836_800_000
"""The year 2020; an earlier stamp is of a clock that was never set."""

metadata = MetaData()


def upsert(table: Table, dialect: str) -> Any:
    """An insert that can say what happens on a conflict, in the database's own words.

    >>> str(upsert(meta, "sqlite").on_conflict_do_nothing())
    'INSERT INTO meta ("key", value) VALUES (:key, :value) ON CONFLICT DO NOTHING'
    """
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("site", String(64), nullable=False),
    Column("device", String(64), nullable=False),
    Column("first_seen_ms", BigInteger, nullable=False),
    Column("last_seen_ms", BigInteger, nullable=False),
    Column("is_connected", Boolean, nullable=False, default=False),
    Column("is_clean_death", Boolean, nullable=False, default=False),
    Column("boot", BigInteger, nullable=False, default=0),
    Column("booted_ms", BigInteger, nullable=False, default=0),
    Column("birth", LargeBinary, nullable=True),
    Column("reported", LargeBinary, nullable=True),
    Column("reported_ms", BigInteger, nullable=False, default=0),
    Column("reported_seq", BigInteger, nullable=False, default=0),
    Column("model", String(64), nullable=False, default=""),
    Column("version", String(64), nullable=False, default=""),
    Column("counter", BigInteger, nullable=False, default=0),
    Column("model_digest", String(16), nullable=False, default=""),
    Column("window_ms", BigInteger, nullable=False, default=0),
    Column("latest", LargeBinary, nullable=True),
    Column("arch", String(64), nullable=False, default="", server_default=""),
    Column("cpu", String(200), nullable=False, default="", server_default=""),
    Column("agent_version", String(64), nullable=False, default="", server_default=""),
    Column("latency_p50_ms", Float, nullable=True),
    Column("latency_p99_ms", Float, nullable=True),
    Column("throughput_per_s", Float, nullable=True),
    Column("error_share", Float, nullable=True),
    Column("errors", BigInteger, nullable=False, default=0, server_default="0"),
    UniqueConstraint("site", "device"),
)
Index("devices_by_model", devices.c.model, devices.c.counter)
Index("devices_by_sight", devices.c.is_connected, devices.c.last_seen_ms)

device_labels = Table(
    "device_labels",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("value", String(256), nullable=False),
)
Index("device_labels_by_value", device_labels.c.key, device_labels.c.value)

device_models = Table(
    "device_models",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("model", String(64), primary_key=True),
    Column("version", String(64), nullable=False),
    Column("counter", BigInteger, nullable=False),
    Column("model_digest", String(16), nullable=False),
    Column("manifest_digest", String(80), nullable=False),
    Column("status", String(16), nullable=False),
)
Index("device_models_by_release", device_models.c.model, device_models.c.version)

boots = Table(
    "boots",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("boot", BigInteger, primary_key=True),
    Column("received", LargeBinary, nullable=False),
    Column("given_out", BigInteger, nullable=False, default=0),
    Column("late", BigInteger, nullable=False, default=0),
    Column("schema", BigInteger, nullable=False, default=0),
    Column("metrics", LargeBinary, nullable=True),
    Column("sketches", LargeBinary, nullable=True),
    Column("lost", LargeBinary, nullable=True),
    Column("steps", LargeBinary, nullable=True),
    Column("merged", BigInteger, nullable=False, default=0, server_default="0"),
    Column("heard_ms", BigInteger, nullable=False, default=0, server_default="0"),
)

schemas = Table(
    "schemas",
    metadata,
    Column("schema", BigInteger, primary_key=True, autoincrement=False),
    Column("metrics", LargeBinary, nullable=False),
    Column("sketches", LargeBinary, nullable=False),
)

windows = Table(
    "windows",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("boot", BigInteger, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("start_ms", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("schema", BigInteger, nullable=False),
    Column("model_digest", String(16), nullable=False),
    Column("vector", LargeBinary, nullable=False),
    Column("sketches", LargeBinary, nullable=True),
    Column("is_late", Boolean, nullable=False),
    Column("merged", LargeBinary, nullable=True),
    sqlite_with_rowid=False,
)
Index("windows_by_time", windows.c.device_id, windows.c.start_ms)

model_windows = Table(
    "model_windows",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("boot", BigInteger, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("model_digest", String(16), primary_key=True),
    Column("profile", BigInteger, primary_key=True),
    Column("start_ms", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("rejected", BigInteger, nullable=False),
    Column("samples", BigInteger, nullable=False),
    Column("sketched", BigInteger, nullable=False),
    Column("labelled", BigInteger, nullable=False),
    Column("right", BigInteger, nullable=False),
    Column("latency", LargeBinary, nullable=True),
    Column("sketches", LargeBinary, nullable=True),
    Column("verdicts", LargeBinary, nullable=True),
    sqlite_with_rowid=False,
)
Index("model_windows_by_time", model_windows.c.model_digest, model_windows.c.start_ms)

rollups = Table(
    "rollups",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("step_ms", BigInteger, primary_key=True),
    Column("start_ms", BigInteger, primary_key=True),
    Column("schema", BigInteger, primary_key=True),
    Column("windows", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("sums", LargeBinary, nullable=False),
    Column("numbers", LargeBinary, nullable=False),
    Column("sketches", LargeBinary, nullable=True),
    sqlite_with_rowid=False,
)

model_rollups = Table(
    "model_rollups",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("step_ms", BigInteger, primary_key=True),
    Column("start_ms", BigInteger, primary_key=True),
    Column("model_digest", String(16), primary_key=True),
    Column("profile", BigInteger, primary_key=True),
    Column("windows", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("rejected", BigInteger, nullable=False),
    Column("samples", BigInteger, nullable=False),
    Column("sketched", BigInteger, nullable=False),
    Column("labelled", BigInteger, nullable=False),
    Column("right", BigInteger, nullable=False),
    Column("latency", LargeBinary, nullable=True),
    Column("sketches", LargeBinary, nullable=True),
    Column("verdicts", LargeBinary, nullable=True),
    sqlite_with_rowid=False,
)
Index("model_rollups_by_time", model_rollups.c.model_digest, model_rollups.c.step_ms, model_rollups.c.start_ms)

rollup_due = Table(
    "rollup_due",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("hour_ms", BigInteger, primary_key=True),
    Column("marks", BigInteger, nullable=False),
)

rollup_floors = Table(
    "rollup_floors",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("windows_ms", BigInteger, nullable=False),
    Column("models_ms", BigInteger, nullable=False),
)

labels = Table(
    "labels",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("boot", BigInteger, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("time_ms", BigInteger, nullable=False),
    Column("model_digest", String(16), nullable=False),
    Column("prediction_id", String(128), nullable=False),
    Column("label", String(128), nullable=False),
    Column("predicted", String(128), nullable=False),
    Column("confidence", Float, nullable=False),
    Column("is_counted", Boolean, nullable=False),
)
Index("labels_by_prediction", labels.c.device_id, labels.c.prediction_id)

samples = Table(
    "samples",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("boot", BigInteger, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("time_ms", BigInteger, nullable=False),
    Column("model_digest", String(16), nullable=False),
    Column("prediction_id", String(128), nullable=False),
    Column("predicted", String(128), nullable=False),
    Column("confidence", Float, nullable=False),
    Column("redacted", String(1000), nullable=False),
    Column("tensors", LargeBinary, nullable=False),
)
Index("samples_by_model", samples.c.model_digest, samples.c.time_ms)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("device_id", ForeignKey("devices.id"), nullable=False),
    Column("boot", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("time_ms", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("detail", String(2000), nullable=False),
    Column("code", String(64), nullable=False),
    Column("model", String(64), nullable=False),
    Column("version", String(64), nullable=False),
    Column("counter", BigInteger, nullable=False),
    UniqueConstraint("device_id", "boot", "seq"),
)
Index("events_by_device", events.c.device_id, events.c.id)
Index("events_by_kind", events.c.kind, events.c.time_ms)

faults = Table(
    "faults",
    metadata,
    Column("site", String(64), primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("refused", BigInteger, nullable=False),
    Column("error", String(500), nullable=False),
    Column("time_ms", BigInteger, nullable=False),
)

groups = Table(
    "groups",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("selector", String(1000), nullable=False),
    Column("note", String(500), nullable=False, default=""),
    Column("created_ms", BigInteger, nullable=False),
)

group_members = Table(
    "group_members",
    metadata,
    Column("group_id", ForeignKey("groups.id"), primary_key=True),
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
)
Index("group_members_by_device", group_members.c.device_id)
