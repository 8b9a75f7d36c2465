"""The overview: how many devices are in which state, which releases run, and what needs a person, counted by the database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, and_, case, distinct, func, select

from edgekit.fleet import tables
from edgekit.fleet.listing import is_offline, is_online, is_stale
from edgekit.fleet.views import Attention, FleetView, ReleaseView

ATTENTION_MS = 24 * 3_600_000
MAX_ATTENTION = 50
GROUPED_FROM = 5
"""From so many devices of one site on, what they have in common is one item."""
_TROUBLE: dict[str, Literal["critical", "warning"]] = {
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
_row, _log = tables.devices.c, tables.events.c


def view_fleet(connection: Connection, now_ms: int) -> FleetView:
    """The overview."""
    online = is_online(now_ms)
    counts = connection.execute(
        select(
            func.sum(case((online, 1), else_=0)),
            func.sum(case((is_offline(), 1), else_=0)),
            func.sum(case((is_stale(now_ms), 1), else_=0)),
            func.sum(case((online, _row.throughput_per_s), else_=0.0)),
            func.sum(case((online, _row.errors), else_=0)),
        )
    ).one()
    return FleetView(
        now_ms=now_ms,
        online=int(counts[0] or 0),
        offline=int(counts[1] or 0),
        stale=int(counts[2] or 0),
        requests_per_s=float(counts[3] or 0.0),
        errors=int(counts[4] or 0),
        outdated=_count_outdated(connection),
        refusing=_count_refusing(connection, now_ms),
        releases=view_releases(connection),
        attention=_view_attention(connection, now_ms),
    )


def _count_outdated(connection: Connection) -> int:
    """How many devices serve an older release of a model than another device does."""
    newest = select(_row.model, func.max(_row.counter).label("counter")).where(_row.model != "").group_by(_row.model).subquery()
    statement = select(func.count(_row.id)).join(newest, newest.c.model == _row.model)
    return connection.execute(statement.where(_row.counter < newest.c.counter)).scalar() or 0


def _count_refusing(connection: Connection, now_ms: int) -> int:
    """How many devices refused an installation in the last day."""
    statement = select(func.count(distinct(_log.device_id)))
    statement = statement.where(_log.kind == "install_refused", _log.time_ms >= now_ms - ATTENTION_MS)
    return connection.execute(statement).scalar() or 0


def view_releases(connection: Connection) -> tuple[ReleaseView, ...]:
    """Which model versions run, how many devices serve and refuse each, and at which sites."""
    keys = (_row.model, _row.version, _row.counter, _row.model_digest)
    serving: dict[tuple[Any, ...], dict[str, int]] = {}
    statement = select(*keys, _row.site, func.count()).where(_row.model != "").group_by(*keys, _row.site)
    for *key, site, number in connection.execute(statement.order_by(_row.site)):
        serving.setdefault(tuple(key), {})[site] = number
    refused = connection.execute(
        select(_log.model, _log.version, _log.counter, func.count(distinct(_log.device_id)))
        .where(_log.kind == "install_refused")
        .group_by(_log.model, _log.version, _log.counter)
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


def _view_attention(connection: Connection, now_ms: int) -> tuple[Attention, ...]:
    lost = and_(is_offline(), _row.is_clean_death.is_(False))
    items = [
        *_group_silent(
            connection, lost, "critical", "lost its connection", "It has not come back; its own reports wait on its disk."
        ),
        *_group_silent(
            connection,
            is_stale(now_ms),
            "warning",
            "is silent",
            "The broker still holds its connection, but nothing arrives.",
        ),
        *_group_trouble(connection, now_ms),
    ]
    items.sort(key=lambda attention: (attention.severity != "critical", -attention.time_ms))
    return tuple(items[:MAX_ATTENTION])


def _group_silent(
    connection: Connection, condition: ColumnElement[bool], severity: Literal["critical", "warning"], title: str, detail: str
) -> Iterator[Attention]:
    """One item for each device that is not heard of, or for a site that has many of them."""
    many = select(_row.site, func.count(), func.max(_row.last_seen_ms)).where(condition).group_by(_row.site)
    single: list[str] = []
    for site, number, newest in connection.execute(many):
        if number < GROUPED_FROM:
            single.append(site)
            continue
        named = select(_row.device).where(condition, _row.site == site, _row.last_seen_ms == newest).limit(1)
        yield Attention(
            severity=severity,
            site=site,
            device=connection.execute(named).scalar() or "",
            title=title,
            detail=detail,
            time_ms=newest,
            devices=number,
        )
    statement = select(_row.site, _row.device, _row.last_seen_ms).where(condition, _row.site.in_(single))
    for site, device, last_seen_ms in connection.execute(statement.order_by(_row.last_seen_ms.desc()).limit(MAX_ATTENTION)):
        yield Attention(severity=severity, site=site, device=device, title=title, detail=detail, time_ms=last_seen_ms)


def _group_trouble(connection: Connection, now_ms: int) -> Iterator[Attention]:
    """One item for each kind of trouble with a release, or of a device without one, however many events say so."""
    recent = (_log.kind.in_(tuple(_TROUBLE)), _log.time_ms >= now_ms - ATTENTION_MS)
    of_device = case((_log.version == "", _log.device_id), else_=0).label("of_device")
    model, code = (case((_log.version == "", ""), else_=column) for column in (_log.model, _log.code))
    keys = (_log.kind, model, _log.version, code, of_device)
    is_critical = _log.kind.in_([kind for kind, severity in _TROUBLE.items() if severity == "critical"])
    groups = (
        select(func.max(_log.id).label("newest"), func.count(distinct(_log.device_id)).label("devices"))
        .where(*recent)
        .group_by(*keys)
        .order_by(func.max(case((is_critical, 1), else_=0)).desc(), func.max(_log.id).desc())
        .limit(MAX_ATTENTION)
        .subquery()
    )
    statement = (
        select(tables.events, _row.site, _row.device, groups.c.devices)
        .join(groups, groups.c.newest == _log.id)
        .join(tables.devices, _row.id == _log.device_id)
        .order_by(_log.id.desc())
    )
    return _name_trouble(connection.execute(statement).all())


def _name_trouble(rows: Sequence[Row[Any]]) -> Iterator[Attention]:
    for item in rows:
        release = f" {item.model}@{item.version}" if item.version else ""
        yield Attention(
            severity=_TROUBLE[item.kind],
            site=item.site,
            device=item.device,
            title=f"{_TITLES[item.kind]}{release}",
            detail=item.detail,
            time_ms=item.time_ms,
            devices=item.devices,
            kind=item.kind,
        )
