"""Who asks, and what they may: every route that changes something names the role that it needs.

@router.post("/rollouts/{id}/halt")
def halt(id: int, actor: Annotated[Actor, Depends(require("operator"))]) -> Response: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from fastapi import HTTPException, Request

from edgekit.schema.base import Record

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""From the least to the most; each may what those before it may."""


class Actor(Record, frozen=True, kw_only=True):
    """Who does something: ``name`` is what the audit log says."""

    name: str
    role: Role = "viewer"

    def may(self, role: Role) -> bool:
        """Whether this role includes another."""
        return ROLES.index(self.role) >= ROLES.index(role)


LOCAL = Actor(name="local", role="admin")
"""Whoever sits at this machine, where nobody has an account yet."""


def actor_of(request: Request) -> Actor | None:
    """Who the middleware found this request to come from; None for nobody."""
    actor = getattr(request.state, "actor", None)
    return actor if isinstance(actor, Actor) else None


def require(role: Role) -> Callable[[Request], Actor]:
    """A dependency that gives the actor, or answers 401 or 403."""

    def check(request: Request) -> Actor:
        actor = actor_of(request)
        if actor is None:
            raise HTTPException(401, "log in, or give a token: Authorization: Bearer TOKEN")
        if not actor.may(role):
            raise HTTPException(403, f"{actor.name} is {actor.role}: this needs {role}")
        return actor

    return check
