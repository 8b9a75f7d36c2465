"""The pages: rendered on the server, kept live by fragments. Nothing is loaded from anywhere else.

Every page has a strict content security policy (no inline script or style); everything that a device said is escaped by the
templates. Static files have their content's hash in the address and may be cached for ever.
"""

from __future__ import annotations

import hashlib
import mimetypes
from importlib import resources
from typing import Annotated, Any, get_args

import jinja2
from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from edgekit.fleet.api import now_ms
from edgekit.fleet.drawing import histogram, sparkline
from edgekit.fleet.live import stream
from edgekit.fleet.store import Store
from edgekit.schema.message import EventKind

POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
PAGE_DEVICES = 50
PAGE_EVENTS = 100
SYMBOLS = {"online": "●", "stale": "◐", "offline": "○"}
SearchQuery = Annotated[str, Query(max_length=100)]
StateQuery = Annotated[str, Query(pattern="^(|online|offline|stale)$")]
NameQuery = Annotated[str, Query(max_length=64)]
AfterQuery = Annotated[str, Query(max_length=200)]
_IMMUTABLE = "public, max-age=31536000, immutable"


def _load_static() -> dict[str, bytes]:
    """Every static file by its path below ``static/``."""
    root = resources.files("edgekit.fleet") / "static"
    found: dict[str, bytes] = {}

    def walk(folder: Any, prefix: str) -> None:
        for item in folder.iterdir():
            if item.is_dir():
                walk(item, f"{prefix}{item.name}/")
            else:
                found[f"{prefix}{item.name}"] = item.read_bytes()

    walk(root, "")
    return found


def _digest(files: dict[str, bytes]) -> str:
    state = hashlib.sha256()
    for name in sorted(files):
        state.update(name.encode() + b"\0" + files[name])
    return state.hexdigest()[:12]


def format_number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure for people; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}".replace(",", "\u202f")
    return f"{text}\u202f{unit}" if unit else text


def ago(time_ms: int, now: int) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0, (now - time_ms) // 1000)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size}\u202f{unit} ago"
    return f"{seconds}\u202fs ago"


def _make_templates(digest: str, version: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgekit.fleet"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.globals.update(
        asset=lambda name: f"/static/{digest}/{name}",
        version=version,
        symbols=SYMBOLS,
        sparkline=sparkline,
        histogram=histogram,
    )
    environment.filters.update(number=format_number, ago=ago)
    return environment


def make_router(store: Store, *, version: str) -> APIRouter:
    """The pages over a store."""
    router = APIRouter(include_in_schema=False)
    static = _load_static()
    current = _digest(static)
    templates = _make_templates(current, version)

    def render(name: str, **values: Any) -> HTMLResponse:
        text = templates.get_template(name).render(now=now_ms(), **values)
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    def overview(name: str, search: str, state: str, after: str) -> HTMLResponse:
        page = store.devices(now_ms=now_ms(), search=search, state=state, after=after, limit=PAGE_DEVICES)
        return render(name, fleet=store.fleet(now_ms()), page=page, search=search, state=state, after=after)

    @router.get("/", response_class=HTMLResponse)
    def index(search: SearchQuery = "", state: StateQuery = "", after: AfterQuery = "") -> HTMLResponse:
        return overview("overview.html", search, state, after)

    @router.get("/fragments/overview", response_class=HTMLResponse)
    def overview_fragment(search: SearchQuery = "", state: StateQuery = "", after: AfterQuery = "") -> HTMLResponse:
        return overview("overview_live.html", search, state, after)

    def device_page(name: str, site: str, device: str) -> HTMLResponse:
        detail = store.device(site, device, now_ms())
        if detail is None:
            raise HTTPException(404, f"{site}/{device}: no such device has reported")
        return render(name, detail=detail, view=detail.device, part="all")

    @router.get("/devices/{site}/{device}", response_class=HTMLResponse)
    def device(site: str, device: str) -> HTMLResponse:
        return device_page("device.html", site, device)

    @router.get("/fragments/devices/{site}/{device}", response_class=HTMLResponse)
    def device_fragment(site: str, device: str) -> HTMLResponse:
        return device_page("device_live.html", site, device)

    @router.get("/events", response_class=HTMLResponse)
    def events(device: NameQuery = "", kind: NameQuery = "", before: int | None = None) -> HTMLResponse:
        page = store.events(device=device, kind=kind, before=before, limit=PAGE_EVENTS)
        return render("events.html", page=page, device=device, kind=kind, kinds=get_args(EventKind))

    @router.get("/api", response_class=HTMLResponse)
    def describe_api(request: Request) -> HTMLResponse:
        return render("api.html", document=request.app.openapi())

    @router.get("/live")
    def live(request: Request) -> StreamingResponse:
        events = stream(store, request.headers.get("last-event-id", ""), request.is_disconnected)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @router.get("/static/{digest}/{path:path}")
    def static_file(digest: str, path: str) -> Response:
        if path not in static:
            raise HTTPException(404, f"{path}: no such file")
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        is_current = digest == current
        return Response(static[path], media_type=kind, headers={"Cache-Control": _IMMUTABLE if is_current else "no-cache"})

    return router
