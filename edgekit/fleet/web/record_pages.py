"""The pages of record: who decided what, and the API as it describes itself."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from edgekit.fleet.audit import Audit
from edgekit.fleet.web.frame import Site, with_query
from edgekit.fleet.web.rendering import absolute
from edgekit.schema.base import Record

PAGE = 100
MAX_EXPORT = 50_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_Subject = Annotated[str, Query(max_length=200)]
_Actor = Annotated[str, Query(max_length=200)]


class Call(Record, frozen=True, kw_only=True):
    """One operation of the API."""

    method: str
    path: str
    summary: str
    parameters: tuple[dict[str, Any], ...] = ()
    answers: str = ""
    """The record that it answers with."""


def list_calls(document: dict[str, Any]) -> dict[str, list[Call]]:
    """The operations of an OpenAPI document by their tag."""
    found: dict[str, list[Call]] = {}
    for path, item in sorted(document["paths"].items()):
        for method, call in item.items():
            schema = call["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
            reference = schema.get("$ref") or schema.get("items", {}).get("$ref", "")
            made = Call(
                method=method.upper(),
                path=path,
                summary=call.get("description", "").strip(),
                parameters=tuple(call.get("parameters", ())),
                answers=reference.rpartition("/")[2] + (" list" if schema.get("type") == "array" else ""),
            )
            found.setdefault((call.get("tags") or ["other"])[0], []).append(made)
    return found


def make_router(site: Site) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    log = Audit(site.services.store)

    @router.get("/audit", response_class=HTMLResponse)
    def audit(
        request: Request, subject: _Subject = "", actor: _Actor = "", before: Annotated[int | None, Query(ge=0)] = None
    ) -> HTMLResponse:
        page = log.page(subject=subject.strip(), actor=actor.strip(), before=before, limit=PAGE)
        query = {"subject": subject, "by": "", "actor": actor}
        older = with_query("/audit", {**query, "before": page.next}) if page.next else ""
        export = with_query("/audit.csv", query)
        return site.page(request, "audit.html", view=page, subject=subject, by=actor, older=older, export=export)

    @router.get("/audit.csv")
    def audit_csv(subject: _Subject = "", actor: _Actor = "") -> StreamingResponse:
        headers = {"Content-Disposition": 'attachment; filename="audit.csv"', "Cache-Control": "no-store"}
        return StreamingResponse(_export(log, subject, actor), media_type="text/csv; charset=utf-8", headers=headers)

    @router.get("/api", response_class=HTMLResponse)
    def describe_api(request: Request) -> HTMLResponse:
        return site.page(request, "api.html", tags=list_calls(request.app.openapi()))

    return router


def _export(log: Audit, subject: str, actor: str) -> Iterator[str]:
    """The log as CSV; what a spreadsheet would run as a formula gets an apostrophe before it."""
    yield _line(["time", "actor", "action", "subject", "reason", "fields"])
    before, count = None, 0
    while count < MAX_EXPORT:
        page = log.page(subject=subject, actor=actor, before=before, limit=500)
        for entry in page.entries:
            fields = " ".join(f"{name}={value}" for name, value in entry.fields.items())
            yield _line([absolute(entry.time_ms), entry.actor, entry.action, entry.subject, entry.reason, fields])
        count, before = count + len(page.entries), page.next
        if before is None:
            return


def _line(values: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow([f"'{value}" if value.startswith(_FORMULA) else value for value in values])
    return out.getvalue()
