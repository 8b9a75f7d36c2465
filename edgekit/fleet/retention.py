"""How long the fleet server keeps what: windows roll up to a minute, an hour and a day, and what is too old goes.

An hour of a device is rolled when it is over; one that changes afterwards (windows from a backlog, merged ones, a clock that
was set right) is marked by the writer and rolled anew. Windows that come for an hour whose raw windows are gone already are
added to its roll-ups. Each step is one short transaction, and what is left to do is in the database itself: a server that is
killed goes on where it was. Windows stamped before ``MIN_PLAUSIBLE_MS`` come from a clock that was not set: they wait for
their correction, and go without being rolled when their boot is over.

Nothing here changes what is known of sequence numbers, so a message that comes again is still known after its row is gone.

>>> Retention.parse("windows=14,events=0").windows_days
14
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Table, and_, delete, func, literal, or_, select, true, tuple_

from edgekit.errors import UsageError
from edgekit.fleet import tables
from edgekit.fleet.bulk import insert_rows
from edgekit.fleet.rollups import (
    COUNTS,
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    Declared,
    ModelKey,
    ModelRollup,
    RawWindow,
    Rollup,
    merge_models,
    merge_rollups,
    roll_windows,
    unpack_model,
    unpack_rollup,
)
from edgekit.fleet.store import Store
from edgekit.fleet.tables import MIN_PLAUSIBLE_MS, ROLLED_UNTIL, upsert
from edgekit.schema.base import Record
from edgekit.schema.message import MetricSpec, SketchSpec

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 120.0
RUN_SECONDS = 60.0
"""A run that has more to do leaves it to the next one."""
GRACE_MS = 5 * 60_000
"""An hour is rolled so long after its end."""
MAX_STEP_HOURS = 48
DEVICES_A_STEP = 20
RETENTION_KEY = "retention"
_CLASSES = (
    "windows",
    "minutes",
    "hours",
    "days",
    "models",
    "model_hours",
    "model_days",
    "events",
    "labels",
    "samples",
    "boots",
)


class Retention(Record, frozen=True, kw_only=True):
    """Days for which each class is kept; 0 for ever.

    ``windows`` are as they were sent; ``models`` what each model did in them, with its sketches; ``boots`` which sequence
    numbers arrived: a device that comes back with older messages than that is counted twice.
    """

    windows_days: int = 14
    minutes_days: int = 30
    hours_days: int = 400
    days_days: int = 0
    models_days: int = 60
    model_hours_days: int = 400
    model_days_days: int = 0
    events_days: int = 400
    labels_days: int = 400
    samples_days: int = 30
    boots_days: int = 400

    @classmethod
    def parse(cls, text: str, before: Retention | None = None) -> Retention:
        """Read ``windows=14,events=400``; what is not named stays as it was.

        Raises:
            UsageError: ``retention.class``, ``retention.days``, ``retention.order``.
        """
        values = msgspec.structs.asdict(before or cls())
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, _, days = part.partition("=")
            if name not in _CLASSES:
                raise UsageError(
                    "retention.class", f"retention {part!r}: no such class.", hint=f"Classes: {', '.join(_CLASSES)}."
                )
            if not days.isascii() or not days.isdigit() or int(days) > 36_500:
                raise UsageError("retention.days", f"retention {part!r}: expected a number of days, 0 for ever.")
            values[f"{name}_days"] = int(days)
        made = cls(**values)
        made._check_order()
        return made

    def _check_order(self) -> None:
        """What is coarser is kept at least as long, or a coarse value would be computed from half of the fine ones."""
        pairs = (("windows", "minutes", 0), ("windows", "hours", 1), ("hours", "days", 0))
        for fine, coarse, margin in (*pairs, ("models", "model_hours", 1), ("model_hours", "model_days", 0)):
            if self.days_of(coarse) and (not self.days_of(fine) or self.days_of(coarse) < self.days_of(fine) + margin):
                longer = "at least a day longer than" if margin else "at least as long as"
                raise UsageError(
                    "retention.order",
                    f"retention: {coarse} would go before {fine}.",
                    hint=f"Keep {coarse} {longer} {fine}.",
                )

    def days_of(self, name: str) -> int:
        """The days of a class."""
        return int(getattr(self, f"{name}_days"))

    def cutoff_ms(self, name: str, now_ms: int) -> int:
        """What began before this goes; 0 for nothing. On a whole hour, since hours are rolled as a whole."""
        days = self.days_of(name)
        return _floor(now_ms - days * DAY_MS, HOUR_MS) if days else 0

    def __str__(self) -> str:
        return ",".join(f"{name}={self.days_of(name)}" for name in _CLASSES)


class KeepingReport(Record, frozen=True, kw_only=True):
    """What a run did: device-hours that were rolled, and rows that went, by table."""

    rolled_hours: int
    deleted: dict[str, int]
    is_complete: bool


def _floor(time_ms: int, step_ms: int) -> int:
    return max(0, time_ms - time_ms % step_ms)


def read_retention(store: Store) -> Retention:
    """What is set in a database; the defaults where nothing is."""
    with store.read() as connection:
        text = connection.execute(select(tables.meta.c.value).where(tables.meta.c.key == RETENTION_KEY)).scalar()
    return Retention.parse(text) if text else Retention()


def write_retention(store: Store, retention: Retention) -> None:
    """Set it, for every server on this database."""
    with store.write() as connection:
        _set_meta(connection, RETENTION_KEY, str(retention))


def _set_meta(connection: Connection, key: str, value: str) -> None:
    statement = upsert(tables.meta, connection.dialect.name).values(key=key, value=value)
    connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": value}))


class Keeper:
    """Rolls up and prunes one database.

    Args:
        store: the database.
        now_ms: the clock.
        run_seconds: how long one run may take.
    """

    def __init__(
        self,
        store: Store,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        run_seconds: float = RUN_SECONDS,
    ) -> None:
        self._store, self._now_ms, self._run_seconds = store, now_ms, run_seconds
        self._declared: dict[int, Declared] = {}
        self._deadline = 0.0

    def run(self) -> KeepingReport:
        """Roll what is due and prune what is old, for a while."""
        self._deadline = time.monotonic() + self._run_seconds
        now_ms, retention = self._now_ms(), read_retention(self._store)
        rolled, is_rolled = self._roll_due(now_ms)
        deleted: dict[str, int] = {}
        is_pruned = is_rolled and self._prune(retention, now_ms, deleted)
        if rolled or any(deleted.values()):
            logger.info("event=kept rolled_hours=%d deleted=%d", rolled, sum(deleted.values()))
        return KeepingReport(rolled_hours=rolled, deleted=deleted, is_complete=is_rolled and is_pruned)

    def run_to_end(self) -> KeepingReport:
        """Run until nothing is left to do."""
        whole = self.run()
        while not whole.is_complete:
            part = self.run()
            names = whole.deleted.keys() | part.deleted.keys()
            whole = KeepingReport(
                rolled_hours=whole.rolled_hours + part.rolled_hours,
                deleted={name: whole.deleted.get(name, 0) + part.deleted.get(name, 0) for name in names},
                is_complete=part.is_complete,
            )
        return whole

    @property
    def _is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    # rolling

    def _roll_due(self, now_ms: int) -> tuple[int, bool]:
        """Roll what is due: how many device-hours, and whether that was all."""
        rolled = 0
        while self._advance(now_ms):
            if self._is_late:
                return rolled, False
        while not self._is_late:
            number = self._roll_some()
            if not number:
                return rolled, True
            rolled += number
        return rolled, False

    def _advance(self, now_ms: int) -> bool:
        """Mark the hours that are over since the last time; False when there are none."""
        target = _floor(now_ms - GRACE_MS, HOUR_MS)
        row, due = tables.windows.c, tables.rollup_due
        with self._store.write() as connection:
            before = rolled_until_ms(connection, is_locked=True)
            if before >= target:
                return False
            dialect = connection.dialect.name
            if target - before > MAX_STEP_HOURS * HOUR_MS:
                until = target
                hours = (row.start_ms - row.start_ms % HOUR_MS).label("hour_ms")
                found = select(row.device_id, hours, literal(1)).where(
                    row.start_ms >= max(before, MIN_PLAUSIBLE_MS), row.start_ms < until
                )
                found = found.group_by(row.device_id, hours)
            else:
                until = before + HOUR_MS
                inside = select(row.device_id).where(
                    row.device_id == tables.devices.c.id, row.start_ms >= before, row.start_ms < until
                )
                found = select(tables.devices.c.id, literal(before), literal(1)).where(inside.exists())
            statement = upsert(due, dialect).from_select(["device_id", "hour_ms", "marks"], found)
            connection.execute(statement.on_conflict_do_nothing())
            _set_meta(connection, ROLLED_UNTIL, str(until))
        return True

    def _roll_some(self) -> int:
        """Roll a few device-hours; 0 when none is due."""
        due = tables.rollup_due
        with self._store.read() as connection:
            oldest = connection.execute(select(due).order_by(due.c.hour_ms, due.c.device_id).limit(DEVICES_A_STEP)).all()
            found = list({item.device_id: item for item in reversed(oldest)}.values())  # one hour a device: they share its day
            self._read_schemas(connection)
            made = [_Hour(connection, item.device_id, item.hour_ms, self._declared) for item in found]
        if not found:
            return 0
        with self._store.write() as connection:
            lock_devices(connection, [item.device_id for item in found])
            for item, hour in zip(found, made, strict=True):
                here = (due.c.device_id == item.device_id, due.c.hour_ms == item.hour_ms)
                marks = connection.execute(select(due.c.marks).where(*here)).scalar()
                if marks == item.marks and hour.has_same_floor(connection):
                    hour.write(connection)
                    connection.execute(delete(due).where(*here))
        return len(found)

    def _read_schemas(self, connection: Connection) -> None:
        row = tables.schemas
        for item in connection.execute(select(row).where(row.c.schema.not_in(list(self._declared)))):
            self._declared[item.schema] = Declared(
                metrics=msgspec.msgpack.decode(item.metrics, type=tuple[MetricSpec, ...]),
                sketches=msgspec.msgpack.decode(item.sketches, type=tuple[SketchSpec, ...]),
            )

    # pruning

    def _prune(self, retention: Retention, now_ms: int, deleted: dict[str, int]) -> bool:
        """Delete what is old; whether that was all."""
        with self._store.read() as connection:
            ids = list(connection.execute(select(tables.devices.c.id).order_by(tables.devices.c.id)).scalars())
        for begin in range(0, len(ids), DEVICES_A_STEP):
            if self._is_late:
                return False
            with self._store.write() as connection:
                part = ids[begin : begin + DEVICES_A_STEP]
                lock_devices(connection, part)
                self._prune_raw(connection, part, retention, now_ms, deleted)
                _prune_others(connection, part, retention, now_ms, deleted)
        return True

    @staticmethod
    def _prune_raw(
        connection: Connection, ids: Sequence[int], retention: Retention, now_ms: int, deleted: dict[str, int]
    ) -> None:
        """Windows that are rolled; the floor under which a device's are gone rises with them, in the same transaction."""
        due, floors, rolled_until = tables.rollup_due.c, tables.rollup_floors, rolled_until_ms(connection)
        for table, name, floor in (
            (tables.windows, "windows", floors.c.windows_ms),
            (tables.model_windows, "models", floors.c.models_ms),
        ):
            cutoff = min(retention.cutoff_ms(name, now_ms), rolled_until)
            if cutoff <= 0:
                continue
            row = table.c
            waiting = set(
                connection.execute(select(due.device_id).where(due.device_id.in_(ids), due.hour_ms < cutoff)).scalars()
            )
            ready = [number for number in ids if number not in waiting]
            old = and_(row.start_ms >= MIN_PLAUSIBLE_MS, row.start_ms < cutoff)
            of = tables.devices.c
            current = select(of.id, of.boot).where(of.id.in_(ready))
            unset = and_(row.start_ms < MIN_PLAUSIBLE_MS, tuple_(row.device_id, row.boot).not_in(current))
            _count(deleted, table, connection, delete(table).where(row.device_id.in_(ready), or_(old, unset)))
            for number in ready:
                values = {"windows_ms": 0, "models_ms": 0, floor.name: cutoff}
                statement = upsert(floors, connection.dialect.name).values(device_id=number, **values)
                raised = {
                    floor.name: func.max(floor, cutoff) if connection.dialect.name == "sqlite" else func.greatest(floor, cutoff)
                }
                connection.execute(statement.on_conflict_do_update(index_elements=["device_id"], set_=raised))


