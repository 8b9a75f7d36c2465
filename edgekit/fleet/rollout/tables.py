"""Rollouts, their devices, and what was signed for each device. A row is written before what it says is sent."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, LargeBinary, String, Table

from edgekit.fleet.tables import metadata

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("model", String(64), nullable=False),
    Column("manifest", String(80), nullable=False),
    Column("state", String(16), nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("progress", LargeBinary, nullable=False),
    Column("readings", LargeBinary, nullable=True),
    Column("waits_for", String(500), nullable=False, default=""),
    Column("created_ms", BigInteger, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("updated_ms", BigInteger, nullable=False),
)
Index("rollouts_by_model", rollouts.c.model, rollouts.c.state)

rollout_devices = Table(
    "rollout_devices",
    metadata,
    Column("rollout_id", ForeignKey("rollouts.id"), primary_key=True),
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("position", Float, nullable=False),
    Column("stage", String(16), nullable=False),
    Column("asked_ms", BigInteger, nullable=False, default=0),
    Column("asked_event", BigInteger, nullable=False, default=0),
    Column("previous_counter", BigInteger, nullable=False, default=0),
    Column("previous_manifest", String(80), nullable=False, default=""),
    Column("detail", String(500), nullable=False, default=""),
)
Index("rollout_devices_by_stage", rollout_devices.c.rollout_id, rollout_devices.c.stage)

desired = Table(
    "desired",
    metadata,
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("models", LargeBinary, nullable=False),
    Column("policy", LargeBinary, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("published_seq", BigInteger, nullable=False, default=0),
)
Index("desired_by_expiry", desired.c.expires_ms)

experiments = Table(
    "experiments",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("model", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("judgement", LargeBinary, nullable=True),
    Column("began_ms", BigInteger, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("ended_ms", BigInteger, nullable=False, default=0),
    Column("reason", String(2000), nullable=False, default=""),
)

experiment_devices = Table(
    "experiment_devices",
    metadata,
    Column("experiment_id", ForeignKey("experiments.id"), primary_key=True),
    Column("device_id", ForeignKey("devices.id"), primary_key=True),
    Column("arm", String(16), nullable=False),
)
