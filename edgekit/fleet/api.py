"""``/api/v1``: what the pages show, as JSON; described by ``/api/v1/openapi.json``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, HTTPException, Query, Response

from edgekit import __version__
from edgekit.fleet import views
from edgekit.fleet.store import Store
from edgekit.fleet.views import Health, IngestStatus

PREFIX = "/api/v1"
DEFAULT_SERIES_MS = 3_600_000
MAX_METRICS = 12

_kinds = (views.Health, views.FleetView, views.ReleaseView, views.DevicePage, views.DeviceDetail, views.Series, views.EventPage)
_schemas, COMPONENTS = msgspec.json.schema_components(_kinds, ref_template="#/components/schemas/{name}")
_schema_of: dict[type, Any] = dict(zip(_kinds, _schemas, strict=True))


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def _answer(record: Any) -> Response:
    return Response(msgspec.json.encode(record), media_type="application/json")


def _documented(kind: type, *, is_list: bool = False) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI response of a record."""
    schema: Any = _schema_of[kind]
    schema = {"type": "array", "items": schema} if is_list else schema
    return {200: {"description": (kind.__doc__ or "").splitlines()[0], "content": {"application/json": {"schema": schema}}}}


def make_router(store: Store, ingest: Callable[[], IngestStatus]) -> APIRouter:
    """The routes over a store."""
    router = APIRouter(prefix=PREFIX, tags=["fleet"])
    started = time.monotonic()

    @router.get("/health", responses=_documented(views.Health), response_class=Response)
    def health() -> Response:
        """Whether the server is well: it is when the broker is connected, or is another server's business."""
        status = ingest()
        record = Health(
            is_healthy=status.is_broker_connected or not status.broker,
            version=__version__,
            uptime_s=time.monotonic() - started,
            ingest=status,
        )
        return _answer(record)

    @router.get("/fleet", responses=_documented(views.FleetView), response_class=Response)
    def fleet() -> Response:
        """The overview: states, releases, what needs attention."""
        return _answer(store.fleet(now_ms()))

    @router.get("/releases", responses=_documented(views.ReleaseView, is_list=True), response_class=Response)
    def releases() -> Response:
        """Which model versions run where, and how many devices refuse them."""
        return _answer(store.releases())

    @router.get("/devices", responses=_documented(views.DevicePage), response_class=Response)
    def devices(
        search: Annotated[str, Query(max_length=100, description="part of a site, device, model or version")] = "",
        state: Annotated[str, Query(pattern="^(|online|offline|stale)$", description="online, stale or offline")] = "",
        after: Annotated[str, Query(max_length=200, description="next of the page before")] = "",
        limit: Annotated[int, Query(ge=1, le=500, description="most on a page")] = 50,
    ) -> Response:
        """A page of devices, by site and name."""
        return _answer(store.devices(now_ms=now_ms(), search=search, state=state, after=after, limit=limit))

    @router.get("/devices/{site}/{device}", responses=_documented(views.DeviceDetail), response_class=Response)
    def device_detail(site: str, device: str) -> Response:
        """One device: state, slots, gaps, events, facts."""
        record = store.device(site, device, now_ms())
        if record is None:
            raise HTTPException(404, f"{site}/{device}: no such device has reported")
        return _answer(record)

    @router.get("/devices/{site}/{device}/series", responses=_documented(views.Series, is_list=True), response_class=Response)
    def series(
        site: str,
        device: str,
        metric: Annotated[str, Query(max_length=1000, description="metric names, with commas between")],
        since: Annotated[int, Query(ge=0, description="Unix ms; the last hour by default")] = 0,
        step: Annotated[int, Query(ge=0, description="average in steps of so many ms")] = 0,
    ) -> Response:
        """Metrics over time."""
        begin = since or now_ms() - DEFAULT_SERIES_MS
        names = [name for name in dict.fromkeys(metric.split(",")) if name][:MAX_METRICS]
        return _answer(store.series(site, device, names, since_ms=begin, step_ms=step))

    @router.get("/events", responses=_documented(views.EventPage), response_class=Response)
    def events(
        site: Annotated[str, Query(max_length=64)] = "",
        device: Annotated[str, Query(max_length=64)] = "",
        kind: Annotated[str, Query(max_length=64, description="for example install_refused")] = "",
        before: Annotated[int | None, Query(ge=0, description="next of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=500, description="most on a page")] = 100,
    ) -> Response:
        """Events, newest first."""
        return _answer(store.events(site=site, device=device, kind=kind, before=before, limit=limit))

    return router
