"""Drift, quality and versions over HTTP, and the budget of the watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse

from edgekit.errors import ArtifactError, UsageError
from edgekit.fleet.access.guard import Actor, require
from edgekit.fleet.services import Services
from edgekit.fleet.watch.pages import DAY_MS
from edgekit.fleet.watch.service import Watch
from edgekit.fleet.watch.views import Budget, DriftPage, Finding, QualityPage, VersionsPage
from edgekit.schema.base import decode_json

PREFIX = "/api/v1"
MAX_BODY = 16_384
_kinds = (DriftPage, QualityPage, VersionsPage, Budget, Finding)
_schemas, COMPONENTS = msgspec.json.schema_components(_kinds, ref_template="#/components/schemas/{name}")
_schema_of: dict[type, Any] = dict(zip(_kinds, _schemas, strict=True))
Since = Annotated[int, Query(ge=0, description="Unix milliseconds; the last day without it")]


def _documented(kind: type, *, is_list: bool = False) -> dict[int | str, dict[str, Any]]:
    schema: Any = _schema_of[kind]
    schema = {"type": "array", "items": schema} if is_list else schema
    return {200: {"description": (kind.__doc__ or "").splitlines()[0], "content": {"application/json": {"schema": schema}}}}


def _json(record: Any) -> Response:
    return Response(msgspec.json.encode(record), media_type="application/json")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def _answer(work: Callable[[], Any]) -> Response:
    return _json(await asyncio.to_thread(work))


def make_router(services: Services) -> APIRouter:
    """The routes of the watch."""
    router = APIRouter(prefix=PREFIX, tags=["watch"])
    watch: Watch = services.watch

    @router.get("/drift/{model}", responses=_documented(DriftPage))
    async def drift(
        model: str,
        since_ms: Since = 0,
        slice_name: Annotated[str, Query(alias="slice", max_length=200, description="show all streams of this slice")] = "",
    ) -> Response:
        """A model's streams against their reference, alarms first."""
        now_ms = _now_ms()
        return await _answer(lambda: watch.drift(model, since_ms or now_ms - DAY_MS, now_ms=now_ms, slice_name=slice_name))

    @router.get("/drift/{model}/budget", responses=_documented(Budget))
    async def budget(model: str) -> Response:
        """What is asked of the watch on a model."""
        return await _answer(lambda: watch.budget(model))

    @router.put("/drift/{model}/budget", responses=_documented(Budget))
    async def set_budget(
        model: str,
        request: Request,
        actor: Annotated[Actor, Depends(require("operator"))],
        reason: Annotated[str, Query(max_length=2000)] = "",
    ) -> Response:
        """Ask something else of it."""
        body = await request.body()
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"at most {MAX_BODY} bytes are read")
        try:
            asked = decode_json(body, Budget, name="budget")
            await asyncio.to_thread(lambda: watch.set_budget(model, asked, actor=actor.name, now_ms=_now_ms(), reason=reason))
        except (ArtifactError, UsageError) as error:
            raise HTTPException(400, error.message) from error
        return _json(asked)

    @router.get("/drift/{model}/windows", response_class=StreamingResponse)
    def windows(model: str, since_ms: Since = 0, until_ms: Annotated[int, Query(ge=0)] = 0) -> StreamingResponse:
        """The windows as devices sent them, a JSON record a line: what ``edgekit monitor replay`` reads."""
        now_ms = _now_ms()
        found = watch.export(model, since_ms=since_ms or now_ms - DAY_MS, until_ms=until_ms or now_ms)
        name = f'attachment; filename="{"".join(each for each in model if each.isalnum() or each in "-_")}.windows.jsonl"'
        lines = (msgspec.json.encode(each) + b"\n" for each in found)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Content-Disposition": name})

    @router.get("/quality/{model}", responses=_documented(QualityPage))
    async def quality(model: str, since_ms: Since = 0) -> Response:
        """Estimated and realised quality by slice."""
        return await _answer(lambda: watch.quality(model, now_ms=_now_ms(), since_ms=since_ms))

    @router.get("/models/{model}/versions", responses=_documented(VersionsPage))
    async def versions(model: str, since_ms: Since = 0) -> Response:
        """Versions beside each other, by class of devices."""
        return await _answer(lambda: watch.versions_page(model, now_ms=_now_ms(), since_ms=since_ms))

    @router.get("/findings", responses=_documented(Finding, is_list=True))
    async def findings(model: Annotated[str, Query(max_length=64)] = "") -> Response:
        """What was found and lasts."""
        return await _answer(lambda: watch.findings(model))

    return router
