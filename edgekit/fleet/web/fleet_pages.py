"""The pages about devices: the overview, the list, one device, the events, and the picture of them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

import msgspec
from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from edgekit.errors import UsageError
from edgekit.fleet.api import now_ms
from edgekit.fleet.audit import Audit
from edgekit.fleet.groups import Groups
from edgekit.fleet.listing import SORTS, DeviceQuery, Sort
from edgekit.fleet.selector import Selector
from edgekit.fleet.services import Services
from edgekit.fleet.views import DevicePage
from edgekit.fleet.web.frame import Site, with_query
from edgekit.fleet.web.grid import Coloring, GridView, SiteCount, count_sites, name_cells, view_grid
from edgekit.fleet.web.live import Pulse, stream
from edgekit.fleet.web.needs import needs, noticed
from edgekit.fleet.web.reading import count_verdicts, split_events
from edgekit.schema.base import Record
from edgekit.schema.message import EventKind

PAGE_DEVICES = 50
PAGE_EVENTS = 100
DAY_MS = 86_400_000
MINUTES = (10, 60, 1440, 10080)
_Text = Annotated[str, Query(max_length=100)]
_HEADINGS: Mapping[Sort, str] = {
    "device": "device",
    "state": "state",
    "release": "release",
    "latency_p50": "p50 ms",
    "latency_p99": "p99 ms",
    "throughput": "req/s",
    "errors": "errors",
    "last_seen": "last seen",
}


class Heading(Record, frozen=True, kw_only=True):
    """A column's head: where a click on it leads, and how it is sorted now."""

    name: str
    label: str
    href: str
    direction: str = ""
    """``ascending``, ``descending``, or empty."""


class Wanted(Record, frozen=True, kw_only=True):
    """What the address of the list asks for."""

    search: str = ""
    state: str = ""
    selector: str = ""
    sort: Sort = "device"
    is_descending: bool = False
    after: str = ""
    before: str = ""

    def path(self, base: str = "/devices", **changes: object) -> str:
        """The address of the list with something changed; the place in it is kept only when it is given."""
        values: dict[str, object] = {
            "search": self.search,
            "state": self.state,
            "selector": self.selector,
            "sort": "" if self.sort == "device" else self.sort,
            "desc": "1" if self.is_descending else "",
            **changes,
        }
        return with_query(base, values)

    def query(self, groups: Groups) -> DeviceQuery:
        """As the list is asked.

        Raises:
            UsageError: the selector's own.
        """
        selector = Selector.parse(self.selector) if self.selector.strip() else None
        return DeviceQuery(
            search=self.search.strip(),
            state=self.state,
            selector=selector,
            groups=groups.dynamic() if selector is not None and selector.groups() else {},
            sort=self.sort,
            is_descending=self.is_descending,
            after=self.after,
            before=self.before,
            limit=PAGE_DEVICES,
        )

    def headings(self) -> tuple[Heading, ...]:
        """The heads of the columns."""
        return tuple(self._heading(name) for name in _HEADINGS)

    def _heading(self, name: Sort) -> Heading:
        is_here = name == self.sort
        flips = is_here and not self.is_descending if is_here else name not in {"device", "state", "release"}
        href = self.path(sort="" if name == "device" else name, desc="1" if flips else "")
        direction = ("descending" if self.is_descending else "ascending") if is_here else ""
        return Heading(name=name, label=_HEADINGS[name], href=href, direction=direction)


def _as_json(record: Any) -> Response:
    return Response(msgspec.json.encode(record), media_type="application/json", headers={"Cache-Control": "no-store"})


def make_router(site: Site) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    groups = Groups(site.services.store)
    _add_overview(router, site)
    _add_list(router, site, groups)
    _add_grid(router, site, groups)
    _add_device(router, site)
    _add_events(router, site)
    return router


def _add_overview(router: APIRouter, site: Site) -> None:
    services = site.services

    @router.get("/", response_class=HTMLResponse)
    def overview(request: Request) -> HTMLResponse:
        now = now_ms()
        fleet = services.store.fleet(now)
        alerts = services.alerts.open_alerts() if services.alerts else ()
        rollouts = services.rollouts.views(now) if services.rollouts else ()
        with services.store.read() as connection:
            sites = count_sites(connection, DeviceQuery(), now)
        return site.page(
            request,
            "overview.html",
            fleet=fleet,
            needs=needs(alerts, rollouts, now),
            noticed=noticed(fleet.attention),
            in_hand=[alert for alert in alerts if alert.is_acknowledged(now)],
            under_way=[view for view in rollouts if view.progress.state in {"running", "paused", "halted", "rolling_back"}],
            findings=services.watch.findings() if services.watch else (),
            sites=sites,
            ingest=services.ingest.status() if services.ingest else None,
        )


