"""Messages into tables: one transaction a batch, each message once by (device, boot, seq).

The rules: a birth opens a boot, and the birth that arrives last is the device's; a death of another boot is ignored; what the
current boot says replaces what an earlier one said, and within a boot the newest wins. A device's clock decides nothing across
boots: many have none that survives a power cut, and start in the past. A window is only read with the metric names that its own
boot declared. A merged window takes the place of those that it stands for. When a device tells that its clock was wrong, what
it stamped before is moved, whether it is here already or comes later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import msgspec
from sqlalchemy import Connection, Table, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from edgekit.errors import ArtifactError
from edgekit.fleet import tables
from edgekit.fleet.admission import MAX_INTEGER, MAX_TIME_MS
from edgekit.fleet.gaps import SeqRanges
from edgekit.schema.message import (
    AnyMessage,
    Birth,
    Death,
    Event,
    Heartbeat,
    InputSample,
    Label,
    MetricSpec,
    Reported,
    Window,
    WindowBatch,
)
from edgekit.telemetry.codec import decode, encode, schema_crc, unpack_values

SPARKLINE_POINTS = 30
DETAIL_CHARACTERS = 2000
MAX_BOOTS_CACHED = 20_000
FAULT_CHARACTERS = 500
NAME_CHARACTERS = 128
MAX_STEPS = 100
"""Jumps of the clock that are kept a boot."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """One decoded message with where it came from and when."""

    site: str
    device: str
    message: AnyMessage
    received_ms: int
    is_retained: bool = False
    """Kept by the broker from some time ago: no sign of life now."""

    @property
    def alive_ms(self) -> int:
        """When the device was last known to live, going by this message; 0 when it says nothing of that."""
        match self.message:
            case Death(is_clean=False):
                return 0
            case Birth(time_ms=time_ms) | Reported(time_ms=time_ms) if self.is_retained:
                return min(self.received_ms, time_ms)
            case _:
                return self.received_ms


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A message of a device that was refused, and why."""

    site: str
    device: str
    error: str
    received_ms: int


_MODEL_COUNTS = ("requests", "errors", "rejected", "samples", "sketched", "labelled", "right")


class Latest(msgspec.Struct, kw_only=True):
    """What a list of devices shows of the newest window, kept beside the device."""

    values: dict[str, float] = {}
    duration_ms: int = 0
    sparkline: list[float | None] = []
    boot: int = 0


@dataclass
class _Boot:
    """A boot that is being received."""

    ranges: SeqRanges
    given_out: int = 0
    late: int = 0
    schema: int = 0
    metrics: tuple[MetricSpec, ...] = ()
    lost: SeqRanges = field(default_factory=SeqRanges)
    """What the device said it gave up."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Jumps of its clock: the last seq before, and milliseconds to add up to there."""
    merged: int = 0
    is_dirty: bool = False

    def correct_ms(self, time_ms: int, seq: int) -> int:
        """A stamp by the clock as it was set right later."""
        return min(MAX_TIME_MS, max(0, time_ms + sum(delta for last, delta in self.steps if seq <= last)))


