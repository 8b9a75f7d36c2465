"""The list of devices: filtered, sorted and paged by the database, so that ten thousand cost what fifty do.

A page is found by the row it begins after (keyset pagination): devices that report meanwhile move nobody to another page,
and the hundredth page costs what the first does. A cursor is opaque text that only fits the sort order that it was made
with.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, Select, and_, case, func, literal, or_, select, tuple_

from edgekit.errors import UsageError
from edgekit.fleet import tables
from edgekit.fleet.selector import Selector
from edgekit.fleet.views import DevicePage, DeviceState, DeviceView
from edgekit.fleet.writing import Latest
from edgekit.schema.base import Record
from edgekit.schema.message import Birth, Reported
from edgekit.telemetry.codec import decode

STALE_MS = 180_000
"""Three heartbeats of the default period."""
EXPORT_ROWS = 500
Sort = Literal["device", "state", "release", "latency_p50", "latency_p99", "throughput", "last_seen", "errors"]
SORTS: tuple[Sort, ...] = get_args(Sort)
_NO_LATEST = Latest()
_row = tables.devices.c
_EXPORTED = (
    "site",
    "device",
    "state",
    "last_seen_ms",
    "model",
    "version",
    "counter",
    "model_digest",
    "latency_p50_ms",
    "latency_p99_ms",
    "throughput_per_s",
    "requests",
    "errors",
    "cpu_percent",
    "rss_mb",
    "outbox_messages",
    "agent_version",
    "arch",
    "cpu",
    "refused",
    "last_error_code",
    "last_error",
)


class DeviceQuery(Record, frozen=True, kw_only=True):
    """Which devices, in which order.

    ``after`` is the ``next`` of a page, ``before`` the ``previous`` of one; at most one of them is given.
    """

    search: str = ""
    """Part of a site's, device's, model's or version's name."""
    state: str = ""
    """Only devices in this state."""
    selector: Selector | None = None
    groups: Mapping[str, str] = {}
    """Groups that are selectors themselves, by name."""
    sort: Sort = "device"
    is_descending: bool = False
    after: str = ""
    before: str = ""
    limit: int = 50


def is_online(now_ms: int) -> ColumnElement[bool]:
    """The condition of a device that is connected and heard of."""
    return and_(_row.is_connected.is_(True), _row.last_seen_ms >= now_ms - STALE_MS)


def is_stale(now_ms: int) -> ColumnElement[bool]:
    """The condition of a device that is connected and silent."""
    return and_(_row.is_connected.is_(True), _row.last_seen_ms < now_ms - STALE_MS)


def is_offline() -> ColumnElement[bool]:
    """The condition of a device whose will was published."""
    return _row.is_connected.is_(False)


def state_of(item: Row[Any], now_ms: int) -> DeviceState:
    """A device's state by its row."""
    if not item.is_connected:
        return "offline"
    return "stale" if item.last_seen_ms < now_ms - STALE_MS else "online"


def filter_devices(query: DeviceQuery, now_ms: int) -> list[ColumnElement[bool]]:
    """The conditions of a query, without its place.

    Raises:
        UsageError: the selector's own.
    """
    conditions: list[ColumnElement[bool]] = []
    if query.search:
        escaped = query.search.replace("\\", "\\\\").replace("%", "").replace("_", "\\_")
        columns = (_row.site, _row.device, _row.model, _row.version)
        conditions.append(or_(*(column.ilike(f"%{escaped}%", escape="\\") for column in columns)))
    match query.state:
        case "offline":
            conditions.append(is_offline())
        case "stale":
            conditions.append(is_stale(now_ms))
        case "online":
            conditions.append(is_online(now_ms))
        case _:
            pass
    if query.selector is not None and query.selector.terms:
        conditions.append(query.selector.clause(query.groups))
    return conditions


def _sort_columns(sort: Sort, now_ms: int) -> tuple[ColumnElement[Any], ...]:  # noqa: PLR0911 - one a case
    """What to sort by; together they name one device."""
    match sort:
        case "device":
            return (_row.site, _row.device)
        case "state":
            return (case((is_offline(), 0), (is_stale(now_ms), 1), else_=2), _row.id)
        case "release":
            return (_row.model, _row.counter, _row.version, _row.id)
        case "latency_p50":
            return (func.coalesce(_row.latency_p50_ms, -1.0), _row.id)
        case "latency_p99":
            return (func.coalesce(_row.latency_p99_ms, -1.0), _row.id)
        case "throughput":
            return (func.coalesce(_row.throughput_per_s, -1.0), _row.id)
        case "last_seen":
            return (_row.last_seen_ms, _row.id)
        case "errors":
            return (_row.errors, func.coalesce(_row.error_share, -1.0), _row.id)


