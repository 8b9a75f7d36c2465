"""``/api/v1/users`` and ``/api/v1/tokens``, and who one is."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from edgekit.fleet.access.guard import Actor, require
from edgekit.fleet.access.service import Access
from edgekit.fleet.access.views import TokenMade, TokenView, UserView
from edgekit.fleet.exchange import answer, body_of, documented, schemas
from edgekit.fleet.services import Services
from edgekit.schema.base import Record

PREFIX = "/api/v1"
Viewer = Annotated[Actor, Depends(require("viewer"))]
Operator = Annotated[Actor, Depends(require("operator"))]
Admin = Annotated[Actor, Depends(require("admin"))]


class Me(Record, frozen=True, kw_only=True):
    """Who asks, and what they may."""

    name: str
    role: str


class UserAsked(Record, frozen=True, kw_only=True):
    """``POST /api/v1/users``."""

    name: str
    password: str
    role: str = "viewer"


class RoleAsked(Record, frozen=True, kw_only=True):
    """``PUT /api/v1/users/{name}/role``."""

    role: str


class PasswordAsked(Record, frozen=True, kw_only=True):
    """``PUT /api/v1/users/{name}/password``."""

    password: str


class TokenAsked(Record, frozen=True, kw_only=True):
    """``POST /api/v1/tokens``."""

    name: str
    role: str = "viewer"
    days: int = 90


_schema, COMPONENTS = schemas((Me, UserView, TokenView, TokenMade, UserAsked, RoleAsked, PasswordAsked, TokenAsked))
AskedUser = Annotated[UserAsked, Depends(body_of(UserAsked))]
AskedRole = Annotated[RoleAsked, Depends(body_of(RoleAsked))]
AskedPassword = Annotated[PasswordAsked, Depends(body_of(PasswordAsked))]
AskedToken = Annotated[TokenAsked, Depends(body_of(TokenAsked))]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def make_router(services: Services) -> APIRouter:
    """The routes over ``services.access``."""
    router = APIRouter(prefix=PREFIX, tags=["access"])
    access = services.access
    assert isinstance(access, Access)

    @router.get("/me", responses=documented(_schema[Me], Me), response_class=Response)
    def me(actor: Viewer) -> Response:
        """Who you are here, and your role."""
        return answer(Me(name=actor.name, role=actor.role))

    _add_users(router, access)
    _add_tokens(router, access)
    return router


def _add_users(router: APIRouter, access: Access) -> None:
    @router.get("/users", responses=documented(_schema[UserView], UserView, is_list=True), response_class=Response)
    def users(_actor: Admin) -> Response:
        """Every account."""
        return answer(access.accounts.list())

    @router.post("/users", status_code=201, response_class=Response)
    async def add(actor: Admin, asked: AskedUser) -> Response:
        """Make an account; the first one must be an admin."""
        await asyncio.to_thread(
            access.accounts.add,
            asked.name,
            role=asked.role,
            password=asked.password,
            actor=actor.name,
            now_ms=_now_ms(),
        )
        return Response(status_code=201)

    @router.put("/users/{name}/role", status_code=204, response_class=Response)
    def set_role(name: str, actor: Admin, asked: AskedRole) -> Response:
        """Give another role."""
        access.accounts.set_role(name, asked.role, actor=actor.name, now_ms=_now_ms())
        return Response(status_code=204)

    @router.put("/users/{name}/password", status_code=204, response_class=Response)
    async def set_password(name: str, actor: Admin, asked: AskedPassword) -> Response:
        """Give another password; every session of the account ends."""
        await asyncio.to_thread(access.accounts.set_password, name, asked.password, actor=actor.name, now_ms=_now_ms())
        return Response(status_code=204)

    @router.delete("/users/{name}", status_code=204, response_class=Response)
    def remove(name: str, actor: Admin) -> Response:
        """Remove an account with its sessions and tokens."""
        access.accounts.remove(name, actor=actor.name, now_ms=_now_ms())
        return Response(status_code=204)


def _add_tokens(router: APIRouter, access: Access) -> None:
    def own(request: Request, actor: Actor) -> int | None:
        """Whose tokens somebody may see: an admin everybody's, a user his own, a token none."""
        return None if actor.may("admin") else (request.state.user_id or -1)

    @router.get("/tokens", responses=documented(_schema[TokenView], TokenView, is_list=True), response_class=Response)
    def tokens(request: Request, actor: Viewer) -> Response:
        """Tokens without their secrets: one's own, for an admin everybody's."""
        return answer(access.tokens.list(_now_ms(), owner=own(request, actor)))

    @router.post("/tokens", responses=documented(_schema[TokenMade], TokenMade), response_class=Response)
    def create(request: Request, actor: Operator, asked: AskedToken) -> Response:
        """Make a token with no more than one's own role. Its secret is in this answer and nowhere else."""
        made = access.create_token(
            asked.name, role=asked.role, days=asked.days, actor=actor, now_ms=_now_ms(), user_id=request.state.user_id
        )
        return answer(made, status=201)

    @router.delete("/tokens/{number}", status_code=204, response_class=Response)
    def revoke(request: Request, number: int, actor: Operator) -> Response:
        """End a token."""
        access.tokens.revoke(number, actor=actor.name, now_ms=_now_ms(), owner=own(request, actor))
        return Response(status_code=204)
