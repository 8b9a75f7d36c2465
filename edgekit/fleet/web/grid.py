"""Every device as one letter: what the picture of the fleet is painted from. Ten thousand are ten kilobytes, packed two."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, case, func, select

from edgekit.fleet import tables
from edgekit.fleet.listing import STALE_MS, DeviceQuery, filter_devices
from edgekit.schema.base import Record

Coloring = Literal["state", "release", "latency"]
MAX_CELLS = 100_000
MAX_NAMES = 500
_row = tables.devices.c
_STATES = {"1": "online", "2": "silent", "3": "offline"}
_LETTERS = "abcd"
_SHADES = {"1": "fast", "2": "slower than most", "3": "among the slowest twentieth", "0": "no figures"}


class GridView(Record, frozen=True, kw_only=True):
    """``states`` has a letter for each device, by site and name; ``words`` says what each letter means."""

    stamp: str
    states: str
    words: dict[str, str]


class SiteCount(Record, frozen=True, kw_only=True):
    """The devices of a site by state: the picture in words."""

    site: str
    online: int = 0
    stale: int = 0
    offline: int = 0


def view_grid(connection: Connection, query: DeviceQuery, coloring: Coloring, now_ms: int) -> GridView:
    """The devices of a query as letters."""
    conditions = filter_devices(query, now_ms)
    known = connection.execute(select(func.count(_row.id), func.sum(_row.id), func.max(_row.id)).where(*conditions)).one()
    stamp = "-".join(str(number or 0) for number in known)

    def column(of: ColumnElement[Any]) -> list[Any]:
        statement = select(of).where(*conditions).order_by(_row.site, _row.device).limit(MAX_CELLS)
        return list(connection.execute(statement).scalars())

    match coloring:
        case "state":
            letter = case((_row.is_connected.is_(False), "3"), (_row.last_seen_ms < now_ms - STALE_MS, "2"), else_="1")
            return GridView(stamp=stamp, states="".join(column(letter)), words=_STATES)
        case "release":
            names = column(case((_row.model == "", ""), else_=_row.model + "@" + _row.version))
            common = [name for name, _count in Counter(filter(None, names)).most_common(len(_LETTERS))]
            letters = {"": "0", **dict(zip(common, _LETTERS, strict=False))}
            words = {"0": "no release", "e": "another release", **dict(zip(_LETTERS, common, strict=False))}
            return GridView(stamp=stamp, states="".join(letters.get(name, "e") for name in names), words=words)
        case "latency":
            return GridView(stamp=stamp, states=_shade(column(_row.latency_p99_ms)), words=_SHADES)


def _shade(values: list[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "0" * len(values)
    middle, high = known[len(known) * 3 // 4], known[len(known) * 19 // 20]
    return "".join("0" if value is None else "3" if value > high else "2" if value > middle else "1" for value in values)


def name_cells(connection: Connection, query: DeviceQuery, first: int, count: int, now_ms: int) -> list[str]:
    """``site/device`` of some cells."""
    statement = select(_row.site, _row.device).where(*filter_devices(query, now_ms)).order_by(_row.site, _row.device)
    found = connection.execute(statement.offset(first).limit(min(count, MAX_NAMES)))
    return [f"{site}/{device}" for site, device in found]


def count_sites(connection: Connection, query: DeviceQuery, now_ms: int) -> tuple[SiteCount, ...]:
    """The same as figures: devices of each site by state."""
    is_fresh = (_row.last_seen_ms >= now_ms - STALE_MS).label("is_fresh")
    statement = select(_row.site, _row.is_connected, is_fresh, func.count()).where(*filter_devices(query, now_ms))
    found: dict[str, Counter[str]] = {}
    for site, is_connected, fresh, number in connection.execute(statement.group_by(_row.site, _row.is_connected, is_fresh)):
        state = "offline" if not is_connected else "online" if fresh else "stale"
        found.setdefault(site, Counter())[state] += number
    return tuple(SiteCount(site=site, **counts) for site, counts in sorted(found.items()))