def _add_list(router: APIRouter, site: Site, groups: Groups) -> None:
    services = site.services

    @router.get("/devices", response_class=HTMLResponse)
    def devices(request: Request) -> HTMLResponse:
        wanted = _wanted_of(request)
        now, problem = now_ms(), ""
        page = DevicePage(devices=(), total=0)
        sites: tuple[SiteCount, ...] = ()
        try:
            query = wanted.query(groups)
            with services.store.read() as connection:
                sites = count_sites(connection, query, now)
            page = _list(services, query, now)
        except UsageError as error:
            problem = f"{error.message} {error.hint}".strip()
        return site.page(
            request,
            "devices.html",
            status=400 if problem else 200,
            wanted=wanted,
            view=page,
            sites=sites,
            problem=problem,
            groups=groups.list() if not problem else (),
        )

    @router.get("/devices.csv")
    def devices_csv(request: Request) -> StreamingResponse:
        query = _wanted_of(request).query(groups)
        lines = services.store.export_devices(query, now_ms())
        headers = {"Content-Disposition": 'attachment; filename="devices.csv"', "Cache-Control": "no-store"}
        return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=headers)


def _list(services: Services, query: DeviceQuery, now: int) -> DevicePage:
    return services.store.devices(
        now_ms=now,
        search=query.search,
        state=query.state,
        selector=query.selector,
        groups=query.groups,
        sort=query.sort,
        is_descending=query.is_descending,
        after=query.after,
        before=query.before,
        limit=query.limit,
    )


def _wanted_of(request: Request) -> Wanted:
    """What the address asks for; a site beside a selector is one more condition of it."""
    given = request.query_params
    state, sort = given.get("state", ""), given.get("sort", "") or "device"
    if state not in {"", "online", "offline", "stale"}:
        raise HTTPException(400, f"state={state[:40]}: expected online, stale or offline")
    if sort not in SORTS:
        raise HTTPException(400, f"sort={sort[:40]}: expected one of {', '.join(SORTS)}")
    place = given.get("site", "")[:64]
    parts = (given.get("selector", "")[:1000].strip(" ,"), f"site={place}" if place else "")
    return Wanted(
        search=given.get("search", "")[:100],
        state=state,
        selector=",".join(part for part in parts if part),
        sort=sort,
        is_descending=bool(given.get("desc", "")),
        after=given.get("after", "")[:400],
        before=given.get("before", "")[:400],
    )


def _add_grid(router: APIRouter, site: Site, groups: Groups) -> None:
    services = site.services

    @router.get("/grid")
    def grid(request: Request, color: Coloring = "state") -> Response:
        query = _wanted_of(request).query(groups)
        with services.store.read() as connection:
            view: GridView = view_grid(connection, query, color, now_ms())
        return _as_json(view)

    @router.get("/grid/names")
    def names(
        request: Request,
        first: Annotated[int, Query(ge=0)] = 0,
        count: Annotated[int, Query(ge=1, le=500)] = 500,
    ) -> Response:
        query = _wanted_of(request).query(groups)
        with services.store.read() as connection:
            return _as_json(name_cells(connection, query, first, count, now_ms()))


def _add_device(router: APIRouter, site: Site) -> None:
    services = site.services

    @router.get("/devices/{place}/{device}", response_class=HTMLResponse)
    def device_page(
        request: Request, place: str, device: str, minutes: Annotated[int, Query(ge=1, le=100_000)] = MINUTES[0]
    ) -> HTMLResponse:
        now = now_ms()
        detail = services.store.device(place, device, now)
        if detail is None:
            raise HTTPException(404, f"{place}/{device}: no such device has reported")
        subject = f"device:{place}/{device}"
        return site.page(
            request,
            "device.html",
            detail=detail,
            view=detail.device,
            minutes=minutes,
            choices=MINUTES,
            histories=split_events(detail.events),
            verdicts=count_verdicts(services.store, place, device, now - DAY_MS),
            decisions=Audit(services.store).page(subject=subject, limit=20).entries,
        )


def _add_events(router: APIRouter, site: Site) -> None:
    services = site.services

    @router.get("/events", response_class=HTMLResponse)
    def events(
        request: Request, device: _Text = "", kind: _Text = "", before: Annotated[int | None, Query(ge=0)] = None
    ) -> HTMLResponse:
        place, _, name = device.strip().rpartition("/")
        page = services.store.events(site=place, device=name, kind=kind, before=before, limit=PAGE_EVENTS)
        older = with_query("/events", {"device": device, "kind": kind, "before": page.next})
        return site.page(
            request,
            "events.html",
            view=page,
            device=device,
            kind=kind,
            kinds=get_args(EventKind),
            older=older if page.next else "",
            is_first=before is None,
        )

    config = services.config
    pulse = Pulse(services.store, is_shared=bool(config.group) or config.role == "web")

    @router.get("/live")
    def live(request: Request, after: Annotated[str, Query(max_length=200)] = "") -> StreamingResponse:
        last_id = request.headers.get("last-event-id", "") or after
        changes = stream(pulse, last_id, request.is_disconnected)
        return StreamingResponse(changes, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
