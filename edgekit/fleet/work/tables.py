"""Work orders in the database."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, String, Table

from edgekit.fleet.tables import metadata

work_orders = Table(
    "work_orders",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(16), nullable=False),
    Column("model", String(64), nullable=False),
    Column("manifest", String(80), nullable=False),
    Column("reason", String(2000), nullable=False),
    Column("alert_id", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("worker", String(200), nullable=False),
    Column("taken_ms", BigInteger, nullable=False),
    Column("lease_until_ms", BigInteger, nullable=False),
    Column("finished_ms", BigInteger, nullable=False),
    Column("result", String(4000), nullable=False),
)
Index("work_orders_by_state", work_orders.c.state, work_orders.c.model)
