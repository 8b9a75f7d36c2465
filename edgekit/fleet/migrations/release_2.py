"""The tables as releases before alembic had them (schema version 2), frozen: where every upgrade begins. Never changed."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    inspect,
    text,
)

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
    Column("lost", LargeBinary, nullable=True),
    Column("steps", LargeBinary, nullable=True),
    Column("merged", BigInteger, nullable=False, default=0, server_default="0"),
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


def complete(connection: Connection) -> None:
    """Give a database of version 1 what version 2 has more; only columns that may be empty or are numbers were ever added."""
    metadata.create_all(connection)
    found = inspect(connection)
    for table in metadata.sorted_tables:
        known = {column["name"] for column in found.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                kind = column.type.compile(connection.dialect)
                default = "" if column.nullable else " DEFAULT 0 NOT NULL"
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}{default}"))
