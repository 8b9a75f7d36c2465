"""The server: store, broker, ingest, API and pages, wired together and taken down in order."""

from __future__ import annotations

import hmac
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Collection
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

from edgekit import __version__
from edgekit.fleet import api, dashboard
from edgekit.fleet.broker import EmbeddedBroker, check_port
from edgekit.fleet.config import EMBEDDED, BrokerAddress, FleetConfig, parse_broker
from edgekit.fleet.ingest import Ingest
from edgekit.fleet.store import Store
from edgekit.fleet.views import IngestStatus
from edgekit.loopback import is_loopback

logger = logging.getLogger(__name__)

TOKEN_COOKIE = "edgekit-token"  # noqa: S105 - the cookie's name
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def _is_allowed(request: Request, token: str) -> bool:
    """Whether a request carries the token, as a bearer or in the cookie."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    candidates = [given if scheme.lower() == "bearer" else "", request.cookies.get(TOKEN_COOKIE, "")]
    return any(hmac.compare_digest(candidate.encode(), token.encode()) for candidate in candidates if candidate)


def _is_known_host(request: Request, allowed: Collection[str]) -> bool:
    """Whether the browser asked for this machine by a name that is ours.

    Without a token, loopback is the only guard. A foreign page could get past it with a name of its own that resolves to
    127.0.0.1 (DNS rebinding), but not without that name in the Host header.
    """
    try:
        host = request.url.hostname or ""
    except ValueError:
        return False
    return is_loopback(host) or host in allowed


def _make_redirect(request: Request, token: str) -> Response:
    """Keep the token in a cookie, out of the address bar and the history."""
    redirect = Response(status_code=303, headers={"Location": "/" + request.url.path.lstrip("/")})
    is_secure = request.url.scheme == "https"
    redirect.set_cookie(TOKEN_COOKIE, token, httponly=True, secure=is_secure, samesite="strict", max_age=30 * 86400)
    return redirect


def make_app(store: Store, ingest: Ingest | None, *, token: str = "", allowed_hosts: Collection[str] = ()) -> FastAPI:
    """The web application over a store.

    Args:
        store: what it shows.
        ingest: whose status ``/api/v1/health`` tells.
        token: what each request must carry; empty for loopback.
        allowed_hosts: names besides loopback's under which it may be opened without a token.
    """
    app = FastAPI(
        title="edgekit fleet", version=__version__, docs_url=None, redoc_url=None, openapi_url=f"{api.PREFIX}/openapi.json"
    )

    async def answer(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if token and not _is_allowed(request, token):
            given = request.query_params.get("token", "")
            if not given or not hmac.compare_digest(given.encode(), token.encode()):
                return Response("401: give the token: Authorization: Bearer TOKEN, or open /?token=TOKEN\n", status_code=401)
            return _make_redirect(request, token)
        if not token and not _is_known_host(request, allowed_hosts):
            return Response("421: not opened under this name; start the server with --allow-host NAME\n", status_code=421)
        return await call_next(request)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request, call_next)
        for name, value in SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def status() -> IngestStatus:
        return (
            ingest.status()
            if ingest
            else IngestStatus(
                is_broker_connected=False, broker="", received=0, stored=store.stored, duplicates=store.duplicates, malformed=0
            )
        )

    app.include_router(api.make_router(store, status))
    app.include_router(dashboard.make_router(store, version=__version__))
    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Put the records' schemas into the OpenAPI document."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        document.setdefault("components", {}).setdefault("schemas", {}).update(api.COMPONENTS)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


class _WebServer(uvicorn.Server):
    """Says when the port accepts connections."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


class FleetServer:
    """Everything that ``edgekit fleet serve`` runs."""

    def __init__(self, config: FleetConfig, *, is_plain_allowed: bool = False) -> None:
        """Open the store and check the ports.

        Raises:
            EnvironmentFault: ``port.in_use``, ``store.unreachable``.
            UsageError: ``config.broker`` or ``config.insecure``.
        """
        self.config = config
        check_port(config.port, what="fleet server", option="--port", host=config.host)
        self.embedded = EmbeddedBroker(config.broker_port) if config.broker == EMBEDDED else None
        if self.embedded:
            self.address = BrokerAddress(host="127.0.0.1", port=config.broker_port, is_tls=False)
        else:
            self.address = parse_broker(config.broker, ca_file=config.ca_file, is_plain_allowed=is_plain_allowed)
        self.store = Store(config.database)
        self.ingest = Ingest(self.store, self.address, client_id=config.client_id, group=config.group)

    @property
    def url(self) -> str:
        """Where the dashboard is."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.config.port}"

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until SIGINT or SIGTERM, then write what has arrived and end the broker.

        Args:
            on_ready: called when the pages can be opened.

        Raises:
            SystemExit: with 0, after SIGTERM.
        """
        app = make_app(self.store, self.ingest, token=self.config.token, allowed_hosts=self.config.allowed_hosts)
        settings = uvicorn.Config(
            app,
            host=self.config.host,
            port=self.config.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, _end) if is_main else None  # uvicorn raises it again when the pages are closed
        try:
            if self.embedded:
                self.embedded.start()
            self.ingest.start()
            _WebServer(settings, on_ready).run()
        finally:
            if self.embedded:
                self.embedded.stop()  # first: what it confirms to a device after the ingest has left would be lost
            self.ingest.stop()
            self.store.close()
            if is_main:
                signal.signal(signal.SIGTERM, before)
