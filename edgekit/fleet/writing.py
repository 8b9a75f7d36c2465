"""Messages into tables: one transaction a batch, each message once by (device, boot, seq).

The rules: a birth opens a boot, and the birth that arrives last is the device's; a death of another boot is ignored; what the
current boot says replaces what an earlier one said, and within a boot the newest wins. A device's clock decides nothing across
boots: many have none that survives a power cut, and start in the past. A window is only read with the metric names that its own
boot declared. A merged window takes the place of those that it stands for. When a device tells that its clock was wrong, what
it stamped before is moved, whether it is here already or comes later.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import msgspec
from sqlalchemy import Connection, Table, bindparam, delete, func, select, tuple_, update

from edgekit.errors import ArtifactError
from edgekit.fleet import tables
from edgekit.fleet.admission import MAX_INTEGER, MAX_TIME_MS
from edgekit.fleet.bulk import Row, insert_rows
from edgekit.fleet.gaps import SeqRanges
from edgekit.fleet.watch.marks import Marks
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
    SlotReport,
    Window,
    WindowBatch,
)
from edgekit.telemetry.codec import decode, encode, schema_crc, unpack_values

SPARKLINE_POINTS = 30
SPARKLINE_METRIC = "latency_p50_ms"
DETAIL_CHARACTERS = 2000
MAX_IDS_CACHED = 200_000
MAX_SCHEMAS_CACHED = 1000
DIGEST_DIGITS = 12
FIGURES = ("latency_p50_ms", "latency_p99_ms", "throughput_per_s", "error_share", "errors")
"""Columns of a device that repeat its newest window, so that the database can sort and add up."""
FAULT_CHARACTERS = 500
NAME_CHARACTERS = 128
HOUR_MS = 3_600_000
MAX_LATE_HOURS = 24 * 31
MAX_STEPS = 100
"""Jumps of the clock that are kept a boot."""
_FLOAT = struct.Struct("<f")
_NOTHING = msgspec.msgpack.encode([])


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


class Latest(msgspec.Struct, kw_only=True):
    """What a list of devices shows of the newest window, kept beside the device."""

    values: dict[str, float] = {}
    duration_ms: int = 0
    sparkline: list[float | None] = []
    boot: int = 0


_encode = msgspec.msgpack.Encoder().encode
_latest_decoder = msgspec.msgpack.Decoder(Latest)
_ranges_decoder: msgspec.msgpack.Decoder[list[tuple[int, int]]] = msgspec.msgpack.Decoder(list[tuple[int, int]])


class _Metrics:
    """The metrics that a boot declared, and the place of the one that the sparkline shows."""

    __slots__ = ("p50_at", "specs")

    def __init__(self, specs: tuple[MetricSpec, ...] = ()) -> None:
        self.specs = specs
        self.p50_at = next((at for at, spec in enumerate(specs) if spec.name == SPARKLINE_METRIC), -1)


_NO_METRICS = _Metrics()


@dataclass
class _Boot:
    """A boot that is being received."""

    ranges: SeqRanges
    given_out: int = 0
    late: int = 0
    schema: int = 0
    metrics: _Metrics = field(default_factory=lambda: _NO_METRICS)
    lost: SeqRanges = field(default_factory=SeqRanges)
    """What the device said it gave up."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Jumps of its clock: the last seq before, and milliseconds to add up to there."""
    merged: int = 0
    is_dirty: bool = False

    def correct_ms(self, time_ms: int, seq: int) -> int:
        """A stamp by the clock as it was set right later."""
        if not self.steps:
            return time_ms
        return min(MAX_TIME_MS, max(0, time_ms + sum(delta for last, delta in self.steps if seq <= last)))


@dataclass
class _Device:
    """A device's row, as far as messages change it."""

    id: int
    boot: int
    booted_ms: int
    is_connected: bool
    is_clean_death: bool
    last_seen_ms: int
    window_ms: int
    packed: bytes | None
    figures: tuple[float | None, ...] = ()
    latest: Latest | None = None
    is_seen: bool = False
    is_changed: bool = False

    def read_latest(self) -> Latest:
        if self.latest is None:
            self.latest = _latest_decoder.decode(self.packed) if self.packed else Latest()
        return self.latest


