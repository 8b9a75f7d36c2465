"""All pages together: what the server includes beside its API."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler, request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from edgekit.errors import EdgekitError
from edgekit.fleet.exchange import refusal
from edgekit.fleet.services import Services
from edgekit.fleet.web import (
    access_pages,
    alert_pages,
    fleet_pages,
    model_pages,
    record_pages,
    rollout_pages,
)
from edgekit.fleet.web.frame import Site, is_page
from edgekit.fleet.web.rendering import Renderer, StaticFiles


def make_site(services: Services, *, version: str) -> Site:
    """The pages' frame over the parts of a server."""
    return Site(services, Renderer(StaticFiles(), version=version))


def add_refusals(app: FastAPI, site: Site) -> None:
    """Errors as pages for people and as JSON for programs."""

    @app.exception_handler(EdgekitError)
    async def refuse(request: Request, error: EdgekitError) -> Response:
        if not is_page(request):
            return refusal(error)
        return await asyncio.to_thread(site.refuse_error, request, error)

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> Response:
        if not is_page(request):
            return await http_exception_handler(request, error)
        return await asyncio.to_thread(site.refuse, request, error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def refuse_query(request: Request, error: RequestValidationError) -> Response:
        if not is_page(request):
            return await request_validation_exception_handler(request, error)
        problems = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
        return await asyncio.to_thread(site.refuse, request, 400, problems[:500])


def make_router(site: Site) -> APIRouter:
    """Every page."""
    router = APIRouter(include_in_schema=False)
    static = site.renderer.static

    @router.get("/static/{digest}/{path:path}")
    def static_file(request: Request, digest: str, path: str) -> Response:
        return static.answer(request, digest, path)

    for part in (fleet_pages, model_pages, rollout_pages, alert_pages, record_pages, access_pages):
        router.include_router(part.make_router(site))
    return router
