"""The pages about alerts: what fires, one of them with its timeline and deliveries, silences, and what people do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse

from edgekit.errors import UsageError
from edgekit.fleet.alerting.engine import Silence
from edgekit.fleet.alerting.views import AlertPage
from edgekit.fleet.api import now_ms
from edgekit.fleet.web.frame import Form, Operator, Site, back_to, reason_of, with_query

HOUR_MS = 3_600_000
MAX_HOURS = 24 * 90
_State = Annotated[str, Query(pattern="^(|firing|resolved)$")]
_Level = Annotated[str, Query(pattern="^(|info|warning|critical)$")]


def _service(site: Site) -> Any:
    if site.services.alerts is None:
        raise HTTPException(404, "this server watches no rules")
    return site.services.alerts


def _hours(form: Mapping[str, str], *, fallback: float) -> float:
    text = form.get("hours", "")
    try:
        hours = float(text) if text else fallback
    except ValueError as error:
        raise UsageError("silence.time", f"{text[:40]!r}: not a number of hours.", hint="For example 2, or 0.5.") from error
    if not 0 <= hours <= MAX_HOURS:
        raise UsageError("silence.time", f"{hours:g} hours: expected 0 to {MAX_HOURS}.")
    return hours


def read_matchers(text: str) -> dict[str, str]:
    """The matchers of ``rule=*, site=lab``.

    Raises:
        UsageError: ``silence.matchers``.
    """
    found: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not (name and equals and value):
            text = f"{part[:60]!r}: no condition."
            raise UsageError("silence.matchers", text, hint="Write label=pattern with commas between: rule=drift*, site=lab.")
        found[name] = value
    return found


def make_router(site: Site) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    _add_reading(router, site)
    _add_changing(router, site)
    return router


def _add_reading(router: APIRouter, site: Site) -> None:
    @router.get("/alerts", response_class=HTMLResponse)
    def alerts(
        request: Request, state: _State = "firing", level: _Level = "", before: Annotated[int | None, Query(ge=0)] = None
    ) -> HTMLResponse:
        service, now = site.services.alerts, now_ms()
        page = service.page(now, state=state, level=level, before=before) if service else AlertPage(alerts=())
        return site.page(
            request,
            "alerts.html",
            view=page,
            state=state,
            level=level,
            older=with_query("/alerts", {"state": state, "level": level, "before": page.next}) if page.next else "",
            silences=service.silences(now) if service else (),
            failed=service.deliveries(status="failed", limit=20) if service else (),
            rules=service.book.rules if service else (),
            rules_error=service.rules_error if service else "",
            is_watched=service is not None,
        )

    @router.get("/alerts/{number}", response_class=HTMLResponse)
    def alert(request: Request, number: int) -> HTMLResponse:
        view = _service(site).view(number, now_ms())
        matchers = ", ".join(f"{name}={value}" for name, value in {"rule": view.alert.rule, **view.alert.labels}.items())
        return site.page(request, "alert.html", view=view, alert=view.alert, matchers=matchers)


def _add_changing(router: APIRouter, site: Site) -> None:
    @router.post("/alerts/{number}/{verb}")
    def change(number: int, verb: str, actor: Operator, form: Form) -> Response:
        service, now = _service(site), now_ms()
        comment = form.get("comment", "")[:2000]
        match verb:
            case "acknowledge":
                span = round(_hours(form, fallback=0.0) * HOUR_MS)
                service.acknowledge(number, actor=actor.name, comment=comment, for_ms=span, now_ms=now)
            case "unacknowledge":
                service.unacknowledge(number, actor=actor.name, comment=comment, now_ms=now)
            case "assign":
                service.assign(number, assignee=form.get("assignee", "") or actor.name, actor=actor.name, now_ms=now)
            case "comment":
                if not comment:
                    raise HTTPException(400, "say something: the comment is empty")
                service.comment(number, text=comment, actor=actor.name, now_ms=now)
            case _:
                raise HTTPException(404, f"{verb[:40]}: expected acknowledge, unacknowledge, assign or comment")
        return back_to(f"/alerts/{number}")

    @router.post("/silences")
    def silence(actor: Operator, form: Form) -> Response:
        service, now = _service(site), now_ms()
        matchers = read_matchers(form.get("matchers", ""))
        until = now + round(_hours(form, fallback=2.0) * HOUR_MS)
        wanted = Silence(
            matchers=matchers, from_ms=now, until_ms=until, daily=form.get("daily", ""), by=actor.name, why=reason_of(form)
        )
        service.silence(wanted, actor=actor.name, now_ms=now)
        return back_to("/alerts")

    @router.post("/silences/{number}/end")
    def end_silence(number: int, actor: Operator) -> Response:
        _service(site).end_silence(number, actor=actor.name, now_ms=now_ms())
        return back_to("/alerts")
