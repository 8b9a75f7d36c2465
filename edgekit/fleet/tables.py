"""The tables, in SQLAlchemy Core: the same for every database that it speaks to.

Windows are wide: one row a device and window, with the packed metric vector as it travelled. (device, boot, seq) is the key of
everything that is stored, so that a message that comes twice is one row.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

SCHEMA_VERSION = 1

metadata = MetaData()

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
    UniqueConstraint("site", "device"),
)

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
    sqlite_with_rowid=False,
)
Index("windows_by_time", windows.c.device_id, windows.c.start_ms)

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