def _count(deleted: dict[str, int], table: Table, connection: Connection, statement: Any) -> None:
    deleted[table.name] = deleted.get(table.name, 0) + max(0, connection.execute(statement).rowcount)


def _prune_others(
    connection: Connection, ids: Sequence[int], retention: Retention, now_ms: int, deleted: dict[str, int]
) -> None:
    """Roll-ups by their step, and everything that has a time of its own."""
    for table, names in (
        (tables.rollups, ((MINUTE_MS, "minutes"), (HOUR_MS, "hours"), (DAY_MS, "days"))),
        (tables.model_rollups, ((HOUR_MS, "model_hours"), (DAY_MS, "model_days"))),
    ):
        for step_ms, name in names:
            cutoff = retention.cutoff_ms(name, now_ms)
            if cutoff > 0:
                here = (table.c.device_id.in_(ids), table.c.step_ms == step_ms, table.c.start_ms < cutoff)
                _count(deleted, table, connection, delete(table).where(*here))
    for table in (tables.events, tables.labels, tables.samples):
        cutoff = retention.cutoff_ms(table.name, now_ms)
        if cutoff > 0:
            aged = (table.c.device_id.in_(ids), table.c.time_ms < cutoff)
            _count(deleted, table, connection, delete(table).where(*aged))
    cutoff, row, of = retention.cutoff_ms("boots", now_ms), tables.boots.c, tables.devices.c
    if cutoff > 0:
        current = select(of.id, of.boot).where(of.id.in_(ids))
        old = (row.device_id.in_(ids), row.heard_ms < cutoff, tuple_(row.device_id, row.boot).not_in(current))
        _count(deleted, tables.boots, connection, delete(tables.boots).where(*old))