@dataclass
class Writer:
    """Applies batches. One writer a database; its caches are only right as long as that holds."""

    _ids: dict[tuple[str, str], int] = field(default_factory=dict)
    _boots: dict[tuple[int, int], _Boot] = field(default_factory=dict)
    stored: int = 0
    duplicates: int = 0

    def forget(self) -> None:
        """Drop the caches: after a transaction that was rolled back."""
        self._ids.clear()
        self._boots.clear()

    def apply(self, connection: Connection, batch: Sequence[Received]) -> set[tuple[str, str]]:
        """Write a batch inside the caller's transaction.

        Returns:
            The devices that changed.
        """
        if len(self._boots) > MAX_BOOTS_CACHED:
            self._boots.clear()
        touched: dict[int, int] = {}
        for item in batch:
            device_id = self._device(connection, item)
            touched[device_id] = max(touched.get(device_id, 0), item.alive_ms)
            self._apply_one(connection, device_id, item)
        for device_id, alive_ms in touched.items():
            row = tables.devices
            connection.execute(
                update(row).where(row.c.id == device_id, row.c.last_seen_ms < alive_ms).values(last_seen_ms=alive_ms)
            )
        self._save_boots(connection)
        return {(item.site, item.device) for item in batch}

    @staticmethod
    def note_fault(connection: Connection, fault: Fault) -> None:
        """Count a refused message, and keep why."""
        row = tables.faults
        values = {"error": fault.error[:FAULT_CHARACTERS], "time_ms": fault.received_ms}
        here = (row.c.site == fault.site, row.c.device == fault.device)
        if not connection.execute(update(row).where(*here).values(refused=row.c.refused + 1, **values)).rowcount:
            connection.execute(insert(row).values(site=fault.site, device=fault.device, refused=1, **values))

    def _device(self, connection: Connection, item: Received) -> int:
        key = (item.site, item.device)
        if key not in self._ids:
            row = tables.devices
            found = connection.execute(select(row.c.id).where(row.c.site == item.site, row.c.device == item.device)).scalar()
            if found is None:
                values = {
                    "site": item.site,
                    "device": item.device,
                    "first_seen_ms": item.received_ms,
                    "last_seen_ms": item.alive_ms or item.received_ms,
                }
                primary_key = connection.execute(insert(row).values(**values)).inserted_primary_key
                assert primary_key is not None
                found = primary_key[0]
            self._ids[key] = int(found)
        return self._ids[key]

    def _boot(self, connection: Connection, device_id: int, boot: int) -> _Boot:
        key = (device_id, boot)
        if key not in self._boots:
            row = tables.boots
            found = connection.execute(select(row).where(row.c.device_id == device_id, row.c.boot == boot)).one_or_none()
            if found is None:
                connection.execute(insert(row).values(device_id=device_id, boot=boot, received=msgspec.msgpack.encode([])))
                self._boots[key] = _Boot(ranges=SeqRanges())
            else:
                ranges = msgspec.msgpack.decode(found.received, type=list[tuple[int, int]])
                metrics = msgspec.msgpack.decode(found.metrics, type=tuple[MetricSpec, ...]) if found.metrics else ()
                self._boots[key] = _Boot(
                    ranges=SeqRanges(ranges),
                    given_out=found.given_out,
                    late=found.late,
                    schema=found.schema,
                    metrics=metrics,
                    lost=SeqRanges(msgspec.msgpack.decode(found.lost, type=list[tuple[int, int]]) if found.lost else ()),
                    steps=msgspec.msgpack.decode(found.steps, type=list[tuple[int, int]]) if found.steps else [],
                    merged=found.merged,
                )
        return self._boots[key]

    def _save_boots(self, connection: Connection) -> None:
        row = tables.boots
        for (device_id, number), boot in self._boots.items():
            if boot.is_dirty:
                values = {
                    "received": msgspec.msgpack.encode(boot.ranges.ranges),
                    "given_out": boot.given_out,
                    "late": boot.late,
                    "lost": msgspec.msgpack.encode(boot.lost.ranges) if boot.lost.count else None,
                    "steps": msgspec.msgpack.encode(boot.steps) if boot.steps else None,
                    "merged": boot.merged,
                }
                connection.execute(update(row).where(row.c.device_id == device_id, row.c.boot == number).values(**values))
                boot.is_dirty = False

    def _note(self, boot: _Boot, seq: int, *, is_late: bool = False) -> bool:
        """Count a stored message; False for one that is there already."""
        if not boot.ranges.add(seq):
            self.duplicates += 1
            return False
        boot.is_dirty = True
        boot.late += is_late
        self.stored += 1
        return True

    def _apply_one(self, connection: Connection, device_id: int, item: Received) -> None:
        message = item.message
        match message:
            case Birth():
                self._birth(connection, device_id, message)
            case Death():
                row = tables.devices
                statement = update(row).where(row.c.id == device_id, row.c.boot.in_((message.boot, 0)))
                connection.execute(statement.values(is_connected=False, is_clean_death=message.is_clean))
            case Heartbeat():
                boot = self._boot(connection, device_id, message.boot)
                boot.is_dirty = boot.is_dirty or message.seq > boot.given_out
                boot.given_out = max(boot.given_out, message.seq)
            case WindowBatch():
                self._windows(connection, device_id, message)
            case Event():
                self._event(connection, device_id, message)
            case Reported():
                self._reported(connection, device_id, message)
            case Label():
                self._label(connection, device_id, message)
            case InputSample():
                self._sample(connection, device_id, message)
            case _:
                assert_never(message)

    def _birth(self, connection: Connection, device_id: int, message: Birth) -> None:
        boot = self._boot(connection, device_id, message.boot)
        self._note(boot, message.seq)
        boot.metrics, boot.schema = message.metrics, schema_crc(message.metrics, message.sketches)
        row = tables.boots
        values = {
            "schema": boot.schema,
            "metrics": msgspec.msgpack.encode(message.metrics),
            "sketches": msgspec.msgpack.encode(message.sketches),
        }
        connection.execute(update(row).where(row.c.device_id == device_id, row.c.boot == message.boot).values(**values))
        device = tables.devices
        data = connection.execute(select(device.c.birth).where(device.c.id == device_id)).scalar()
        known = decode(data) if data else None
        if isinstance(known, Birth) and known.boot == message.boot and known.seq > message.seq:
            return
        connection.execute(
            update(device)
            .where(device.c.id == device_id)
            .values(
                boot=message.boot,
                booted_ms=message.time_ms,
                birth=encode(message),
                is_connected=True,
                is_clean_death=False,
            )
        )

    def _windows(self, connection: Connection, device_id: int, batch: WindowBatch) -> None:
        boot = self._boot(connection, device_id, batch.boot)
        rows: list[dict[str, Any]] = []
        models: list[dict[str, Any]] = []
        fresh: list[Window] = []
        for window in batch.windows:
            if window.merged:
                if not self._note_merged(connection, device_id, boot, batch, window):
                    continue
                rows, models = ([each for each in part if not _stands_for(window, each["seq"])] for part in (rows, models))
            elif not self._note(boot, window.seq, is_late=batch.is_late):
                continue
            start_ms = boot.correct_ms(window.start_ms, window.merged[0] if window.merged else window.seq)
            models += _model_rows(window, {"device_id": device_id, "boot": batch.boot, "start_ms": start_ms})
            rows.append(
                {
                    "device_id": device_id,
                    "boot": batch.boot,
                    "seq": window.seq,
                    "start_ms": start_ms,
                    "duration_ms": window.duration_ms,
                    "schema": batch.schema,
                    "model_digest": window.model_digest[:12],
                    "vector": window.values,
                    "sketches": msgspec.msgpack.encode(window.sketches) if any(window.sketches) else None,
                    "is_late": batch.is_late,
                    "merged": msgspec.msgpack.encode(window.merged) if window.merged else None,
                }
            )
            fresh.append(msgspec.structs.replace(window, start_ms=start_ms))
        if rows:
            connection.execute(insert(tables.windows), rows)
        if models:
            connection.execute(insert(tables.model_windows), models)
        if fresh and boot.schema == batch.schema:
            fresh.sort(key=lambda window: window.start_ms)
            self._keep_latest(connection, device_id, batch.boot, boot.metrics, fresh)

    def _note_merged(self, connection: Connection, device_id: int, boot: _Boot, batch: WindowBatch, window: Window) -> bool:
        """Count a window that stands for several; it replaces those of them that are here. False when all are here."""
        pairs = [(window.merged[at], window.merged[at + 1]) for at in range(0, len(window.merged), 2)]
        added = sum(boot.ranges.add_range(first, last) for first, last in pairs)
        if not added:
            self.duplicates += 1
            return False
        total = sum(last - first + 1 for first, last in pairs)
        if added < total:
            for table in (tables.windows, tables.model_windows):
                for first, last in pairs:
                    here = (table.c.device_id == device_id, table.c.boot == batch.boot, table.c.seq.between(first, last))
                    connection.execute(delete(table).where(*here))
        boot.is_dirty = True
        boot.late += added if batch.is_late else 0
        boot.merged += added
        self.stored += 1
        return True

    @staticmethod
    def _keep_latest(
        connection: Connection, device_id: int, boot: int, metrics: Sequence[MetricSpec], fresh: Sequence[Window]
    ) -> None:
        """Keep the newest window's figures beside the device, unless a newer one is there."""
        row = tables.devices
        found = connection.execute(select(row.c.window_ms, row.c.latest, row.c.boot).where(row.c.id == device_id)).one()
        before = msgspec.msgpack.decode(found.latest, type=Latest) if found.latest else Latest()
        if not _is_newer((boot, fresh[-1].start_ms), (before.boot, found.window_ms), found.boot):
            return
        values: dict[str, float] = {}
        sparkline = before.sparkline
        for window in fresh:
            values = _values(window, metrics)
            sparkline = [*sparkline, values.get("latency_p50_ms")][-SPARKLINE_POINTS:]
        latest = Latest(values=values, duration_ms=fresh[-1].duration_ms, sparkline=sparkline, boot=boot)
        statement = update(row).where(row.c.id == device_id)
        connection.execute(statement.values(window_ms=fresh[-1].start_ms, latest=msgspec.msgpack.encode(latest)))

    def _event(self, connection: Connection, device_id: int, message: Event) -> None:
        boot = self._boot(connection, device_id, message.boot)
        if not self._note(boot, message.seq):
            return
        self._learn(connection, device_id, boot, message)
        values = {
            "device_id": device_id,
            "boot": message.boot,
            "seq": message.seq,
            "time_ms": boot.correct_ms(message.time_ms, message.seq),
            "kind": message.kind,
            "detail": message.detail[:DETAIL_CHARACTERS],
            "code": message.code[:64],
            "model": message.model[:64],
            "version": message.version[:64],
            "counter": message.counter,
        }
        try:
            with connection.begin_nested():
                connection.execute(insert(tables.events).values(**values))
        except IntegrityError:
            self.duplicates += 1

    def _learn(self, connection: Connection, device_id: int, boot: _Boot, message: Event) -> None:
        """What an event says of other messages: that they are lost, or that their stamps are wrong."""
        fields = message.fields
        if message.kind == "messages_dropped":
            number = fields.get("boot")
            if isinstance(number, int) and 0 <= number <= MAX_INTEGER:
                of = self._boot(connection, device_id, number)
                for first, last in read_ranges(fields):
                    of.lost.add_range(first, last)
                of.is_dirty = True
        elif message.kind == "clock_stepped" and fields.get("is_correction") is True and len(boot.steps) < MAX_STEPS:
            delta, last_seq = fields.get("delta_ms"), fields.get("last_seq")
            if isinstance(delta, int) and isinstance(last_seq, int) and abs(delta) <= MAX_TIME_MS:
                boot.steps.append((last_seq, delta))
                boot.is_dirty = True
                self._move(connection, device_id, message.boot, last_seq, delta)

    @staticmethod
    def _move(connection: Connection, device_id: int, boot: int, last_seq: int, delta_ms: int) -> None:
        """Correct the stamps that are here already."""
        moved: tuple[tuple[Table, str], ...] = (
            (tables.windows, "start_ms"),
            (tables.model_windows, "start_ms"),
            (tables.events, "time_ms"),
            (tables.labels, "time_ms"),
            (tables.samples, "time_ms"),
        )
        for table, name in moved:
            here = (table.c.device_id == device_id, table.c.boot == boot, table.c.seq <= last_seq)
            right = table.c[name] + delta_ms
            connection.execute(update(table).where(*here, right.between(0, MAX_TIME_MS)).values({name: right}))
        row = tables.devices
        right = row.c.window_ms + delta_ms
        here = (row.c.id == device_id, row.c.boot == boot, right.between(0, MAX_TIME_MS))
        connection.execute(update(row).where(*here).values(window_ms=right))

    def _label(self, connection: Connection, device_id: int, message: Label) -> None:
        boot = self._boot(connection, device_id, message.boot)
        if not self._note(boot, message.seq):
            return
        values = {
            "device_id": device_id,
            "boot": message.boot,
            "seq": message.seq,
            "time_ms": boot.correct_ms(message.time_ms, message.seq),
            "model_digest": message.model_digest[:12],
            "prediction_id": message.prediction_id[:NAME_CHARACTERS],
            "label": message.label[:NAME_CHARACTERS],
            "predicted": message.predicted[:NAME_CHARACTERS],
            "confidence": message.confidence if math.isfinite(message.confidence) else 0.0,
            "is_counted": message.is_counted,
        }
        connection.execute(insert(tables.labels).values(**values))

    def _sample(self, connection: Connection, device_id: int, message: InputSample) -> None:
        boot = self._boot(connection, device_id, message.boot)
        if not self._note(boot, message.seq):
            return
        values = {
            "device_id": device_id,
            "boot": message.boot,
            "seq": message.seq,
            "time_ms": boot.correct_ms(message.time_ms, message.seq),
            "model_digest": message.model_digest[:12],
            "prediction_id": message.prediction_id[:NAME_CHARACTERS],
            "predicted": message.predicted[:NAME_CHARACTERS],
            "confidence": message.confidence if math.isfinite(message.confidence) else 0.0,
            "redacted": ",".join(message.redacted)[:1000],
            "tensors": msgspec.msgpack.encode(message.tensors),
        }
        connection.execute(insert(tables.samples).values(**values))

    def _reported(self, connection: Connection, device_id: int, message: Reported) -> None:
        self._note(self._boot(connection, device_id, message.boot), message.seq)
        row = tables.devices
        found = connection.execute(select(row.c.reported, row.c.boot).where(row.c.id == device_id)).one()
        known = decode(found.reported) if found.reported else None
        if isinstance(known, Reported):
            order = "seq" if known.boot == message.boot else "time_ms"
            new, old = (message.boot, getattr(message, order)), (known.boot, getattr(known, order))
            if not _is_newer(new, old, found.boot):
                return
        active = next((slot for slot in message.slots if slot.name == message.active), None)
        values: dict[str, Any] = {
            "reported": encode(message),
            "reported_ms": message.time_ms,
            "reported_seq": message.seq,
            "model": active.model if active else "",
            "version": active.version if active else "",
            "counter": active.counter if active else 0,
            "model_digest": active.model_digest.removeprefix("sha256:")[:12] if active else "",
        }
        connection.execute(update(row).where(row.c.id == device_id).values(**values))


