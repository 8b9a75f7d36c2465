"""The server: store, broker, ingest, API and pages, wired together and taken down in order."""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp

from edgekit import __version__
from edgekit.errors import UsageError
from edgekit.fleet import api, assembly, openapi
from edgekit.fleet.access import api as access_api
from edgekit.fleet.access.gate import Gate
from edgekit.fleet.access.service import Access
from edgekit.fleet.broker import EmbeddedBroker, check_port
from edgekit.fleet.config import EMBEDDED, BrokerAddress, FleetConfig, parse_broker
from edgekit.fleet.identity.api import OPEN_PATHS
from edgekit.fleet.ingest import Ingest
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.probes import IngestOnly
from edgekit.fleet.services import Services, SignDesired
from edgekit.fleet.store import Store
from edgekit.fleet.views import IngestStatus
from edgekit.fleet.web import site
from edgekit.trust.tls import ServerTls

logger = logging.getLogger(__name__)

MIN_PACKED_BYTES = 700
PACKED_LEVEL = 5


def make_app(
    store: Store,
    ingest: Ingest | None,
    *,
    token: str = "",
    allowed_hosts: Collection[str] = (),
    services: Services | None = None,
) -> FastAPI:
    """The web application over a store.

    Args:
        store: what it shows.
        ingest: whose status ``/api/v1/health`` tells.
        token: what each request must carry; empty for loopback.
        allowed_hosts: names besides loopback's under which it may be opened without a token.
        services: the parts whose API and pages it serves, too; None for what the store alone can tell.
    """
    app = FastAPI(
        title="edgekit fleet", version=__version__, docs_url=None, redoc_url=None, openapi_url=f"{api.PREFIX}/openapi.json"
    )

    def status() -> IngestStatus:
        return (
            ingest.status()
            if ingest
            else IngestStatus(
                is_broker_connected=False, broker="", received=0, stored=store.stored, duplicates=store.duplicates, malformed=0
            )
        )

    app.include_router(api.make_router(store, status))
    parts = services or Services(config=FleetConfig(token=token), store=store, jobs=Jobs(store, owner="pages"))
    parts.access = parts.access or Access(store, token=token)
    for router in assembly.make_routers(parts) if services is not None else [access_api.make_router(parts)]:
        app.include_router(router)
    pages = site.make_site(parts, version=__version__)
    app.include_router(site.make_router(pages))
    site.add_refusals(app, pages)
    app.add_middleware(GZipMiddleware, minimum_size=MIN_PACKED_BYTES, compresslevel=PACKED_LEVEL)
    app.add_middleware(Gate, access=parts.access, allowed_hosts=allowed_hosts, open_paths=OPEN_PATHS)
    openapi.complete(app)
    return app


class _WebServer(uvicorn.Server):
    """Says when the port accepts connections."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _open_tls(config: FleetConfig) -> ssl.SSLContext | None:
    """How the pages are served; None for plain HTTP."""
    if not (config.tls_cert or config.tls_key or config.client_ca or config.crl):
        return None
    if not (config.tls_cert and config.tls_key):
        raise UsageError("tls.files", "TLS needs a certificate and its key.", hint="Give both --tls-cert and --tls-key.")
    return ServerTls(
        cert=Path(config.tls_cert),
        key=Path(config.tls_key),
        client_ca=Path(config.client_ca) if config.client_ca else None,
        crl=Path(config.crl) if config.crl else None,
    ).context()


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


class FleetServer:
    """Everything that ``edgekit fleet serve`` runs."""

    def __init__(self, config: FleetConfig, *, is_plain_allowed: bool = False, sign_desired: SignDesired | None = None) -> None:
        """Open the store and check the ports.

        Args:
            config: addresses, database, broker.
            is_plain_allowed: accept a broker without TLS off loopback.
            sign_desired: signs desired states with the fleet's key; without it nothing can be rolled out.

        Raises:
            EnvironmentFault: ``port.in_use``, ``store.unreachable``.
            UsageError: ``config.broker``, ``config.insecure``, ``tls.files`` or a part's own.
        """
        self.config = config
        self._tls = _open_tls(config)
        check_port(config.port, what="fleet server", option="--port", host=config.host)
        self.embedded = EmbeddedBroker(config.broker_port) if config.broker == EMBEDDED else None
        if self.embedded:
            self.address = BrokerAddress(host="127.0.0.1", port=config.broker_port, is_tls=False)
        else:
            self.address = parse_broker(
                config.broker,
                ca_file=config.ca_file,
                cert_file=config.cert_file,
                key_file=config.key_file,
                is_plain_allowed=is_plain_allowed,
            )
        self.store = Store(config.database)
        self.ingest = Ingest(self.store, self.address, client_id=config.client_id, group=config.group)
        self.services = assembly.assemble(config, self.store, sign_desired=sign_desired)
        self.services.ingest = self.ingest
        self.services.address = self.address

    @property
    def url(self) -> str:
        """Where the dashboard is."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"{'https' if self.config.tls_cert else 'http'}://{host}:{self.config.port}"

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until SIGINT or SIGTERM, then write what has arrived and end the broker.

        Args:
            on_ready: called when the pages can be opened.

        Raises:
            SystemExit: with 0, after SIGTERM.
        """
        app: ASGIApp = make_app(
            self.store,
            None if self.config.role == "web" else self.ingest,
            token=self.config.token,
            allowed_hosts=self.config.allowed_hosts,
            services=self.services,
        )
        if self.config.role == "ingest":
            app = IngestOnly(app)
        settings = uvicorn.Config(
            app,
            host=self.config.host,
            port=self.config.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        settings.load()
        settings.ssl = self._tls
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, _end) if is_main else None  # uvicorn raises it again when the pages are closed
        try:
            if self.embedded:
                self.embedded.start()
            if self.config.role != "web":
                self.ingest.start()
            if self.config.role != "ingest":
                assembly.start(self.services)
            _WebServer(settings, on_ready).run()
        finally:
            if self.config.role != "ingest":
                assembly.stop(self.services)
            if self.embedded:
                self.embedded.stop()  # first: what it confirms to a device after the ingest has left would be lost
            if self.config.role != "web":
                self.ingest.stop()
            self.store.close()
            if is_main:
                signal.signal(signal.SIGTERM, before)
