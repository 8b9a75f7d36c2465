"""Fills the columns and tables of revision 0003 from what the devices had said before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, text

from edgekit.errors import ArtifactError
from edgekit.fleet.writing import FIGURES, Latest, describe_birth, read_figures, save_labels, save_models
from edgekit.schema.message import AnyMessage, Birth, Reported
from edgekit.telemetry.codec import decode

ROWS = 500


def fill_devices(connection: Connection) -> None:
    """Repeat each device's birth, report and newest window in the columns that can be searched."""
    for item in _rows(connection):
        birth, reported = _read(item["birth"]), _read(item["reported"])
        values: dict[str, Any] = {}
        if isinstance(birth, Birth):
            values |= describe_birth(birth)
            save_labels(connection, item["id"], birth)
        if isinstance(reported, Reported):
            save_models(connection, item["id"], reported)
        if item["latest"]:
            latest = msgspec.msgpack.decode(item["latest"], type=Latest)
            values |= dict(zip(FIGURES, read_figures(latest), strict=True))
        if values:
            pairs = ", ".join(f"{name} = :{name}" for name in values)
            statement = text(f"UPDATE devices SET {pairs} WHERE id = :id")  # noqa: S608 - our own names
            connection.execute(statement, {**values, "id": item["id"]})


def fill_boots(connection: Connection, now_ms: int) -> None:
    """The schemas that boots declared, by their number; every boot counts as heard of now, since nobody wrote down when."""
    declared = text(
        "INSERT INTO schemas (schema, metrics, sketches) SELECT b.schema, b.metrics, b.sketches FROM boots b WHERE b.metrics IS "
        "NOT NULL AND b.sketches IS NOT NULL AND b.device_id = (SELECT MIN(o.device_id) FROM boots o WHERE o.schema = "
        "b.schema AND o.metrics IS NOT NULL AND o.sketches IS NOT NULL) ON CONFLICT DO NOTHING"
    )
    connection.execute(declared)
    connection.execute(text("UPDATE boots SET heard_ms = :now"), {"now": now_ms})


def _rows(connection: Connection) -> Iterator[Mapping[str, Any]]:
    last = 0
    statement = text("SELECT id, birth, reported, latest FROM devices WHERE id > :last ORDER BY id LIMIT :rows")
    while found := connection.execute(statement, {"last": last, "rows": ROWS}).mappings().all():
        yield from (dict(item) for item in found)
        last = found[-1]["id"]


def _read(data: bytes | None) -> AnyMessage | None:
    try:
        return decode(data) if data else None
    except ArtifactError:
        return None
