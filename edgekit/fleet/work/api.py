"""``/api/v1/work`` and ``/api/v1/samples``: counts are for everybody, samples and orders for operators."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Query, Response

from edgekit.fleet.access.guard import Actor, require
from edgekit.fleet.api import now_ms
from edgekit.fleet.exchange import answer, body_of, documented, schemas
from edgekit.fleet.services import Services
from edgekit.fleet.work.orders import Work
from edgekit.fleet.work.samples import MAX_PAGE, Samples
from edgekit.schema.base import Record
from edgekit.schema.work import SampleCount, SamplePage, WorkKind, WorkOrder

PREFIX = "/api/v1"
_schema, COMPONENTS = schemas((WorkOrder, SamplePage, SampleCount))
Operator = Annotated[Actor, Depends(require("operator"))]
MSGPACK = "application/msgpack"


class OrderAsked(Record, frozen=True, kw_only=True):
    """``POST /api/v1/work``."""

    kind: WorkKind
    model: str
    reason: str = ""
    manifest: str = ""


class WorkerSaid(Record, frozen=True, kw_only=True):
    """``POST /api/v1/work/{id}/take`` and ``finish``."""

    worker: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    is_done: bool = True
    result: str = ""


AskedOrder = Annotated[OrderAsked, Depends(body_of(OrderAsked))]
Said = Annotated[WorkerSaid, Depends(body_of(WorkerSaid))]


def make_router(services: Services) -> APIRouter:
    """The routes over ``services.work``."""
    router = APIRouter(prefix=PREFIX, tags=["work"])
    _add_orders(router, services)
    _add_samples(router, Samples(services.store))
    return router


def _work(services: Services) -> Work:
    found = services.work
    if not isinstance(found, Work):
        raise HTTPException(404, "this server keeps no work orders")
    return found


def _add_orders(router: APIRouter, services: Services) -> None:
    @router.get("/work", responses=documented(_schema[WorkOrder], WorkOrder, is_list=True), response_class=Response)
    def orders(
        model: Annotated[str, Query(max_length=64)] = "",
        state: Annotated[str, Query(pattern="^(|open|taken|done|failed)$")] = "",
    ) -> Response:
        """Work orders, newest first."""
        return answer(_work(services).list(model=model, state=state))

    @router.get("/work/{number}", responses=documented(_schema[WorkOrder], WorkOrder), response_class=Response)
    def order(number: int) -> Response:
        """One work order."""
        return answer(_work(services).get(number))

    @router.post("/work", responses=documented(_schema[WorkOrder], WorkOrder), response_class=Response)
    def begin(actor: Operator, asked: AskedOrder) -> Response:
        """Open a work order; the open one of this kind and model if there is one."""
        made = _work(services).open(
            kind=asked.kind, model=asked.model, reason=asked.reason, manifest=asked.manifest, actor=actor.name, now_ms=now_ms()
        )
        return answer(made, status=201)

    @router.post("/work/{number}/take", responses=documented(_schema[WorkOrder], WorkOrder), response_class=Response)
    def take(number: int, actor: Operator, said: Said) -> Response:
        """Take an order, or say again that one is at it."""
        return answer(_work(services).take(number, worker=said.worker, now_ms=now_ms(), actor=actor.name))

    @router.post("/work/{number}/finish", responses=documented(_schema[WorkOrder], WorkOrder), response_class=Response)
    def finish(number: int, actor: Operator, said: Said) -> Response:
        """Say what came of it."""
        done = _work(services).finish(
            number, worker=said.worker, is_done=said.is_done, result=said.result, now_ms=now_ms(), actor=actor.name
        )
        return answer(done)


def _add_samples(router: APIRouter, samples: Samples) -> None:
    @router.get(
        "/samples/counts", responses=documented(_schema[SampleCount], SampleCount, is_list=True), response_class=Response
    )
    def counts() -> Response:
        """How many samples of each model devices have given, and how many have labels."""
        return answer(samples.counts())

    @router.get("/samples", response_class=Response)
    def page(
        *,
        actor: Operator,
        model: Annotated[str, Query(max_length=64)] = "",
        digest: Annotated[str, Query(max_length=64, description="first 12 hex digits of the model file")] = "",
        since_ms: Annotated[int, Query(ge=0)] = 0,
        after: Annotated[str, Query(max_length=80, description="next of the page before")] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    ) -> Response:
        """Samples with their labels, as MessagePack (``SamplePage``): tensors are bytes. Who takes them is written down."""
        if not after:
            samples.note_export(model=model, model_digest=digest, actor=actor.name, now_ms=now_ms())
        found = samples.page(model=model, model_digest=digest, since_ms=since_ms, after=after, limit=limit)
        return Response(msgspec.msgpack.encode(found), media_type=MSGPACK, headers={"Cache-Control": "no-store"})