def lock_devices(connection: Connection, ids: Sequence[int]) -> None:
    """Hold up the writers of some devices until the transaction ends, in the order in which they lock each other."""
    row = tables.devices.c
    connection.execute(
        select(row.id).where(row.id.in_(sorted(set(ids)))).order_by(row.id).with_for_update(key_share=True)
    ).all()


def rolled_until_ms(connection: Connection, *, is_locked: bool = False) -> int:
    """Hours before this are rolled, or marked to be."""
    row = tables.meta.c
    statement = select(row.value).where(row.key == ROLLED_UNTIL)
    return int(connection.execute(statement.with_for_update() if is_locked else statement).scalar() or 0)


class _Hour:
    """The roll-ups of one device and hour, computed outside of a transaction that writes."""

    def __init__(self, connection: Connection, device_id: int, hour_ms: int, declared: dict[int, Declared]) -> None:
        self._device_id, self._hour_ms, self._declared = device_id, hour_ms, declared
        self._day_ms = _floor(hour_ms, DAY_MS)
        self._floors = self._read_floors(connection)
        self._is_added, self._is_model_added = hour_ms < self._floors[0], hour_ms < self._floors[1]
        """Whether the raw windows were pruned before, so that those that are here now come on top."""
        self._minutes = self._roll_minutes(connection)
        self._hours = self._merge(self._minutes, HOUR_MS)
        if self._is_added:
            old_minutes, old_hours = self._read(connection, MINUTE_MS), self._read(connection, HOUR_MS)
            days = self._merge([*self._read_day(connection), *self._hours], DAY_MS)
            self._minutes = self._merge([*old_minutes, *self._minutes], MINUTE_MS)
            self._hours = self._merge([*old_hours, *self._hours], HOUR_MS)
        else:
            others = [item for item in self._read(connection, HOUR_MS, is_day=True) if item[0] != hour_ms]
            days = self._merge([*others, *self._hours], DAY_MS)
        self._days = days
        self._models = self._roll_models(connection)
        self._model_days = self._merge_model_days(connection)

    def _read_floors(self, connection: Connection) -> tuple[int, int]:
        row = tables.rollup_floors.c
        found = connection.execute(select(row.windows_ms, row.models_ms).where(row.device_id == self._device_id)).one_or_none()
        return (found.windows_ms, found.models_ms) if found else (0, 0)

    def has_same_floor(self, connection: Connection) -> bool:
        """Whether nothing was pruned meanwhile."""
        return self._read_floors(connection) == self._floors

    def _roll_minutes(self, connection: Connection) -> list[tuple[int, int, Rollup]]:
        row = tables.windows.c
        statement = select(row.start_ms, row.duration_ms, row.schema, row.vector, row.sketches).where(
            row.device_id == self._device_id, row.start_ms >= self._hour_ms, row.start_ms < self._hour_ms + HOUR_MS
        )
        windows = [
            RawWindow(start_ms=start, duration_ms=duration, schema=schema, vector=vector, sketches=sketches)
            for start, duration, schema, vector, sketches in connection.execute(statement.order_by(row.start_ms, row.seq))
        ]
        return [(start, schema, made) for (start, schema), made in roll_windows(windows, self._declared).items()]

    def _merge(self, parts: Sequence[tuple[int, int, Rollup]], step_ms: int) -> list[tuple[int, int, Rollup]]:
        groups: dict[tuple[int, int], list[Rollup]] = {}
        for start, schema, part in parts:
            groups.setdefault((_floor(start, step_ms), schema), []).append(part)
        return [
            (start, schema, merge_rollups(group, self._declared.get(schema, Declared())))
            for (start, schema), group in groups.items()
        ]

    def _read(self, connection: Connection, step_ms: int, *, is_day: bool = False) -> list[tuple[int, int, Rollup]]:
        """Roll-ups that are here of the hour, or of its day."""
        begin, end = (self._day_ms, self._day_ms + DAY_MS) if is_day else (self._hour_ms, self._hour_ms + HOUR_MS)
        return self._read_between(connection, step_ms, begin, end)

    def _read_day(self, connection: Connection) -> list[tuple[int, int, Rollup]]:
        return self._read_between(connection, DAY_MS, self._day_ms, self._day_ms + 1)

    def _read_between(self, connection: Connection, step_ms: int, begin: int, end: int) -> list[tuple[int, int, Rollup]]:
        row = tables.rollups.c
        columns = (row.start_ms, row.schema, row.windows, row.duration_ms, row.sums, row.numbers, row.sketches)
        here = (row.device_id == self._device_id, row.step_ms == step_ms, row.start_ms >= begin, row.start_ms < end)
        return [(found[0], found[1], unpack_rollup(*found[2:])) for found in connection.execute(select(*columns).where(*here))]

    def _roll_models(self, connection: Connection) -> dict[ModelKey, ModelRollup]:
        row = tables.model_windows.c
        here = (row.device_id == self._device_id, row.start_ms >= self._hour_ms, row.start_ms < self._hour_ms + HOUR_MS)
        columns = (row.model_digest, row.profile, row.duration_ms, row.latency, row.sketches, row.verdicts)
        statement = select(*columns, *(row[name] for name in COUNTS)).where(*here)
        found = [
            (
                (item.model_digest, item.profile),
                unpack_model(
                    windows=1,
                    duration_ms=item.duration_ms,
                    counts=(getattr(item, name) for name in COUNTS),
                    latency=item.latency,
                    sketches=item.sketches,
                    verdicts=item.verdicts,
                ),
            )
            for item in connection.execute(statement)
        ]
        self._fresh_models = merge_models(found)
        if not self._is_model_added:
            return self._fresh_models
        return merge_models([*self._read_models(connection, HOUR_MS, self._hour_ms, 1), *self._fresh_models.items()])

    def _read_models(
        self, connection: Connection, step_ms: int, begin: int, length_ms: int
    ) -> list[tuple[ModelKey, ModelRollup]]:
        row = tables.model_rollups.c
        here = (
            row.device_id == self._device_id,
            row.step_ms == step_ms,
            row.start_ms >= begin,
            row.start_ms < begin + length_ms,
            row.start_ms != self._hour_ms if length_ms > 1 else true(),
        )
        return [
            (
                (item.model_digest, item.profile),
                unpack_model(
                    windows=item.windows,
                    duration_ms=item.duration_ms,
                    counts=(getattr(item, name) for name in COUNTS),
                    latency=item.latency,
                    sketches=item.sketches,
                    verdicts=item.verdicts,
                ),
            )
            for item in connection.execute(select(tables.model_rollups).where(*here))
        ]

    def _merge_model_days(self, connection: Connection) -> dict[ModelKey, ModelRollup]:
        if self._is_model_added:
            old = self._read_models(connection, DAY_MS, self._day_ms, 1)
            return merge_models([*old, *self._fresh_models.items()])
        others = self._read_models(connection, HOUR_MS, self._day_ms, DAY_MS)
        return merge_models([*others, *self._models.items()])

    def write(self, connection: Connection) -> None:
        """Replace what was there."""
        for step_ms, begin, length_ms, made in (
            (MINUTE_MS, self._hour_ms, HOUR_MS, self._minutes),
            (HOUR_MS, self._hour_ms, HOUR_MS, self._hours),
            (DAY_MS, self._day_ms, DAY_MS, self._days),
        ):
            _clear(connection, tables.rollups, self._device_id, step_ms, begin, length_ms)
            rows = [(self._device_id, step_ms, start, schema, *part.pack()) for start, schema, part in made]
            insert_rows(connection, tables.rollups, rows)
        for step_ms, begin, models in ((HOUR_MS, self._hour_ms, self._models), (DAY_MS, self._day_ms, self._model_days)):
            _clear(connection, tables.model_rollups, self._device_id, step_ms, begin, step_ms)
            rows = [(self._device_id, step_ms, begin, *key, *part.pack()) for key, part in models.items()]
            insert_rows(connection, tables.model_rollups, rows)
        for table, is_added in ((tables.windows, self._is_added), (tables.model_windows, self._is_model_added)):
            if is_added:
                row = table.c
                here = (row.device_id == self._device_id, row.start_ms >= self._hour_ms, row.start_ms < self._hour_ms + HOUR_MS)
                connection.execute(delete(table).where(*here))


def _clear(  # noqa: PLR0917 - a range of rows
    connection: Connection, table: Table, device_id: int, step_ms: int, begin: int, length_ms: int
) -> None:
    row = table.c
    here = (row.device_id == device_id, row.step_ms == step_ms, row.start_ms >= begin, row.start_ms < begin + length_ms)
    connection.execute(delete(table).where(*here))
