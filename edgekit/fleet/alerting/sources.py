"""Signals from what the store and the server know themselves; the other parts offer their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, and_, case, distinct, func, select

from edgekit.fleet import tables
from edgekit.fleet.alerting.signals import Signal
from edgekit.fleet.alerting.tables import deliveries
from edgekit.fleet.listing import is_offline, is_stale
from edgekit.fleet.rollout import gates
from edgekit.fleet.services import Services

RECENT_MS = 15 * 60_000
DAY_MS = 86_400_000
GONE_MS = 7 * DAY_MS
"""A device that was not seen for so long does not count any more."""
_FAILED = ("install_refused", "install_failed", "precheck_failed")
_TRIED = (*_FAILED, "install_finished")


def store_signals(services: Services, now_ms: int) -> Iterator[Signal]:
    """Everything that the database says."""
    with services.store.read() as connection:
        yield from _devices(connection, now_ms)
        yield from _shares(connection, now_ms)
        yield from _requests(connection, now_ms)
        yield from _deliveries(connection, now_ms)


def server_signals(services: Services, now_ms: int) -> Iterator[Signal]:
    """How the server itself is doing."""
    if services.ingest is not None:
        yield Signal(name="ingest.lag_s", value=float(services.ingest.status().lag_s), time_ms=now_ms)
    for job in services.jobs.views():
        if job.runs or job.failures:
            failed = Signal(
                name="job.failed", value=float(bool(job.last_error)), labels={"job": job.name}, time_ms=now_ms,
                evidence={"error": job.last_error} if job.last_error else {},
            )  # fmt: skip
            yield failed


def _devices(connection: Connection, now_ms: int) -> Iterator[Signal]:
    """By site: who is away, who is silent, what waits on disks."""
    row = tables.devices.c
    gone = and_(is_offline(), row.is_clean_death.is_(False))
    statement = (
        select(
            row.site,
            func.count(),
            func.sum(case((gone, 1), else_=0)),
            func.sum(case((is_stale(now_ms), 1), else_=0)),
        )
        .where(row.last_seen_ms >= now_ms - GONE_MS)
        .group_by(row.site)
    )
    for site, count, offline, stale in connection.execute(statement):
        for name, number in (("device.offline", offline), ("device.silent", stale)):
            yield Signal(
                name=name,
                value=float(number or 0) / count,
                samples=count,
                labels={"site": site},
                time_ms=now_ms,
                evidence={"devices": float(number or 0)},
            )


def _shares(connection: Connection, now_ms: int) -> Iterator[Signal]:
    """By release, over the last day: how many of the devices that tried it failed, and went back from it."""
    log = tables.events.c

    def devices_with(*kinds: str) -> Any:
        return func.count(distinct(case((log.kind.in_(kinds), log.device_id))))

    statement = (
        select(
            log.model,
            log.version,
            devices_with(*_TRIED),
            devices_with(*_FAILED),
            devices_with("install_finished"),
            devices_with("rolled_back"),
        )
        .where(log.time_ms >= now_ms - DAY_MS, log.kind.in_((*_TRIED, "rolled_back")), log.model != "")
        .where(log.code != "desired.taken_back")
        .group_by(log.model, log.version)
    )
    for model, version, tried, failed, had, back in connection.execute(statement):
        labels = {"model": model, "version": version}
        if tried:
            yield Signal(name="install.failed_share", value=failed / tried, samples=tried, labels=labels, time_ms=now_ms)
        if had or back:
            of = max(had, back)
            yield Signal(name="rolled_back.share", value=back / of, samples=of, labels=labels, time_ms=now_ms)


def _requests(connection: Connection, now_ms: int) -> Iterator[Signal]:
    """By release, over the last quarter of an hour: failures, refused inputs, latency."""
    serves, row = tables.device_models.c, tables.model_windows.c
    since = now_ms - RECENT_MS
    statement = (
        select(serves.model, serves.version, func.sum(row.requests), func.sum(row.errors), func.sum(row.rejected))
        .join(tables.device_models, and_(serves.device_id == row.device_id, serves.model_digest == row.model_digest))
        .where(row.start_ms >= since)
        .group_by(serves.model, serves.version)
    )
    for model, version, requests, errors, rejected in connection.execute(statement).all():
        if not requests:
            continue
        labels = {"model": model, "version": version}
        for name, number in (("error.share", errors), ("rejected.share", rejected)):
            yield Signal(name=name, value=float(number) / float(requests), samples=int(requests), labels=labels, time_ms=now_ms)
        figures = gates.collect(connection, serves.version == version, model=model, since_ms=since, profiles=lambda _crc: None)
        if figures.latencies:
            p95 = figures.latency.quantile(gates.PERCENTILE / 100)
            yield Signal(name="latency.p95_ms", value=p95, samples=figures.latencies, labels=labels, time_ms=now_ms)


def _deliveries(connection: Connection, now_ms: int) -> Iterator[Signal]:
    row = deliveries.c
    failed = connection.execute(
        select(func.count()).where(row.status == "failed", row.created_ms >= now_ms - 3_600_000)
    ).scalar()
    yield Signal(name="delivery.failed", value=float(failed or 0), time_ms=now_ms)
