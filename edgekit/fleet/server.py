"""The server: store, broker, ingest, API and pages, wired together and taken down in order."""

from __future__ import annotations

import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
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


def make_app(store: Store, ingest: Ingest | None, *, token: str = "") -> FastAPI:
    """The web application over a store."""
    app = FastAPI(
        title="edgekit fleet", version=__version__, docs_url=None, redoc_url=None, openapi_url=f"{api.PREFIX}/openapi.json"
    )

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if token and not _is_allowed(request, token):
            given = request.query_params.get("token", "")
            if not given or not hmac.compare_digest(given.encode(), token.encode()):
                return Response("401: give the token: Authorization: Bearer TOKEN, or open /?token=TOKEN\n", status_code=401)
            redirect = Response(status_code=303, headers={"Location": request.url.path})
            redirect.set_cookie(TOKEN_COOKIE, token, httponly=True, samesite="strict", max_age=30 * 86400)
            return redirect
        response = await call_next(request)
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


class FleetServer:
    """Everything that ``edgekit fleet serve`` runs."""

    def __init__(self, config: FleetConfig, *, is_plain_allowed: bool = False) -> None:
        """Open the store and check the ports.

        Raises:
            EnvironmentFault: ``port.in_use``, ``store.unreachable``.
            UsageError: ``config.broker`` or ``config.insecure``.
        """
        self.config = config
        check_port(config.port, what="fleet server", option="--port")
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
        return f"http://{self.config.host}:{self.config.port}"

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until SIGINT or SIGTERM.

        Args:
            on_ready: called when the pages can be opened.
        """
        app = make_app(self.store, self.ingest, token=self.config.token)

        @contextlib.asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            on_ready()
            yield

        app.router.lifespan_context = lifespan
        settings = uvicorn.Config(
            app,
            host=self.config.host,
            port=self.config.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        try:
            if self.embedded:
                self.embedded.start()
            self.ingest.start()
            uvicorn.Server(settings).run()
        finally:
            self.ingest.stop()
            if self.embedded:
                self.embedded.stop()
            self.store.close()
