"""Whether this server can work, for those who start and stop servers: no account, no figures, yes or no.

A server that shows pages is ready when its database answers, also while the broker is away: that is when people look. One that
only ingests is ready when it hears the broker, too. What else there is to know, ``/api/v1/health`` tells to those who may ask.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from edgekit.fleet.services import Services

logger = logging.getLogger(__name__)

READY_PATH = "/api/v1/ready"
INGEST_PATHS = frozenset({READY_PATH, "/api/v1/health", "/metrics"})
"""All that a server which only ingests answers."""


def make_router(services: Services) -> APIRouter:
    """The probe."""
    router = APIRouter(tags=["fleet"])

    @router.get(READY_PATH, status_code=HTTPStatus.NO_CONTENT, response_class=Response)
    def ready() -> Response:
        """204 when this server can do its work, 503 when it cannot."""
        try:
            with services.store.read() as connection:
                connection.execute(select(1))
        except SQLAlchemyError as error:
            logger.warning("event=not_ready error=%r", str(error).partition("\n")[0])
            return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        is_deaf = services.config.role == "ingest" and not (services.ingest and services.ingest.status().is_broker_connected)
        return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE if is_deaf else HTTPStatus.NO_CONTENT)

    return router


class IngestOnly:
    """An application of which nothing but the probes and figures can be reached."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"] not in INGEST_PATHS:
            await Response("404: this server only ingests\n", status_code=HTTPStatus.NOT_FOUND)(scope, receive, send)
            return
        await self._app(scope, receive, send)
