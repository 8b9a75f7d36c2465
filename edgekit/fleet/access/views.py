"""What is told of accounts, sessions and tokens: never a secret, and never a secret's hash."""

from __future__ import annotations

from typing import Literal

from edgekit.fleet.access.guard import Role
from edgekit.schema.base import Record

TokenState = Literal["valid", "expired", "revoked"]


class UserView(Record, frozen=True, kw_only=True):
    """One account; ``issuer`` is empty for those with a password here."""

    name: str
    role: Role
    issuer: str = ""
    created_ms: int = 0
    last_login_ms: int = 0
    sessions: int = 0


class SessionView(Record, frozen=True, kw_only=True):
    """Somewhere somebody is logged in."""

    user: str
    created_ms: int
    seen_ms: int
    expires_ms: int
    address: str
    agent: str
    is_current: bool = False


class TokenView(Record, frozen=True, kw_only=True):
    """A token without its secret."""

    id: int
    name: str
    role: Role
    state: TokenState
    created_by: str
    created_ms: int
    expires_ms: int
    last_used_ms: int = 0
    """To the minute; 0 for never."""


class TokenMade(Record, frozen=True, kw_only=True):
    """A new token: its secret is here and nowhere else."""

    token: str
    view: TokenView
