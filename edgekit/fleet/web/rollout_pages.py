"""The pages about rollouts: what is under way, one of them, and what a person decides about it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse

from edgekit.fleet.api import now_ms
from edgekit.fleet.audit import Audit
from edgekit.fleet.rollout.experiments import Arm
from edgekit.fleet.rollout.records import RolloutState
from edgekit.fleet.rollout.service import RolloutService
from edgekit.fleet.web.frame import Form, Operator, Site, back_to, reason_of, with_query
from edgekit.schema.base import Record

STAGES = ("waiting", "asked", "committed", "failed", "reverting", "reverted")
PAGE = 50


class Deed(Record, frozen=True, kw_only=True):
    """Something that a person may do to a rollout in its state."""

    verb: str
    label: str
    explains: str
    is_stop: bool = False


_PAUSE = Deed(verb="pause", label="Pause", explains="Nobody else is asked; devices that were asked go on.")
_RESUME = Deed(
    verb="resume", label="Resume", explains="Goes on. Failures so far are forgiven, silent devices get a new deadline."
)
_HALT = Deed(verb="halt", label="Halt", explains="Nobody else gets it; devices that have it keep it.", is_stop=True)
_BACK = Deed(
    verb="rollback", label="Roll back", explains="Nobody else gets it, and devices that have it are asked back.", is_stop=True
)
_CANCEL = Deed(verb="cancel", label="End for good", explains="It never goes on; devices keep what they have.")
_APPROVE = Deed(verb="approve", label="Approve the next wave", explains="The next wave may begin.")
_DEEDS: dict[RolloutState, tuple[Deed, ...]] = {
    "running": (_PAUSE, _HALT, _BACK),
    "paused": (_RESUME, _HALT, _BACK, _CANCEL),
    "halted": (_RESUME, _BACK, _CANCEL),
    "rolling_back": (_CANCEL,),
    "done": (_BACK,),
}


def _service(site: Site) -> RolloutService:
    found = site.services.rollouts
    if not isinstance(found, RolloutService):
        raise HTTPException(404, "this server runs no rollouts")
    return found


def make_router(site: Site) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    services = site.services

    @router.get("/rollouts", response_class=HTMLResponse)
    def rollouts(request: Request, model: Annotated[str, Query(max_length=64)] = "") -> HTMLResponse:
        views = services.rollouts.views(now_ms(), model=model) if services.rollouts else ()
        experiments = services.experiments.views() if services.experiments else ()
        can_roll_out = services.rollouts is not None and services.sign_desired is not None and services.catalog is not None
        return site.page(
            request,
            "rollouts.html",
            views=views,
            model=model,
            can_roll_out=can_roll_out,
            experiments=[item for item in experiments if model in {"", item.spec.request.model}],
        )

    @router.get("/rollouts/{number}", response_class=HTMLResponse)
    def rollout(
        request: Request,
        number: int,
        stage: Annotated[str, Query(pattern="^(|waiting|asked|committed|failed|reverting|reverted)$")] = "",
        after: Annotated[str, Query(max_length=200)] = "",
    ) -> HTMLResponse:
        service = _service(site)
        view = service.view(number, now_ms())
        page = service.devices(number, stage=stage, after=after, limit=PAGE)
        deeds = _DEEDS.get(view.progress.state, ())
        if view.spec.needs_approval and view.progress.state == "running" and view.progress.approved <= view.progress.wave:
            deeds = (_APPROVE, *deeds)
        return site.page(
            request,
            "rollout.html",
            view=view,
            deeds=deeds,
            page=page,
            stage=stage,
            stages=STAGES,
            decisions=Audit(services.store).page(subject=f"rollout:{number}", limit=50).entries,
            after_path=with_query(f"/rollouts/{number}", {"stage": stage, "after": page.next}) if page.next else "",
        )

    @router.post("/experiments/{number}/stop")
    def stop(number: int, actor: Operator, form: Form) -> Response:
        if services.experiments is None:
            raise HTTPException(404, "this server runs no experiments")
        keep = form.get("keep", "")
        if keep not in {"", "champion", "challenger"}:
            raise HTTPException(400, f"keep={keep[:40]}: expected champion, challenger or nothing")
        arm: Arm | None = "champion" if keep == "champion" else "challenger" if keep == "challenger" else None
        services.experiments.stop(number, keep=arm, actor=actor.name, reason=reason_of(form), now_ms=now_ms())
        return back_to("/rollouts")

    @router.post("/rollouts/{number}/{verb}")
    def change(number: int, verb: str, actor: Operator, form: Form) -> Response:
        service, reason, now = _service(site), reason_of(form), now_ms()
        match verb:
            case "pause":
                service.pause(number, actor=actor.name, reason=reason, now_ms=now)
            case "resume":
                service.resume(number, actor=actor.name, reason=reason, now_ms=now)
            case "approve":
                service.approve(number, actor=actor.name, reason=reason, now_ms=now)
            case "halt":
                service.halt(number, actor=actor.name, reason=reason, now_ms=now)
            case "rollback":
                service.roll_back(number, actor=actor.name, reason=reason, now_ms=now)
            case "cancel":
                service.cancel(number, actor=actor.name, reason=reason, now_ms=now)
            case _:
                raise HTTPException(404, f"{verb[:40]}: expected pause, resume, approve, halt, rollback or cancel")
        services.jobs.wake("rollouts")
        return back_to(f"/rollouts/{number}")

    return router
