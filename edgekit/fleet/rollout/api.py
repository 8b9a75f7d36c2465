"""``/api/v1/rollouts`` and ``/api/v1/groups``: reading is for everybody, changing for operators."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Response

from edgekit.errors import UsageError
from edgekit.fleet.access.guard import Actor, require
from edgekit.fleet.api import now_ms
from edgekit.fleet.exchange import answer, body_of, documented, schemas
from edgekit.fleet.groups import Groups, GroupView
from edgekit.fleet.rollout.experiments import Arm, ExperimentRequest, Experiments, ExperimentView
from edgekit.fleet.rollout.records import DryRun, RolloutDevicePage, RolloutView
from edgekit.fleet.rollout.requests import RolloutRequest, make_spec
from edgekit.fleet.rollout.service import RolloutService
from edgekit.fleet.services import Services
from edgekit.schema.base import Record
from edgekit.schema.release import Release

PREFIX = "/api/v1"
_schema, COMPONENTS = schemas((RolloutView, RolloutDevicePage, DryRun, GroupView, RolloutRequest, ExperimentView))
Operator = Annotated[Actor, Depends(require("operator"))]
MAX_REASON = 1000


class Begun(Record, frozen=True, kw_only=True):
    """The number of a new rollout."""

    id: int


class Word(Record, frozen=True, kw_only=True):
    """Why somebody does something."""

    reason: str = ""


class GroupAsked(Record, frozen=True, kw_only=True):
    """``PUT /api/v1/groups/{name}``: a selector, or a list of ``site/device``."""

    selector: str = ""
    devices: tuple[str, ...] = ()
    note: str = ""


class StopAsked(Record, frozen=True, kw_only=True):
    """``POST /api/v1/experiments/{id}/stop``."""

    keep: Arm | None = None
    reason: str = ""


AskedExperiment = Annotated[ExperimentRequest, Depends(body_of(ExperimentRequest))]
AskedStop = Annotated[StopAsked, Depends(body_of(StopAsked))]
AskedRollout = Annotated[RolloutRequest, Depends(body_of(RolloutRequest))]
Said = Annotated[Word, Depends(body_of(Word))]
AskedGroup = Annotated[GroupAsked, Depends(body_of(GroupAsked))]


def make_router(services: Services) -> APIRouter:
    """The routes over ``services.rollouts``."""
    router = APIRouter(prefix=PREFIX, tags=["rollouts"])
    _add_reading(router, services)
    _add_changing(router, services)
    _add_groups(router, Groups(services.store))
    _add_experiments(router, services)
    return router


def _rollouts(services: Services) -> RolloutService:
    found = services.rollouts
    if not isinstance(found, RolloutService):
        raise HTTPException(404, "this server runs no rollouts")
    return found


def _add_reading(router: APIRouter, services: Services) -> None:
    @router.get("/rollouts", responses=documented(_schema[RolloutView], RolloutView, is_list=True), response_class=Response)
    def rollouts(model: Annotated[str, Query(max_length=64)] = "") -> Response:
        """Rollouts, newest first."""
        return answer(_rollouts(services).views(now_ms(), model=model))

    @router.get("/rollouts/{number}", responses=documented(_schema[RolloutView], RolloutView), response_class=Response)
    def rollout(number: int) -> Response:
        """One rollout: waves, gates, what it waits for."""
        return answer(_rollouts(services).view(number, now_ms()))

    @router.get(
        "/rollouts/{number}/devices",
        responses=documented(_schema[RolloutDevicePage], RolloutDevicePage),
        response_class=Response,
    )
    def devices(
        number: int,
        stage: Annotated[str, Query(pattern="^(|waiting|asked|committed|failed|reverting|reverted)$")] = "",
        after: Annotated[str, Query(max_length=200, description="next of the page before")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """A page of a rollout's devices."""
        return answer(_rollouts(services).devices(number, stage=stage, after=after, limit=limit))


def _find_release(services: Services, request: RolloutRequest) -> Release:
    """The release; one that was published a moment ago is looked up in the repository."""
    service = _rollouts(services)
    try:
        return service.find_release(request.model, request.version, channel=request.channel)
    except UsageError as error:
        if services.catalog is None or error.code != "rollout.no_release":
            raise
        services.catalog.refresh(datetime.now(UTC))
        return service.find_release(request.model, request.version, channel=request.channel)


