"""The fleet's memory: one writer, many readers, SQLite by default and any database of SQLAlchemy by URL.

>>> store = Store("sqlite://")
>>> store.fleet(now_ms=0).online
0
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import (
    Connection,
    Engine,
    Row,
    and_,
    create_engine,
    distinct,
    event,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from edgekit.errors import ArtifactError, EnvironmentFault
from edgekit.fleet import tables
from edgekit.fleet.gaps import SeqRanges
from edgekit.fleet.series import StoredWindow, make_series, unit_of
from edgekit.fleet.views import (
    Attention,
    DeviceDetail,
    DevicePage,
    DeviceState,
    DeviceView,
    EventPage,
    EventView,
    FleetView,
    GapView,
    ModelView,
    ReleaseView,
    Series,
    SlotView,
)
from edgekit.fleet.writing import Fault, Latest, Received, Writer
from edgekit.schema.message import Birth, MetricSpec, Reported
from edgekit.telemetry.codec import decode
from edgekit.telemetry.histogram import LatencyHistogram, bounds_of

STALE_MS = 180_000
"""Three heartbeats of the default period."""
ATTENTION_MS = 24 * 3_600_000
HISTOGRAM_MS = 3_600_000
MAX_SERIES_WINDOWS = 200_000
"""Three weeks of windows of 10 s."""
MAX_POINTS = 20_000
MAX_ATTENTION = 50
MAX_TROUBLE = 2000
_TROUBLE = {
    "rolled_back": "critical",
    "worker_crashed": "warning",
    "install_failed": "warning",
    "install_refused": "warning",
    "messages_dropped": "warning",
    "message_refused": "warning",
}
_TITLES = {
    "rolled_back": "rolled back from",
    "worker_crashed": "had a crash of the model's process, serving",
    "install_failed": "failed to install",
    "install_refused": "refused",
    "messages_dropped": "dropped messages",
    "message_refused": "cannot publish",
}
_NO_LATEST = Latest()


def database_url(text: str) -> str:
    """A SQLAlchemy URL: as given, or SQLite in a file."""
    return text if "://" in text else f"sqlite:///{Path(text)}"


def _make_engine(url: str) -> Engine:
    if url in {"sqlite://", "sqlite:///:memory:"}:
        return create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    return engine


class Store:
    """The store; safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Open or create it.

        Args:
            url: a SQLAlchemy URL, or a path to an SQLite file.

        Raises:
            EnvironmentFault: ``store.unreachable`` when it cannot be opened, ``store.newer`` when a newer edgekit made it.
        """
        self._engine = _make_engine(database_url(url))
        self._writer = Writer()
        self._lock = threading.Lock()
        self._stamp = 0
        self._changed: dict[tuple[str, str], int] = {}
        try:
            tables.metadata.create_all(self._engine)
            with self._engine.begin() as connection:
                self._check_version(connection, url)
                _add_columns(connection)
        except SQLAlchemyError as error:
            raise EnvironmentFault(
                "store.unreachable",
                f"{url}: the database cannot be opened: {_first_line(error)}.",
                hint="Check the path or URL, and that this user may write there.",
            ) from error

    @staticmethod
    def _check_version(connection: Connection, url: str) -> None:
        row = tables.meta
        found = connection.execute(select(row.c.value).where(row.c.key == "schema_version")).scalar()
        if found is None:
            connection.execute(insert(row).values(key="schema_version", value=str(tables.SCHEMA_VERSION)))
        elif int(found) > tables.SCHEMA_VERSION:
            message = f"{url}: its schema is version {found}, this edgekit knows up to {tables.SCHEMA_VERSION}."
            raise EnvironmentFault("store.newer", message, hint="Update edgekit, or use another database.")
        elif int(found) < tables.SCHEMA_VERSION:
            connection.execute(update(row).where(row.c.key == "schema_version").values(value=str(tables.SCHEMA_VERSION)))

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

    def apply(self, batch: Sequence[Received], faults: Sequence[Fault] = ()) -> None:
        """Write a batch, and what was refused, in one transaction: all of it or nothing.

        Raises:
            EnvironmentFault: ``store.write_failed``; the batch may be given again.
            ArtifactError: ``telemetry.unstorable``; one of the messages can never be stored.
        """
        with self._lock:
            before = (self._writer.stored, self._writer.duplicates)
            try:
                with self._engine.begin() as connection:
                    changed = self._writer.apply(connection, batch)
                    for fault in faults:
                        self._writer.note_fault(connection, fault)
            except BaseException as error:
                self._writer.forget()
                self._writer.stored, self._writer.duplicates = before
                if isinstance(error, (DataError, IntegrityError, OverflowError)):
                    message = f"the database cannot hold a batch of {len(batch)} messages: {_first_line(error)}."
                    raise ArtifactError("telemetry.unstorable", message) from error
                if isinstance(error, SQLAlchemyError):
                    message = f"the database refused a batch of {len(batch)} messages: {_first_line(error)}."
                    raise EnvironmentFault("store.write_failed", message, hint="Check its disk.") from error
                raise
            self._stamp += 1
            for key in changed:
                self._changed[key] = self._stamp

    def changes_since(self, stamp: int) -> tuple[int, set[tuple[str, str]]]:
        """The newest stamp, and the devices that changed after the given one."""
        with self._lock:
            return self._stamp, {key for key, when in self._changed.items() if when > stamp}

    # reading

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            yield connection

    def fleet(self, now_ms: int) -> FleetView:
        """The overview."""
        row = tables.devices
        with self._reading() as connection:
            rows = connection.execute(select(row)).all()
            releases = self._releases(connection)
            attention = self._attention(connection, rows, now_ms)
            refusing = self._refusing(connection, now_ms)
        states = [_state(item, now_ms) for item in rows]
        live = [_latest(item) for item, state in zip(rows, states, strict=True) if state == "online"]
        return FleetView(
            now_ms=now_ms,
            online=states.count("online"),
            offline=states.count("offline"),
            stale=states.count("stale"),
            requests_per_s=sum(_throughput(latest) or 0.0 for latest in live),
            errors=sum(int(latest.values.get("errors", 0)) for latest in live),
            outdated=_outdated(rows),
            refusing=refusing,
            releases=releases,
            attention=attention,
        )

    def releases(self) -> tuple[ReleaseView, ...]:
        """Which model versions run, how many devices serve and refuse each, and at which sites."""
        with self._reading() as connection:
            return self._releases(connection)

    @staticmethod
    def _refusing(connection: Connection, now_ms: int) -> int:
        """How many devices refused an installation in the last day."""
        log = tables.events
        statement = select(func.count(distinct(log.c.device_id)))
        statement = statement.where(log.c.kind == "install_refused", log.c.time_ms >= now_ms - ATTENTION_MS)
        return connection.execute(statement).scalar() or 0

    @staticmethod
    def _releases(connection: Connection) -> tuple[ReleaseView, ...]:
        row, log = tables.devices, tables.events
        keys = (row.c.model, row.c.version, row.c.counter, row.c.model_digest)
        serving: dict[tuple[Any, ...], dict[str, int]] = {}
        statement = select(*keys, row.c.site, func.count()).where(row.c.model != "").group_by(*keys, row.c.site)
        for *key, site, number in connection.execute(statement.order_by(row.c.site)):
            serving.setdefault(tuple(key), {})[site] = number
        refused = connection.execute(
            select(log.c.model, log.c.version, log.c.counter, func.count(distinct(log.c.device_id)))
            .where(log.c.kind == "install_refused")
            .group_by(log.c.model, log.c.version, log.c.counter)
        ).all()
        refusing = {(model, version, counter): number for model, version, counter, number in refused}
        views = [
            ReleaseView(
                model=model,
                version=version,
                counter=counter,
                model_digest=digest,
                serving=sum(sites.values()),
                refusing=refusing.pop((model, version, counter), 0),
                sites=sites,
            )
            for (model, version, counter, digest), sites in serving.items()
        ]
        views += [
            ReleaseView(model=model, version=version, counter=counter, model_digest="", serving=0, refusing=number)
            for (model, version, counter), number in refusing.items()
        ]
        return tuple(sorted(views, key=lambda view: (view.model, -view.counter)))

    @staticmethod
    def _attention(connection: Connection, rows: Sequence[Row[Any]], now_ms: int) -> tuple[Attention, ...]:
        items: list[Attention] = []
        for item in rows:
            state = _state(item, now_ms)
            if state == "offline" and not item.is_clean_death:
                title, detail = "lost its connection", "It has not come back; its own reports wait on its disk."
            elif state == "stale":
                title, detail = "is silent", "The broker still holds its connection, but nothing arrives."
            else:
                continue
            severity: Any = "critical" if state == "offline" else "warning"
            items.append(
                Attention(
                    severity=severity,
                    site=item.site,
                    device=item.device,
                    title=title,
                    detail=detail,
                    time_ms=item.last_seen_ms,
                )
            )
        log, row = tables.events, tables.devices
        statement = (
            select(log, row.c.site, row.c.device)
            .join(row, row.c.id == log.c.device_id)
            .where(log.c.kind.in_(_TROUBLE), log.c.time_ms >= now_ms - ATTENTION_MS)
            .order_by(log.c.id.desc())
            .limit(MAX_TROUBLE)
        )
        items += _group_trouble(connection.execute(statement).all())
        items.sort(key=lambda attention: (attention.severity != "critical", -attention.time_ms))
        return tuple(items[:MAX_ATTENTION])

    def devices(self, *, now_ms: int, search: str = "", state: str = "", after: str = "", limit: int = 50) -> DevicePage:
        """A page of devices by site and name.

        Args:
            now_ms: the time, for the state.
            search: part of a site's, device's, model's or version's name.
            state: only devices in this state.
            after: the ``next`` of the page before.
            limit: most devices on the page.
        """
        row = tables.devices
        statement = select(row)
        if search:
            pattern = f"%{search.replace('%', '').replace('_', chr(92) + '_')}%"
            columns = (row.c.site, row.c.device, row.c.model, row.c.version)
            statement = statement.where(or_(*(column.like(pattern, escape="\\") for column in columns)))
        match state:
            case "offline":
                statement = statement.where(row.c.is_connected.is_(False))
            case "stale":
                statement = statement.where(row.c.is_connected, row.c.last_seen_ms < now_ms - STALE_MS)
            case "online":
                statement = statement.where(row.c.is_connected, row.c.last_seen_ms >= now_ms - STALE_MS)
            case _:
                pass
        with self._reading() as connection:
            total = connection.execute(select(func.count()).select_from(statement.subquery())).scalar() or 0
            if "/" in after:
                site, _, device = after.partition("/")
                statement = statement.where(or_(row.c.site > site, and_(row.c.site == site, row.c.device > device)))
            rows = connection.execute(statement.order_by(row.c.site, row.c.device).limit(limit + 1)).all()
        views = tuple(_device_view(item, now_ms) for item in rows[:limit])
        last = f"{views[-1].site}/{views[-1].device}" if len(rows) > limit else ""
        return DevicePage(devices=views, total=total, next=last)

    def device(self, site: str, device: str, now_ms: int) -> DeviceDetail | None:
        """Everything of one device but its series; None when nobody of that name has reported."""
        row = tables.devices
        with self._reading() as connection:
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
            device=_device_view(item, now_ms),
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
        with self._reading() as connection:
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
        with self._reading() as connection:
            events = self._events(connection, conditions, limit + 1)
        return EventPage(events=events[:limit], next=events[limit - 1].id if len(events) > limit else None)

    @staticmethod
    def _events(connection: Connection, conditions: Sequence[Any], limit: int) -> tuple[EventView, ...]:
        log, row = tables.events, tables.devices
        statement = select(log, row.c.site, row.c.device).join(row, row.c.id == log.c.device_id)
        found = connection.execute(statement.where(*conditions).order_by(log.c.id.desc()).limit(limit)).all()
        names = EventView.__struct_fields__
        return tuple(EventView(**{name: getattr(item, name) for name in names}) for item in found)


def _group_trouble(rows: Sequence[Row[Any]]) -> Iterator[Attention]:
    """One item for each kind of trouble with a release, however many devices report it.

    Args:
        rows: events with site and device, newest first.
    """
    groups: dict[tuple[str, ...], list[Row[Any]]] = {}
    for item in rows:
        key = (item.kind, item.model, item.version, item.code) if item.version else (item.kind, item.site, item.device)
        groups.setdefault(key, []).append(item)
    for group in groups.values():
        newest = group[0]
        release = f" {newest.model}@{newest.version}" if newest.version else ""
        yield Attention(
            severity=_TROUBLE[newest.kind],  # type: ignore[arg-type]
            site=newest.site,
            device=newest.device,
            title=f"{_TITLES[newest.kind]}{release}",
            detail=newest.detail,
            time_ms=newest.time_ms,
            devices=len({(item.site, item.device) for item in group}),
            kind=newest.kind,
        )


def _outdated(rows: Sequence[Row[Any]]) -> int:
    """How many devices serve an older release of a model than another device does."""
    newest: dict[str, int] = {}
    for item in rows:
        newest[item.model] = max(newest.get(item.model, 0), item.counter)
    return sum(item.counter < newest[item.model] for item in rows if item.model)


def _add_columns(connection: Connection) -> None:
    """What a table of an older edgekit lacks; only columns that may be empty are ever added."""
    found = inspect(connection)
    for table in tables.metadata.sorted_tables:
        known = {column["name"] for column in found.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                kind = column.type.compile(connection.dialect)
                default = "" if column.nullable else " DEFAULT 0 NOT NULL"
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}{default}"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _state(item: Row[Any], now_ms: int) -> DeviceState:
    if not item.is_connected:
        return "offline"
    return "stale" if item.last_seen_ms < now_ms - STALE_MS else "online"


def _latest(item: Row[Any]) -> Latest:
    return msgspec.msgpack.decode(item.latest, type=Latest) if item.latest else _NO_LATEST


def _throughput(latest: Latest) -> float | None:
    if "requests" not in latest.values or not latest.duration_ms:
        return None
    return latest.values["requests"] * 1000 / latest.duration_ms


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _device_view(item: Row[Any], now_ms: int) -> DeviceView:
    latest = _latest(item)
    values = latest.values
    birth = decode(item.birth) if item.birth else None
    reported = decode(item.reported) if item.reported else None
    state = reported if isinstance(reported, Reported) else None
    facts = birth if isinstance(birth, Birth) else None
    return DeviceView(
        site=item.site,
        device=item.device,
        state=_state(item, now_ms),
        last_seen_ms=item.last_seen_ms,
        model=item.model,
        version=item.version,
        counter=item.counter,
        model_digest=item.model_digest,
        latency_p50_ms=values.get("latency_p50_ms"),
        latency_p99_ms=values.get("latency_p99_ms"),
        throughput_per_s=_throughput(latest),
        requests=_whole(values.get("requests")),
        errors=_whole(values.get("errors")),
        cpu_percent=values.get("cpu_percent"),
        rss_mb=values.get("rss_mb"),
        outbox_messages=_whole(values.get("outbox_messages")),
        last_error=state.last_error if state else "",
        last_error_code=state.last_error_code if state else "",
        refused=len(state.refused) if state else 0,
        sparkline=tuple(latest.sparkline),
        agent_version=facts.agent_version if facts else "",
        arch=facts.arch if facts else "",
        cpu=facts.cpu if facts else "",
        labels=facts.labels if facts else {},
    )
