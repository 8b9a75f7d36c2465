"""The fleet's memory: one writer, many readers, SQLite by default and any database of SQLAlchemy by URL.

>>> store = Store("sqlite://")
>>> store.fleet(now_ms=0).online
0
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, func, select
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from edgekit.errors import ArtifactError, EnvironmentFault
from edgekit.fleet import all_tables, tables
from edgekit.fleet.database import is_memory, make_engine, shown_url, writing
from edgekit.fleet.gaps import SeqRanges
from edgekit.fleet.listing import STALE_MS, DeviceQuery, Sort, export_devices, list_devices, make_view
from edgekit.fleet.migrations.upgrading import prepare
from edgekit.fleet.overview import ATTENTION_MS, view_fleet, view_releases
from edgekit.fleet.selector import Selector
from edgekit.fleet.series import StoredWindow, make_series, unit_of
from edgekit.fleet.views import (
    DeviceDetail,
    DevicePage,
    EventPage,
    EventView,
    FleetView,
    GapView,
    ModelView,
    ReleaseView,
    Series,
    SlotView,
)
from edgekit.fleet.writing import Fault, Received, Writer
from edgekit.schema.message import Birth, MetricSpec, Reported
from edgekit.telemetry.codec import decode
from edgekit.telemetry.histogram import LatencyHistogram, bounds_of

__all__ = ["ATTENTION_MS", "STALE_MS", "Store"]

HISTOGRAM_MS = 3_600_000
MAX_SERIES_WINDOWS = 200_000
"""Three weeks of windows of 10 s."""
MAX_POINTS = 20_000
MAX_CHANGED = 20_000
"""Devices whose last change is remembered for open pages."""


class Store:
    """The store; safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Open or create it.

        Args:
            url: a SQLAlchemy URL, or a path to an SQLite file.

        Raises:
            UsageError: ``config.database``.
            EnvironmentFault: ``store.unreachable`` when it cannot be opened, ``store.newer`` when a newer edgekit made it.
        """
        self._engine = make_engine(url)
        self._write_engine = writing(self._engine)
        self._is_shared_connection = is_memory(url)
        self._writer = Writer()
        self._lock = threading.RLock()
        self._current = threading.local()
        self._stamp = 0
        self._changed: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._forgotten = 0
        try:
            with self.write() as connection:
                prepare(connection, all_tables.metadata, shown_url(url))
        except SQLAlchemyError as error:
            self._engine.dispose()
            raise EnvironmentFault(
                "store.unreachable",
                f"{shown_url(url)}: the database cannot be opened: {_first_line(error)}.",
                hint="Check the path or URL, and that this user may write there.",
            ) from error

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    # writing

    @property
    def stored(self) -> int:
        """Messages stored since the start."""
        return self._writer.stored

    @property
    def duplicates(self) -> int:
        """Messages that were there already, since the start."""
        return self._writer.duplicates

    @property
    def windows(self) -> int:
        """Windows among the stored messages."""
        return self._writer.windows

    def apply(self, batch: Sequence[Received], faults: Sequence[Fault] = ()) -> None:
        """Write a batch, and what was refused, in one transaction: all of it or nothing.

        Raises:
            EnvironmentFault: ``store.write_failed``; the batch may be given again.
            ArtifactError: ``telemetry.unstorable``; one of the messages can never be stored.
        """
        with self._lock:
            writer = self._writer
            before = (writer.stored, writer.duplicates, writer.windows)
            try:
                with self.write() as connection:
                    changed = writer.apply(connection, batch)
                    writer.note_faults(connection, faults)
            except BaseException as error:
                writer.forget()
                writer.stored, writer.duplicates, writer.windows = before
                if isinstance(error, (DataError, IntegrityError, OverflowError)):
                    message = f"the database cannot hold a batch of {len(batch)} messages: {_first_line(error)}."
                    raise ArtifactError("telemetry.unstorable", message) from error
                if isinstance(error, SQLAlchemyError):
                    message = f"the database refused a batch of {len(batch)} messages: {_first_line(error)}."
                    raise EnvironmentFault("store.write_failed", message, hint="Check its disk.") from error
                raise
            self._note_changes(changed)

    def _note_changes(self, changed: set[tuple[str, str]]) -> None:
        self._stamp += 1
        for key in changed:
            self._changed[key] = self._stamp
            self._changed.move_to_end(key)
        while len(self._changed) > MAX_CHANGED:
            self._forgotten = self._changed.popitem(last=False)[1]

    def changes_since(self, stamp: int) -> tuple[int, set[tuple[str, str]]]:
        """The newest stamp, and the devices that changed after the given one, of the last ``MAX_CHANGED``."""
        with self._lock:
            found: set[tuple[str, str]] = set()
            for key, when in reversed(self._changed.items()):
                if when <= stamp:
                    break
                found.add(key)
            return self._stamp, found

    @property
    def engine(self) -> Engine:
        """The database, for those who keep their own tables in it."""
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction of a part of the server that keeps its own tables here; short, since the ingest waits for it.

        Inside another one of the same thread it is a part of that.
        """
        current: Connection | None = getattr(self._current, "connection", None)
        if current is not None:
            yield current
            return
        with self._lock, self._write_engine.begin() as connection:
            self._current.connection = connection
            try:
                yield connection
            finally:
                self._current.connection = None

    # reading

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection to read by, which sees one state of the database; inside of :meth:`write` that transaction's."""
        current: Connection | None = getattr(self._current, "connection", None)
        if current is not None:
            yield current
        elif self._is_shared_connection:
            with self.write() as connection:
                yield connection
        else:
            with self._engine.connect() as connection:
                yield connection

    _reading = read

    def fleet(self, now_ms: int) -> FleetView:
        """The overview."""
        with self.read() as connection:
            return view_fleet(connection, now_ms)

    def releases(self) -> tuple[ReleaseView, ...]:
        """Which model versions run, how many devices serve and refuse each, and at which sites."""
        with self.read() as connection:
            return view_releases(connection)

    def devices(
        self,
        *,
        now_ms: int,
        search: str = "",
        state: str = "",
        selector: Selector | None = None,
        groups: Mapping[str, str] | None = None,
        sort: Sort = "device",
        is_descending: bool = False,
        after: str = "",
        before: str = "",
        limit: int = 50,
    ) -> DevicePage:
        """A page of devices.

        Args:
            now_ms: the time, for the state.
            search: part of a site's, device's, model's or version's name.
            state: only devices in this state.
            selector: only devices that it names.
            groups: groups that are selectors themselves, by name.
            sort: the order; devices of equal rank by their number.
            is_descending: the other way round.
            after: the ``next`` of the page before.
            before: the ``previous`` of the page after.
            limit: most devices on the page.

        Raises:
            UsageError: ``devices.cursor``, or the selector's own.
        """
        query = DeviceQuery(
            search=search,
            state=state,
            selector=selector,
            groups=groups or {},
            sort=sort,
            is_descending=is_descending,
            after=after,
            before=before,
            limit=limit,
        )
        with self.read() as connection:
            return list_devices(connection, query, now_ms)

    def export_devices(self, query: DeviceQuery, now_ms: int) -> Iterator[str]:
        """All devices of a query as lines of CSV."""
        with self.read() as connection:
            lines = export_devices(connection, query, now_ms)
            yield from list(lines) if self._is_shared_connection else lines

    def device(self, site: str, device: str, now_ms: int) -> DeviceDetail | None:
        """Everything of one device but its series; None when nobody of that name has reported."""
        row = tables.devices
        with self.read() as connection:
            item = connection.execute(select(row).where(row.c.site == site, row.c.device == device)).one_or_none()
            if item is None:
                return None
            gaps = self._gaps(connection, item.id)
            events = self._events(connection, [row.c.id == item.id], 100)
            specs = self._metrics(connection, item.id, item.boot)
            histogram = self._histogram(connection, item.id, now_ms - HISTOGRAM_MS)
            fault = self._fault(connection, site, device)
            models = self._models(connection, item.id, now_ms - ATTENTION_MS)
        birth = decode(item.birth) if item.birth else None
        reported = decode(item.reported) if item.reported else None
        state = reported if isinstance(reported, Reported) else None
        facts = birth if isinstance(birth, Birth) else Birth(boot=0, seq=0, time_ms=0, metrics=())
        return DeviceDetail(
            device=make_view(item, now_ms),
            slots=tuple(SlotView(**msgspec.structs.asdict(slot)) for slot in state.slots) if state else (),
            active=state.active if state else "",
            phase=state.phase if state else "",
            gaps=gaps,
            events=events,
            metrics=(*((spec.name, unit_of(spec)) for spec in specs),),
            isa=facts.isa,
            cores=facts.cores,
            ram_mb=facts.ram_mb,
            os=facts.os,
            runtime=facts.runtime,
            runtime_version=facts.runtime_version,
            clock=facts.clock,
            url=facts.url,
            boot=f"{item.boot:016x}",
            booted_ms=item.booted_ms,
            latency_histogram=histogram,
            refused_messages=fault.refused if fault else 0,
            last_refused=fault.error if fault else "",
            models=models,
        )

    @staticmethod
    def _fault(connection: Connection, site: str, device: str) -> Row[Any] | None:
        row = tables.faults
        return connection.execute(select(row).where(row.c.site == site, row.c.device == device)).one_or_none()

    @staticmethod
    def _gaps(connection: Connection, device_id: int) -> GapView:
        row = tables.boots
        received = late = missing = lost = merged = 0
        for item in connection.execute(select(row).where(row.c.device_id == device_id)):
            ranges = SeqRanges(msgspec.msgpack.decode(item.received, type=list[tuple[int, int]]))
            received += ranges.count
            late += item.late
            merged += item.merged
            told = msgspec.msgpack.decode(item.lost, type=list[tuple[int, int]]) if item.lost else []
            lost += sum(ranges.add_range(first, last) for first, last in told)
            missing += ranges.missing(item.given_out)
        return GapView(received=received, late=late, missing=missing, lost=lost, merged=merged)

    @staticmethod
    def _models(connection: Connection, device_id: int, since_ms: int) -> tuple[ModelView, ...]:
        row = tables.model_windows
        names = ("requests", "errors", "rejected", "samples", "sketched", "labelled", "right")
        statement = (
            select(row.c.model_digest, *(func.sum(row.c[name]).label(name) for name in names))
            .where(row.c.device_id == device_id, row.c.start_ms >= since_ms)
            .group_by(row.c.model_digest)
            .order_by(row.c.model_digest)
        )
        return tuple(
            ModelView(model_digest=item.model_digest, **{name: int(getattr(item, name)) for name in names})
            for item in connection.execute(statement)
        )

    @staticmethod
    def _metrics(connection: Connection, device_id: int, boot: int) -> tuple[MetricSpec, ...]:
        row = tables.boots
        statement = select(row.c.metrics).where(row.c.device_id == device_id, row.c.boot == boot)
        data = connection.execute(statement).scalar()
        return msgspec.msgpack.decode(data, type=tuple[MetricSpec, ...]) if data else ()

    @staticmethod
    def _histogram(connection: Connection, device_id: int, since_ms: int) -> tuple[tuple[float, float, int], ...]:
        row = tables.windows
        merged = LatencyHistogram()
        statement = select(row.c.sketches).where(
            row.c.device_id == device_id, row.c.start_ms >= since_ms, row.c.sketches.is_not(None)
        )
        for (data,) in connection.execute(statement.limit(MAX_POINTS)):
            sketches = msgspec.msgpack.decode(data, type=tuple[bytes, ...])
            try:
                merged.merge(LatencyHistogram.decode(sketches[0]))
            except (ArtifactError, IndexError):
                continue
        return tuple((*bounds_of(index), count) for index, count in merged.counts.items())

    def series(self, site: str, device: str, metrics: Sequence[str], *, since_ms: int, step_ms: int = 0) -> tuple[Series, ...]:
        """Metrics over time, one series for each.

        Args:
            site: the device's site.
            device: its name.
            metrics: names that its birth declares; counts become rates per second.
            since_ms: windows that begin before are left out.
            step_ms: average the points in steps of this length; 0 gives every window, at most the newest ``MAX_POINTS``.
        """
        row, device_row, boot_row = tables.windows, tables.devices, tables.boots
        here = (device_row.c.site == site, device_row.c.device == device)
        statement = (
            select(row.c.start_ms, row.c.duration_ms, row.c.vector, row.c.boot, row.c.schema)
            .join(device_row, device_row.c.id == row.c.device_id)
            .where(*here, row.c.start_ms >= since_ms)
            .order_by(row.c.start_ms.desc())
            .limit(MAX_SERIES_WINDOWS if step_ms else MAX_POINTS)
        )
        boots = (
            select(boot_row.c.boot, boot_row.c.schema, boot_row.c.metrics)
            .join(device_row, device_row.c.id == boot_row.c.device_id)
            .where(*here, boot_row.c.metrics.is_not(None))
        )
        with self.read() as connection:
            declared = {
                (item.boot, item.schema): msgspec.msgpack.decode(item.metrics, type=tuple[MetricSpec, ...])
                for item in connection.execute(boots)
            }
            windows = [
                StoredWindow(start_ms=start, duration_ms=duration, vector=vector, boot=boot, schema=schema)
                for start, duration, vector, boot, schema in connection.execute(statement)
            ]
        return make_series(windows[::-1], declared, metrics, step_ms)

    def events(
        self, *, site: str = "", device: str = "", kind: str = "", before: int | None = None, limit: int = 100
    ) -> EventPage:
        """A page of events, newest first.

        Args:
            site: only of this site.
            device: only of this device.
            kind: only of this kind.
            before: the ``next`` of the page before.
            limit: most events on the page.
        """
        row = tables.devices
        conditions = [row.c.site == site] if site else []
        conditions += [row.c.device == device] if device else []
        conditions += [tables.events.c.kind == kind] if kind else []
        conditions += [tables.events.c.id < before] if before is not None else []
        with self.read() as connection:
            events = self._events(connection, conditions, limit + 1)
        return EventPage(events=events[:limit], next=events[limit - 1].id if len(events) > limit else None)

    @staticmethod
    def _events(connection: Connection, conditions: Sequence[Any], limit: int) -> tuple[EventView, ...]:
        log, row = tables.events, tables.devices
        statement = select(log, row.c.site, row.c.device).join(row, row.c.id == log.c.device_id)
        found = connection.execute(statement.where(*conditions).order_by(log.c.id.desc()).limit(limit)).all()
        names = EventView.__struct_fields__
        return tuple(EventView(**{name: getattr(item, name) for name in names}) for item in found)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