def _add_changing(router: APIRouter, services: Services) -> None:
    @router.post("/rollouts/dry-run", responses=documented(_schema[DryRun], DryRun), response_class=Response)
    def dry_run(actor: Operator, request: AskedRollout) -> Response:  # noqa: ARG001
        """The devices of each wave, by name; nothing is begun."""
        return answer(_rollouts(services).dry_run(make_spec(request, _find_release(services, request)), now_ms()))

    @router.post("/rollouts", response_class=Response)
    def begin(actor: Operator, request: AskedRollout) -> Response:
        """Begin a rollout."""
        service = _rollouts(services)
        spec = make_spec(request, _find_release(services, request))
        number = service.start(spec, actor=actor.name, now_ms=now_ms(), reason=request.reason[:MAX_REASON])
        services.jobs.wake("rollouts")
        return answer(Begun(id=number), status=201)

    @router.post("/rollouts/{number}/{verb}", responses=documented(_schema[RolloutView], RolloutView), response_class=Response)
    def change(number: int, verb: str, actor: Operator, said: Said) -> Response:
        """pause, resume, approve, halt, rollback or cancel, with a reason."""
        service, reason, now = _rollouts(services), said.reason[:MAX_REASON], now_ms()
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
                raise HTTPException(404, f"{verb}: expected pause, resume, approve, halt, rollback or cancel")
        services.jobs.wake("rollouts")
        return answer(service.view(number, now))


def _experiments(services: Services) -> Experiments:
    if services.experiments is None:
        raise HTTPException(404, "this server runs no experiments")
    return services.experiments


def _add_experiments(router: APIRouter, services: Services) -> None:
    described = documented(_schema[ExperimentView], ExperimentView)

    @router.get(
        "/experiments", responses=documented(_schema[ExperimentView], ExperimentView, is_list=True), response_class=Response
    )
    def experiments() -> Response:
        """Champion against challenger, newest first."""
        return answer(_experiments(services).views())

    @router.get("/experiments/{number}", responses=described, response_class=Response)
    def experiment(number: int) -> Response:
        """One experiment: both sides, the difference with its interval, the verdict."""
        return answer(_experiments(services).view(number))

    @router.post("/experiments", response_class=Response)
    def begin(actor: Operator, request: AskedExperiment) -> Response:
        """Begin an experiment."""
        find = _rollouts(services).find_release
        number = _experiments(services).start(
            request,
            champion=find(request.model, request.champion),
            challenger=find(request.model, request.challenger),
            actor=actor.name,
            now_ms=now_ms(),
        )
        return answer(Begun(id=number), status=201)

    @router.post("/experiments/{number}/stop", responses=described, response_class=Response)
    def stop(number: int, actor: Operator, said: AskedStop) -> Response:
        """End an experiment; every device goes to the release that is kept, or stays with what it has."""
        found = _experiments(services)
        found.stop(number, keep=said.keep, actor=actor.name, reason=said.reason, now_ms=now_ms())
        return answer(found.view(number))


def _add_groups(router: APIRouter, groups: Groups) -> None:
    @router.get("/groups", responses=documented(_schema[GroupView], GroupView, is_list=True), response_class=Response)
    def listed() -> Response:
        """The groups of devices."""
        return answer(groups.list())

    @router.get("/groups/{name}", response_class=Response)
    def members(name: str) -> Response:
        """Who is in a group now, as ``site/device``."""
        return answer([f"{site}/{device}" for site, device in groups.members(name)])

    @router.put("/groups/{name}", response_class=Response)
    def put(name: str, actor: Operator, asked: AskedGroup) -> Response:
        """Make a group, or say anew who is in it."""
        groups.put(name, selector=asked.selector, devices=asked.devices, note=asked.note, actor=actor.name, now_ms=now_ms())
        return answer(None)

    @router.delete("/groups/{name}", response_class=Response)
    def remove(name: str, actor: Operator) -> Response:
        """Forget a group; its devices stay."""
        groups.remove(name, actor=actor.name, now_ms=now_ms())
        return answer(None)