@dataclass
class _Pending:
    """Rows that wait for the end of the batch, each in the order of its table's columns."""

    windows: dict[tuple[int, int, int], Row] = field(default_factory=dict)
    models: dict[tuple[int, int, int], list[Row]] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)
    labels: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    marks: Marks = field(default_factory=Marks)

    def drop(self, device_id: int, boot: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Forget the windows of a boot that a merged one stands for."""
        for rows in (self.windows, self.models):
            for key in [key for key in rows if key[:2] == (device_id, boot)]:
                if any(first <= key[2] <= last for first, last in ranges):
                    del rows[key]

    def flush(self, connection: Connection) -> None:
        """Write them all."""
        insert_rows(connection, tables.windows, list(self.windows.values()))
        insert_rows(connection, tables.model_windows, [row for rows in self.models.values() for row in rows])
        insert_rows(connection, tables.events, self.events)
        insert_rows(connection, tables.labels, self.labels)
        insert_rows(connection, tables.samples, self.samples)
        self.marks.flush(connection)
        self.windows, self.models = {}, {}
        self.events, self.labels, self.samples = [], [], []


@dataclass
class Writer:
    """Applies batches.

    What it keeps between them are the numbers of devices' rows and decoded schemas, which never change. Everything else is read
    in the batch's own transaction, in a few statements for the whole batch, with the devices' rows locked in order: so several
    servers may write to one database, and a message that two of them were given is one row.
    """

    _ids: dict[tuple[str, str], int] = field(default_factory=dict)
    _schemas: dict[bytes, _Metrics] = field(default_factory=dict)
    _devices: dict[int, _Device] = field(default_factory=dict)
    _boots: dict[tuple[int, int], _Boot] = field(default_factory=dict)
    _births: dict[int, bytes | None] = field(default_factory=dict)
    _reports: dict[int, bytes | None] = field(default_factory=dict)
    _pending: _Pending = field(default_factory=_Pending)
    _known_schemas: set[int] = field(default_factory=set)
    _rolled_until_ms: int = 0
    _late: set[tuple[int, int]] = field(default_factory=set)
    """Device and hour of windows that come after their hour was rolled up."""
    stored: int = 0
    duplicates: int = 0
    windows: int = 0

    def forget(self) -> None:
        """Drop what is kept: after a transaction that was rolled back."""
        self._ids.clear()
        self._known_schemas.clear()
        self._end_batch()

    def _end_batch(self) -> None:
        self._late = set()
        self._devices, self._boots, self._births, self._reports = {}, {}, {}, {}
        self._pending = _Pending()

    def apply(self, connection: Connection, batch: Sequence[Received]) -> set[tuple[str, str]]:
        """Write a batch inside the caller's transaction.

        Returns:
            The devices that changed.
        """
        if not batch:
            return set()
        ids = self._lock_devices(connection, batch)
        self._rolled_until_ms = _read_rolled_until(connection)
        self._load_boots(connection, batch, ids)
        self._load_statements(connection, batch, ids)
        for item in batch:
            device = self._devices[ids[item.site, item.device]]
            alive_ms = item.alive_ms
            if alive_ms > device.last_seen_ms:
                device.last_seen_ms, device.is_seen = alive_ms, True
            self._apply_one(connection, device.id, item)
        self._pending.flush(connection)
        self._save_boots(connection, max(item.received_ms for item in batch))
        self._save_devices(connection)
        self._mark_late(connection)
        self._end_batch()
        return set(ids)

    @staticmethod
    def note_faults(connection: Connection, faults: Sequence[Fault]) -> None:
        """Count refused messages, and keep why the last one of each device was."""
        row = tables.faults
        counts: dict[tuple[str, str], tuple[int, Fault]] = {}
        for fault in faults:
            key = (fault.site, fault.device)
            counts[key] = (counts.get(key, (0, fault))[0] + 1, fault)
        for (site, device), (number, fault) in sorted(counts.items(), key=lambda item: item[0]):
            values = {"error": fault.error[:FAULT_CHARACTERS], "time_ms": fault.received_ms}
            statement = tables.upsert(row, connection.dialect.name).values(site=site, device=device, refused=number, **values)
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["site", "device"], set_={"refused": row.c.refused + number, **values}
                )
            )

    # reading what the batch needs

    def _lock_devices(self, connection: Connection, batch: Sequence[Received]) -> dict[tuple[str, str], int]:
        """The rows of the batch's devices, made where they are new, locked until the end of the transaction."""
        first: dict[tuple[str, str], Received] = {}
        for item in batch:
            first.setdefault((item.site, item.device), item)
        if len(self._ids) > MAX_IDS_CACHED:
            self._ids.clear()
        self._find_ids(connection, first)
        self._read_devices(connection, [self._ids[key] for key in first])
        gone = [key for key in first if self._ids[key] not in self._devices]
        if gone:  # taken out of the database by somebody else
            for key in gone:
                del self._ids[key]
            self._find_ids(connection, {key: first[key] for key in gone})
            self._read_devices(connection, [self._ids[key] for key in gone])
        return {key: self._ids[key] for key in first}

    def _find_ids(self, connection: Connection, first: Mapping[tuple[str, str], Received]) -> None:
        row = tables.devices
        unknown = sorted(key for key in first if key not in self._ids)
        if not unknown:
            return
        statement = select(row.c.site, row.c.device, row.c.id).where(tuple_(row.c.site, row.c.device).in_(unknown))
        self._ids.update({(site, device): number for site, device, number in connection.execute(statement)})
        missing = [key for key in unknown if key not in self._ids]
        if missing:
            values = [
                {
                    "site": key[0],
                    "device": key[1],
                    "first_seen_ms": first[key].received_ms,
                    "last_seen_ms": first[key].alive_ms or first[key].received_ms,
                }
                for key in missing
            ]
            connection.execute(tables.upsert(row, connection.dialect.name).on_conflict_do_nothing(), values)
            self._ids.update({(site, device): number for site, device, number in connection.execute(statement)})

    def _read_devices(self, connection: Connection, ids: Sequence[int]) -> None:
        row = tables.devices
        names = ("id", "boot", "booted_ms", "is_connected", "is_clean_death", "last_seen_ms", "window_ms", "latest")
        columns = [row.c[name] for name in (*names, *FIGURES)]
        statement = select(*columns).where(row.c.id.in_(sorted(ids))).order_by(row.c.id).with_for_update(key_share=True)
        for found in connection.execute(statement):
            self._devices[found[0]] = _Device(*found[: len(names)])
            self._devices[found[0]].figures = tuple(found[len(names) :])

    def _load_boots(self, connection: Connection, batch: Sequence[Received], ids: Mapping[tuple[str, str], int]) -> None:
        """The boots that the batch speaks of, made where they are new."""
        wanted: set[tuple[int, int]] = set()
        for item in batch:
            if isinstance(item.message, Death):
                continue
            device_id = ids[item.site, item.device]
            wanted.add((device_id, item.message.boot))
            if isinstance(item.message, Event) and (dropped := _dropped_boot(item.message)) is not None:
                wanted.add((device_id, dropped))
        row = tables.boots
        if not wanted:
            return
        statement = select(row).where(tuple_(row.c.device_id, row.c.boot).in_(sorted(wanted)))
        for found in connection.execute(statement):
            self._boots[found.device_id, found.boot] = self._read_boot(found)
        missing = sorted(wanted - self._boots.keys())
        if missing:
            values = [{"device_id": device_id, "boot": boot, "received": _NOTHING} for device_id, boot in missing]
            connection.execute(tables.upsert(row, connection.dialect.name).on_conflict_do_nothing(), values)
            self._boots.update({key: _Boot(ranges=SeqRanges()) for key in missing})

    def _read_boot(self, found: Any) -> _Boot:
        return _Boot(
            ranges=SeqRanges(_ranges_decoder.decode(found.received)),
            given_out=found.given_out,
            late=found.late,
            schema=found.schema,
            metrics=self._read_metrics(found.metrics) if found.metrics else _Metrics(),
            lost=SeqRanges(_ranges_decoder.decode(found.lost) if found.lost else ()),
            steps=_ranges_decoder.decode(found.steps) if found.steps else [],
            merged=found.merged,
        )

    def _read_metrics(self, data: bytes) -> _Metrics:
        if data not in self._schemas:
            if len(self._schemas) >= MAX_SCHEMAS_CACHED:
                self._schemas.clear()
            self._schemas[data] = _Metrics(msgspec.msgpack.decode(data, type=tuple[MetricSpec, ...]))
        return self._schemas[data]

    def _load_statements(self, connection: Connection, batch: Sequence[Received], ids: Mapping[tuple[str, str], int]) -> None:
        """The births and reports that are kept of devices that send new ones."""
        row = tables.devices
        for kind, column, found in ((Birth, row.c.birth, self._births), (Reported, row.c.reported, self._reports)):
            wanted = {ids[item.site, item.device] for item in batch if isinstance(item.message, kind)}
            if wanted:
                statement = select(row.c.id, column).where(row.c.id.in_(sorted(wanted)))
                for number, data in connection.execute(statement):
                    found[number] = data

    # writing what the batch changed

    def _mark_late(self, connection: Connection) -> None:
        """Have the hours rolled up anew that changed afterwards."""
        row = tables.rollup_due
        values = [{"device_id": device_id, "hour_ms": hour, "marks": 1} for device_id, hour in sorted(self._late)]
        if values:
            statement = tables.upsert(row, connection.dialect.name)
            more = {"marks": row.c.marks + 1}
            connection.execute(statement.on_conflict_do_update(index_elements=["device_id", "hour_ms"], set_=more), values)

    def _note_times(self, device_id: int, first_ms: int, last_ms: int) -> None:
        """Windows that begin in this time changed."""
        begin = max(first_ms, tables.MIN_PLAUSIBLE_MS, last_ms - MAX_LATE_HOURS * HOUR_MS)
        for hour in range(begin - begin % HOUR_MS, min(last_ms + 1, self._rolled_until_ms), HOUR_MS):
            self._late.add((device_id, hour))

    def _save_boots(self, connection: Connection, now_ms: int) -> None:
        row = tables.boots
        values = [
            {
                "of_device": device_id,
                "of_boot": number,
                "received": _encode(boot.ranges.ranges),
                "given_out": boot.given_out,
                "late": boot.late,
                "lost": _encode(boot.lost.ranges) if boot.lost.count else None,
                "steps": _encode(boot.steps) if boot.steps else None,
                "merged": boot.merged,
                "heard_ms": now_ms,
            }
            for (device_id, number), boot in self._boots.items()
            if boot.is_dirty
        ]
        here = (row.c.device_id == bindparam("of_device"), row.c.boot == bindparam("of_boot"))
        if values:
            connection.execute(update(row).where(*here), values)

    def _save_devices(self, connection: Connection) -> None:
        row = tables.devices
        statement = update(row).where(row.c.id == bindparam("of_device"))
        changed = [
            {
                "of_device": device.id,
                "last_seen_ms": device.last_seen_ms,
                "boot": device.boot,
                "booted_ms": device.booted_ms,
                "is_connected": device.is_connected,
                "is_clean_death": device.is_clean_death,
                "window_ms": device.window_ms,
                "latest": _encode(device.latest) if device.latest is not None else device.packed,
                **dict(zip(FIGURES, device.figures, strict=True)),
            }
            for device in self._devices.values()
            if device.is_changed
        ]
        seen = [
            {"of_device": device.id, "last_seen_ms": device.last_seen_ms}
            for device in self._devices.values()
            if device.is_seen and not device.is_changed
        ]
        for values in (changed, seen):
            if values:
                connection.execute(statement, values)

    # one message

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
            case WindowBatch():
                self._windows(connection, device_id, message)
            case Birth():
                self._birth(connection, device_id, message)
            case Death():
                device = self._devices[device_id]
                if device.boot in {message.boot, 0}:
                    device.is_connected, device.is_clean_death, device.is_changed = False, message.is_clean, True
            case Heartbeat():
                boot = self._boots[device_id, message.boot]
                boot.is_dirty = boot.is_dirty or message.seq > boot.given_out
                boot.given_out = max(boot.given_out, message.seq)
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
        boot = self._boots[device_id, message.boot]
        self._note(boot, message.seq)
        packed = _encode(message.metrics)
        boot.metrics, boot.schema = self._read_metrics(packed), schema_crc(message.metrics, message.sketches)
        row = tables.boots
        values = {"schema": boot.schema, "metrics": packed, "sketches": _encode(message.sketches)}
        connection.execute(update(row).where(row.c.device_id == device_id, row.c.boot == message.boot).values(**values))
        if boot.schema not in self._known_schemas:
            connection.execute(tables.upsert(tables.schemas, connection.dialect.name).on_conflict_do_nothing(), values)
            self._known_schemas.add(boot.schema)
        data = self._births.get(device_id)
        known = decode(data) if data else None
        if isinstance(known, Birth) and known.boot == message.boot and known.seq > message.seq:
            return
        device = self._devices[device_id]
        device.boot, device.booted_ms = message.boot, message.time_ms
        device.is_connected, device.is_clean_death, device.is_changed = True, False, True
        self._births[device_id] = encode(message)
        facts = describe_birth(message)
        of = tables.devices
        connection.execute(update(of).where(of.c.id == device_id).values(birth=self._births[device_id], **facts))
        if not isinstance(known, Birth) or known.labels != message.labels:
            save_labels(connection, device_id, message)

    def _windows(self, connection: Connection, device_id: int, batch: WindowBatch) -> None:
        boot = self._boots[device_id, batch.boot]
        pending = self._pending
        fresh: list[tuple[int, Window]] = []
        for window in batch.windows:
            if window.merged:
                if not self._note_merged(connection, device_id, boot, batch, window):
                    continue
            elif not self._note(boot, window.seq, is_late=batch.is_late):
                continue
            start_ms = boot.correct_ms(window.start_ms, window.merged[0] if window.merged else window.seq)
            if start_ms < self._rolled_until_ms:
                self._note_times(device_id, start_ms, start_ms + (window.duration_ms if window.merged else 0))
            key = (device_id, batch.boot, window.seq)
            if window.models:
                pending.models[key] = _model_rows(key, start_ms, window)
                pending.marks.add(window, start_ms)
            pending.windows[key] = (
                *key,
                start_ms,
                window.duration_ms,
                batch.schema,
                window.model_digest[:DIGEST_DIGITS],
                window.values,
                _encode(window.sketches) if any(window.sketches) else None,
                batch.is_late,
                _encode(window.merged) if window.merged else None,
            )
            fresh.append((start_ms, window))
        self.windows += len(fresh)
        if fresh and boot.schema == batch.schema:
            fresh.sort(key=lambda item: item[0])
            self._keep_latest(self._devices[device_id], batch.boot, boot.metrics, fresh)

    def _note_merged(self, connection: Connection, device_id: int, boot: _Boot, batch: WindowBatch, window: Window) -> bool:
        """Count a window that stands for several; it replaces those of them that are here. False when all are here."""
        pairs = [(window.merged[at], window.merged[at + 1]) for at in range(0, len(window.merged), 2)]
        added = sum(boot.ranges.add_range(first, last) for first, last in pairs)
        if not added:
            self.duplicates += 1
            return False
        total = sum(last - first + 1 for first, last in pairs)
        if added < total:
            self._pending.drop(device_id, batch.boot, pairs)
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
    def _keep_latest(device: _Device, boot: int, metrics: _Metrics, fresh: Sequence[tuple[int, Window]]) -> None:
        """Keep the newest window's figures beside the device, unless a newer one is there."""
        before = device.read_latest()
        newest_ms, newest = fresh[-1]
        if not _is_newer((boot, newest_ms), (before.boot, device.window_ms), device.boot):
            return
        points = [_point(window.values, metrics.p50_at) for _start_ms, window in fresh[-SPARKLINE_POINTS:]]
        values = _values(newest, metrics.specs)
        sparkline = [*before.sparkline, *points][-SPARKLINE_POINTS:]
        device.latest = Latest(values=values, duration_ms=newest.duration_ms, sparkline=sparkline, boot=boot)
        device.window_ms, device.figures, device.is_changed = newest_ms, read_figures(device.latest), True

    def _event(self, connection: Connection, device_id: int, message: Event) -> None:
        boot = self._boots[device_id, message.boot]
        if not self._note(boot, message.seq):
            return
        self._learn(connection, device_id, boot, message)
        row = (
            device_id,
            message.boot,
            message.seq,
            boot.correct_ms(message.time_ms, message.seq),
            message.kind,
            message.detail[:DETAIL_CHARACTERS],
            message.code[:64],
            message.model[:64],
            message.version[:64],
            message.counter,
        )
        self._pending.events.append(row)

    def _learn(self, connection: Connection, device_id: int, boot: _Boot, message: Event) -> None:
        """What an event says of other messages: that they are lost, or that their stamps are wrong."""
        fields = message.fields
        if message.kind == "messages_dropped":
            number = _dropped_boot(message)
            if number is not None:
                of = self._boots[device_id, number]
                for first, last in read_ranges(fields):
                    of.lost.add_range(first, last)
                of.is_dirty = True
        elif message.kind == "clock_stepped" and fields.get("is_correction") is True and len(boot.steps) < MAX_STEPS:
            delta, last_seq = fields.get("delta_ms"), fields.get("last_seq")
            if isinstance(delta, int) and isinstance(last_seq, int) and abs(delta) <= MAX_TIME_MS:
                boot.steps.append((last_seq, delta))
                boot.is_dirty = True
                self._pending.flush(connection)
                self._move(connection, device_id, message.boot, last_seq, delta)

    def _move(self, connection: Connection, device_id: int, boot: int, last_seq: int, delta_ms: int) -> None:
        """Correct the stamps that are here already."""
        moved: tuple[tuple[Table, str], ...] = (
            (tables.windows, "start_ms"),
            (tables.model_windows, "start_ms"),
            (tables.events, "time_ms"),
            (tables.labels, "time_ms"),
            (tables.samples, "time_ms"),
        )
        Marks.note_move(connection, device_id, boot, last_seq, delta_ms)
        row = tables.windows.c
        here = (row.device_id == device_id, row.boot == boot, row.seq <= last_seq)
        first_ms, last_ms = connection.execute(select(func.min(row.start_ms), func.max(row.start_ms)).where(*here)).one()
        if first_ms is not None:
            self._note_times(device_id, first_ms, last_ms)
            self._note_times(device_id, max(0, first_ms + delta_ms), last_ms + delta_ms)
        for table, name in moved:
            here = (table.c.device_id == device_id, table.c.boot == boot, table.c.seq <= last_seq)
            right = table.c[name] + delta_ms
            connection.execute(update(table).where(*here, right.between(0, MAX_TIME_MS)).values({name: right}))
        device = self._devices[device_id]
        if device.boot == boot and 0 <= device.window_ms + delta_ms <= MAX_TIME_MS:
            device.window_ms, device.is_changed = device.window_ms + delta_ms, True

    def _label(self, _connection: Connection, device_id: int, message: Label) -> None:
        boot = self._boots[device_id, message.boot]
        if not self._note(boot, message.seq):
            return
        row = (
            device_id,
            message.boot,
            message.seq,
            boot.correct_ms(message.time_ms, message.seq),
            message.model_digest[:DIGEST_DIGITS],
            message.prediction_id[:NAME_CHARACTERS],
            message.label[:NAME_CHARACTERS],
            message.predicted[:NAME_CHARACTERS],
            message.confidence if math.isfinite(message.confidence) else 0.0,
            message.is_counted,
        )
        self._pending.labels.append(row)

    def _sample(self, _connection: Connection, device_id: int, message: InputSample) -> None:
        boot = self._boots[device_id, message.boot]
        if not self._note(boot, message.seq):
            return
        row = (
            device_id,
            message.boot,
            message.seq,
            boot.correct_ms(message.time_ms, message.seq),
            message.model_digest[:DIGEST_DIGITS],
            message.prediction_id[:NAME_CHARACTERS],
            message.predicted[:NAME_CHARACTERS],
            message.confidence if math.isfinite(message.confidence) else 0.0,
            ",".join(message.redacted)[:1000],
            _encode(message.tensors),
        )
        self._pending.samples.append(row)

    def _reported(self, connection: Connection, device_id: int, message: Reported) -> None:
        self._note(self._boots[device_id, message.boot], message.seq)
        data, current = self._reports.get(device_id), self._devices[device_id].boot
        known = decode(data) if data else None
        if isinstance(known, Reported):
            order = "seq" if known.boot == message.boot else "time_ms"
            new, old = (message.boot, getattr(message, order)), (known.boot, getattr(known, order))
            if not _is_newer(new, old, current):
                return
        self._reports[device_id] = encode(message)
        row = tables.devices
        active = next((slot for slot in message.slots if slot.name == message.active), None)
        values: dict[str, Any] = {
            "reported": self._reports[device_id],
            "reported_ms": message.time_ms,
            "reported_seq": message.seq,
            "model": active.model[:64] if active else "",
            "version": active.version[:64] if active else "",
            "counter": active.counter if active else 0,
            "model_digest": short_digest(active.model_digest) if active else "",
        }
        connection.execute(update(row).where(row.c.id == device_id).values(**values))
        save_models(connection, device_id, message)


def _read_rolled_until(connection: Connection) -> int:
    """Before which time hours are rolled up; it stays so until the transaction ends."""
    row = tables.meta.c
    statement = select(row.value).where(row.key == tables.ROLLED_UNTIL).with_for_update(read=True)
    return int(connection.execute(statement).scalar() or 0)


def _dropped_boot(message: Event) -> int | None:
    """The boot whose messages a device says it gave up."""
    if message.kind != "messages_dropped":
        return None
    match message.fields.get("boot"):
        case int(number) if 0 <= number <= MAX_INTEGER:
            return number
        case _:
            return None


def short_digest(digest: str) -> str:
    """The first digits of a model's digest, as windows name it.

    >>> short_digest("sha256:" + "ab" * 32)
    'abababababab'
    """
    return digest.removeprefix("sha256:")[:DIGEST_DIGITS]


def describe_birth(birth: Birth) -> dict[str, str]:
    """What a birth says of the device, as columns that can be searched."""
    return {"arch": birth.arch[:64], "cpu": birth.cpu[:200], "agent_version": birth.agent_version[:64]}


def save_labels(connection: Connection, device_id: int, birth: Birth) -> None:
    """Replace a device's labels by those of its birth."""
    row = tables.device_labels
    connection.execute(delete(row).where(row.c.device_id == device_id))
    pairs = {key[:NAME_CHARACTERS]: value[:256] for key, value in birth.labels.items()}
    insert_rows(connection, row, [(device_id, key, value) for key, value in pairs.items()])


def save_models(connection: Connection, device_id: int, reported: Reported) -> None:
    """Replace the models that a device serves by those of its report: of each the slot that is active."""
    row = tables.device_models
    serving: dict[str, SlotReport] = {}
    for slot in reported.slots:
        if slot.model and (slot.name == reported.active or slot.status == "active"):
            serving.setdefault(slot.model[:64], slot)
    connection.execute(delete(row).where(row.c.device_id == device_id))
    rows = [
        (
            device_id,
            model,
            slot.version[:64],
            slot.counter,
            short_digest(slot.model_digest),
            slot.manifest_digest[:80],
            slot.status[:16],
        )
        for model, slot in serving.items()
    ]
    insert_rows(connection, row, rows)


def read_figures(latest: Latest) -> tuple[float | None, ...]:
    """The newest window's figures as columns, in the order of ``FIGURES``."""
    values = latest.values
    requests, errors = values.get("requests"), values.get("errors")
    return (
        values.get("latency_p50_ms"),
        values.get("latency_p99_ms"),
        requests * 1000 / latest.duration_ms if requests is not None and latest.duration_ms else None,
        errors / requests if requests and errors is not None else None,
        int(min(errors or 0, MAX_INTEGER // 2)),
    )


def _model_rows(key: tuple[int, int, int], start_ms: int, window: Window) -> list[Row]:
    """One row a model of a window; a model that is named twice has its first."""
    rows: dict[tuple[str, int], Row] = {}
    for model in window.models:
        digest = model.model_digest[:DIGEST_DIGITS]
        if (digest, model.profile) in rows:
            continue
        rows[digest, model.profile] = (
            *key,
            digest,
            model.profile,
            start_ms,
            window.duration_ms,
            model.requests,
            model.errors,
            model.rejected,
            model.samples,
            model.sketched,
            model.labelled,
            model.right,
            model.latency or (window.sketches[0] if len(window.models) == 1 and window.sketches else None),
            _encode(model.sketches) if any(model.sketches) else None,
            _encode(model.verdicts) if model.verdicts else None,
        )
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


def _point(values: bytes, at: int) -> float | None:
    """One value of a packed vector; None when it is no number, or not there."""
    if at < 0 or len(values) % _FLOAT.size or len(values) < (at + 1) * _FLOAT.size:
        return None
    value: float = _FLOAT.unpack_from(values, at * _FLOAT.size)[0]
    return value if math.isfinite(value) else None
