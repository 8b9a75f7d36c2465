"""``/api/v1/alerts``, ``/silences``, ``/deliveries``, ``/rules``: reading is for everybody, changing for operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Response

from edgekit.fleet.access.guard import Actor, require
from edgekit.fleet.alerting.engine import Silence
from edgekit.fleet.alerting.rules import RuleBook
from edgekit.fleet.alerting.service import Alerts
from edgekit.fleet.alerting.views import AlertPage, AlertView, DeliveryView
from edgekit.fleet.api import now_ms
from edgekit.fleet.exchange import answer, body_of, documented, schemas
from edgekit.fleet.services import Services
from edgekit.schema.base import Record

PREFIX = "/api/v1"
_schema, COMPONENTS = schemas((AlertPage, AlertView, Silence, DeliveryView))
Operator = Annotated[Actor, Depends(require("operator"))]


class Said(Record, frozen=True, kw_only=True):
    """What somebody says to an alert."""

    comment: str = ""
    for_min: float = 0.0
    """Of an acknowledgement: how long it holds; 0: as long as the alert lasts."""
    assignee: str = ""


class SilenceAsked(Record, frozen=True, kw_only=True):
    """``POST /api/v1/silences``: labels, or ``rule``, with patterns; from now on for some minutes."""

    matchers: dict[str, str]
    for_min: float
    daily: str = ""
    why: str = ""


class RuleState(Record, frozen=True, kw_only=True):
    """The rules in force; ``error`` says why the file was refused when it changed last. Addresses are not shown."""

    book: RuleBook
    error: str = ""


AskedSaid = Annotated[Said, Depends(body_of(Said))]
AskedSilence = Annotated[SilenceAsked, Depends(body_of(SilenceAsked))]


def make_router(services: Services) -> APIRouter:
    """The routes over ``services.alerts``."""
    router = APIRouter(prefix=PREFIX, tags=["alerts"])
    _add_reading(router, services)
    _add_changing(router, services)
    _add_silences(router, services)
    return router


def _alerts(services: Services) -> Alerts:
    found = services.alerts
    if not isinstance(found, Alerts):
        raise HTTPException(404, "this server watches no rules")
    return found


def _add_reading(router: APIRouter, services: Services) -> None:
    @router.get("/alerts", responses=documented(_schema[AlertPage], AlertPage), response_class=Response)
    def alerts(
        state: Annotated[str, Query(pattern="^(|firing|resolved)$")] = "",
        level: Annotated[str, Query(pattern="^(|info|warning|critical)$")] = "",
        before: Annotated[int | None, Query(ge=0, description="next of the page before")] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> Response:
        """Alerts, newest first."""
        return answer(_alerts(services).page(now_ms(), state=state, level=level, before=before, limit=limit))

    @router.get("/alerts/{number}", responses=documented(_schema[AlertView], AlertView), response_class=Response)
    def alert(number: int) -> Response:
        """One alert: evidence, timeline, deliveries."""
        return answer(_alerts(services).view(number, now_ms()))

    @router.get("/deliveries", responses=documented(_schema[DeliveryView], DeliveryView, is_list=True), response_class=Response)
    def deliveries(
        status: Annotated[str, Query(pattern="^(|pending|sent|failed)$")] = "",
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> Response:
        """What was sent to whom, newest first."""
        return answer(_alerts(services).deliveries(status=status, limit=limit))

    @router.get("/rules", response_class=Response)
    def rules() -> Response:
        """The rules in force, without addresses."""
        service = _alerts(services)
        return answer(RuleState(book=without_addresses(service.book), error=service.rules_error))


def without_addresses(book: RuleBook) -> RuleBook:
    """Rules as they may be shown: contacts by name alone."""
    return RuleBook(
        rules=book.rules,
        contacts=tuple(type(contact)(name=contact.name, urls=()) for contact in book.contacts),
        escalations=book.escalations,
    )


def _add_changing(router: APIRouter, services: Services) -> None:
    @router.post("/alerts/{number}/{verb}", responses=documented(_schema[AlertView], AlertView), response_class=Response)
    def change(number: int, verb: str, actor: Operator, said: AskedSaid) -> Response:
        """ack, unack, assign or comment."""
        service, now, who = _alerts(services), now_ms(), actor.name
        match verb:
            case "ack":
                service.acknowledge(number, actor=who, comment=said.comment, for_ms=round(said.for_min * 60_000), now_ms=now)
            case "unack":
                service.unacknowledge(number, actor=who, comment=said.comment, now_ms=now)
            case "assign":
                service.assign(number, assignee=said.assignee, actor=who, now_ms=now)
            case "comment":
                service.comment(number, text=said.comment, actor=who, now_ms=now)
            case _:
                raise HTTPException(404, f"{verb}: expected ack, unack, assign or comment")
        return answer(service.view(number, now))

    @router.post("/contacts/{name}/test", response_class=Response)
    def test_contact(name: str, actor: Operator) -> Response:
        """Send a test message to each address of a contact."""
        count = _alerts(services).test_contact(name, actor=actor.name, now_ms=now_ms())
        services.jobs.wake("deliveries")
        return answer({"messages": count}, status=202)


def _add_silences(router: APIRouter, services: Services) -> None:
    @router.get("/silences", responses=documented(_schema[Silence], Silence, is_list=True), response_class=Response)
    def silences() -> Response:
        """Silences that are not over."""
        return answer(_alerts(services).silences(now_ms()))

    @router.post("/silences", response_class=Response)
    def silence(actor: Operator, asked: AskedSilence) -> Response:
        """Tell nobody of what matches, for a time."""
        now = now_ms()
        wanted = Silence(
            matchers=asked.matchers, from_ms=now, until_ms=now + round(asked.for_min * 60_000), daily=asked.daily, why=asked.why
        )
        return answer({"id": _alerts(services).silence(wanted, actor=actor.name, now_ms=now)}, status=201)

    @router.delete("/silences/{number}", response_class=Response)
    def end(number: int, actor: Operator) -> Response:
        """People are told again."""
        _alerts(services).end_silence(number, actor=actor.name, now_ms=now_ms())
        return answer(None)
