"""Alerts, their timeline, silences, and what is to be delivered. A transition and its deliveries are one transaction."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, String, Table, Text, UniqueConstraint

from edgekit.fleet.tables import metadata

alerts = Table(
    "alerts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("key", String(1000), nullable=False),
    Column("rule", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("level", String(16), nullable=False),
    Column("model", String(64), nullable=False, default=""),
    Column("fired_ms", BigInteger, nullable=False),
    Column("resolved_ms", BigInteger, nullable=False, default=0),
    Column("record", LargeBinary, nullable=False),
)
Index("alerts_by_state", alerts.c.state, alerts.c.level)
Index("alerts_by_key", alerts.c.key, alerts.c.id)

alert_events = Table(
    "alert_events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("alert_id", ForeignKey("alerts.id"), nullable=False),
    Column("time_ms", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("what", String(64), nullable=False),
    Column("detail", String(2000), nullable=False),
)
Index("alert_events_by_alert", alert_events.c.alert_id, alert_events.c.id)

silences = Table(
    "silences",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("matchers", Text, nullable=False),
    Column("from_ms", BigInteger, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
    Column("daily", String(16), nullable=False),
    Column("by", String(200), nullable=False),
    Column("why", String(2000), nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("alert_id", Integer, nullable=False, default=0),
    Column("contact", String(64), nullable=False),
    Column("channel", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("number", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_ms", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("error", String(500), nullable=False, default=""),
    UniqueConstraint("alert_id", "number", "contact", "channel"),
)
Index("deliveries_by_status", deliveries.c.status, deliveries.c.next_ms)