def _stands_for(window: Window, seq: int) -> bool:
    ends = window.merged
    return any(ends[at] <= seq <= ends[at + 1] for at in range(0, len(ends), 2))


def _model_rows(window: Window, place: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model of a window; a model that is named twice has its first."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for model in window.models:
        counts = {name: getattr(model, name) for name in _MODEL_COUNTS}
        row = (
            place
            | counts
            | {
                "seq": window.seq,
                "duration_ms": window.duration_ms,
                "model_digest": model.model_digest[:12],
                "profile": model.profile,
                "latency": model.latency or (window.sketches[0] if len(window.models) == 1 and window.sketches else None),
                "sketches": msgspec.msgpack.encode(model.sketches) if any(model.sketches) else None,
                "verdicts": msgspec.msgpack.encode(model.verdicts) if model.verdicts else None,
            }
        )
        rows.setdefault((row["model_digest"], model.profile), row)
    return list(rows.values())


def read_ranges(fields: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The sequence numbers that a loss report names; nothing for what makes no sense.

    >>> read_ranges({"ranges": "3-7,9"})
    [(3, 7), (9, 9)]
    >>> read_ranges({"first_seq": 2, "last_seq": 4})
    [(2, 4)]
    """
    text = fields.get("ranges")
    if not isinstance(text, str):
        text = f"{fields.get('first_seq')}-{fields.get('last_seq')}"
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first) <= MAX_INTEGER:
            found.append((int(first), int(last or first)))
    return found


def _is_newer(new: tuple[int, int], old: tuple[int, int], current: int) -> bool:
    """Whether a statement replaces another one.

    Args:
        new: its boot, and its place in time or order.
        old: the same of the one that is kept.
        current: the device's boot by its last birth; its statements win over those of any other.
    """
    if new[0] != old[0] and current in {new[0], old[0]}:
        return new[0] == current
    return new[1] >= old[1]


def _values(window: Window, metrics: Sequence[MetricSpec]) -> dict[str, float]:
    """A window's figures by name, without those that are no numbers."""
    try:
        vector = unpack_values(window.values)
    except ArtifactError:
        return {}
    return {spec.name: value for spec, value in zip(metrics, vector, strict=False) if math.isfinite(value)}