def _make_cursor(sort: Sort, values: Sequence[Any]) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode([sort, *values])).decode().rstrip("=")


def _read_cursor(text: str, query: DeviceQuery, columns: int) -> list[str | int | float]:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        sort, *values = msgspec.msgpack.decode(data, type=list[str | int | float])
    except (ValueError, msgspec.DecodeError) as error:
        raise _bad_cursor(text) from error
    if sort != query.sort or len(values) != columns:
        raise _bad_cursor(text)
    return values


def _bad_cursor(text: str) -> UsageError:
    return UsageError(
        "devices.cursor",
        f"cursor {text[:40]!r}: not one of a page in this order.",
        hint="Give the next or previous of a page that was asked for with the same sort, or none.",
    )


def list_devices(connection: Connection, query: DeviceQuery, now_ms: int) -> DevicePage:
    """A page of devices.

    Raises:
        UsageError: ``devices.cursor``, or the selector's own.
    """
    conditions = filter_devices(query, now_ms)
    total = connection.execute(select(func.count(_row.id)).where(*conditions)).scalar() or 0
    keys = _sort_columns(query.sort, now_ms)
    is_back = bool(query.before)
    is_down = query.is_descending != is_back
    statement = _page(select(tables.devices, *(key.label(f"key_{i}") for i, key in enumerate(keys))), keys, query, is_down)
    rows = list(connection.execute(statement.where(*conditions).limit(query.limit + 1)))
    has_more = len(rows) > query.limit
    rows = rows[: query.limit]
    if is_back:
        rows.reverse()
    cursors = [_make_cursor(query.sort, [getattr(row, f"key_{i}") for i in range(len(keys))]) for row in rows[:1] + rows[-1:]]
    has_next, has_previous = (True, has_more) if is_back else (has_more, bool(query.after))
    return DevicePage(
        devices=tuple(make_view(row, now_ms) for row in rows),
        total=total,
        next=cursors[1] if rows and has_next else "",
        previous=cursors[0] if rows and has_previous else "",
    )


def _page(  # the direction is what it is about
    statement: Select[Any],
    keys: Sequence[ColumnElement[Any]],
    query: DeviceQuery,
    is_down: bool,  # noqa: FBT001
) -> Select[Any]:
    """The statement from the query's place on, in its order."""
    place = query.before or query.after
    if place:
        values = [literal(value) for value in _read_cursor(place, query, len(keys))]
        here = tuple_(*keys)
        statement = statement.where(here < tuple_(*values) if is_down else here > tuple_(*values))
    return statement.order_by(*(key.desc() if is_down else key.asc() for key in keys))


def export_devices(connection: Connection, query: DeviceQuery, now_ms: int) -> Iterator[str]:
    """All devices of a query as CSV, line by line, never all of them in memory.

    A text that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    keys = _sort_columns(query.sort, now_ms)
    statement = select(tables.devices).where(*filter_devices(query, now_ms))
    statement = statement.order_by(*(key.desc() if query.is_descending else key.asc() for key in keys))
    yield _csv_line([*_EXPORTED, "labels"])
    with connection.execution_options(yield_per=EXPORT_ROWS).execute(statement) as found:
        for row in found:
            view = make_view(row, now_ms)
            labels = " ".join(f"{key}={value}" for key, value in sorted(view.labels.items()))
            yield _csv_line([*(getattr(view, name) for name in _EXPORTED), labels])


def _csv_line(values: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow([_harmless(value) for value in values])
    return out.getvalue()


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"} else value


def latest_of(item: Row[Any]) -> Latest:
    """The newest window's figures, as they are kept beside the device."""
    return msgspec.msgpack.decode(item.latest, type=Latest) if item.latest else _NO_LATEST


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def make_view(item: Row[Any], now_ms: int) -> DeviceView:
    """A device in a list, by its row."""
    latest = latest_of(item)
    values = latest.values
    birth = decode(item.birth) if item.birth else None
    reported = decode(item.reported) if item.reported else None
    state = reported if isinstance(reported, Reported) else None
    facts = birth if isinstance(birth, Birth) else None
    return DeviceView(
        site=item.site,
        device=item.device,
        state=state_of(item, now_ms),
        last_seen_ms=item.last_seen_ms,
        model=item.model,
        version=item.version,
        counter=item.counter,
        model_digest=item.model_digest,
        latency_p50_ms=values.get("latency_p50_ms"),
        latency_p99_ms=values.get("latency_p99_ms"),
        throughput_per_s=item.throughput_per_s,
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
