"""API tokens: for programs. Shown once, kept as a hash, with a role, an end, and the minute of their last use."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Row, insert, select, update

from edgekit.errors import UsageError
from edgekit.fleet import audit
from edgekit.fleet.access.accounts import Account, check_role
from edgekit.fleet.access.guard import ROLES, Actor, Role
from edgekit.fleet.access.sessions import NOTE_MS, hash_secret
from edgekit.fleet.access.tables import api_tokens, users
from edgekit.fleet.access.views import TokenMade, TokenState, TokenView
from edgekit.fleet.store import Store

PREFIX = "ekf_"
"""So that those who look for leaked secrets know one."""
DAY_MS = 86_400_000
MAX_DAYS = 3660
MAX_NAME = 64


class ApiTokens:
    """The tokens in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(
        self, name: str, *, role: str, days: int, actor: str, now_ms: int, owner: Account | None = None, at_most: Role = "admin"
    ) -> TokenMade:
        """Make a token.

        Args:
            name: what it is for.
            role: what it may.
            days: how long it holds.
            actor: who makes it.
            now_ms: Unix time in milliseconds.
            owner: whose it is: it ends with the account, and may never do more than its owner.
            at_most: the role of who makes it.

        Raises:
            UsageError: ``access.role``, ``access.token``.
        """
        wanted = check_role(role)
        if not name.strip() or len(name) > MAX_NAME:
            raise UsageError("access.token", f"a token's name has 1 to {MAX_NAME} characters.", hint="Say what it is for.")
        if not 1 <= days <= MAX_DAYS:
            raise UsageError("access.token", f"{days} days: a token holds for 1 to {MAX_DAYS} days.")
        if ROLES.index(wanted) > ROLES.index(at_most):
            raise UsageError("access.role", f"a token of role {wanted}: {actor} is {at_most} and cannot give more.")
        secret = PREFIX + secrets.token_urlsafe(32)
        values = {
            "name": name.strip(),
            "hash": hash_secret(secret),
            "role": wanted,
            "user_id": owner.id if owner else None,
            "created_by": actor,
            "created_ms": now_ms,
            "expires_ms": now_ms + days * DAY_MS,
        }
        with self._store.write() as connection:
            number = connection.execute(insert(api_tokens).values(**values).returning(api_tokens.c.id)).scalar_one()
            fields: dict[str, str | int] = {"name": name.strip(), "role": role, "days": days}
            subject = f"token:{number}"
            audit.record(connection, actor=actor, action="token.created", subject=subject, fields=fields, now_ms=now_ms)
            item = connection.execute(select(api_tokens).where(api_tokens.c.id == number)).one()
        return TokenMade(token=secret, view=_view(item, now_ms))

    def list(self, now_ms: int, *, owner: int | None = None) -> tuple[TokenView, ...]:
        """The tokens, newest first; of one account when ``owner`` is given."""
        statement = select(api_tokens).order_by(api_tokens.c.id.desc())
        if owner is not None:
            statement = statement.where(api_tokens.c.user_id == owner)
        with self._store.read() as connection:
            return tuple(_view(item, now_ms) for item in connection.execute(statement))

    def revoke(self, number: int, *, actor: str, now_ms: int, owner: int | None = None) -> None:
        """End a token.

        Raises:
            UsageError: ``access.unknown`` when there is none, or it is not the owner's.
        """
        row = api_tokens.c
        condition = (row.id == number, row.revoked_ms == 0, *([row.user_id == owner] if owner is not None else []))
        with self._store.write() as connection:
            if not connection.execute(update(api_tokens).where(*condition).values(revoked_ms=now_ms)).rowcount:
                raise UsageError("access.unknown", f"token {number}: no such token that still holds.")
            audit.record(connection, actor=actor, action="token.revoked", subject=f"token:{number}", now_ms=now_ms)

    def find(self, secret: str, now_ms: int) -> Actor | None:
        """Who comes with a token; None when it does not hold."""
        if not secret.startswith(PREFIX):
            return None
        row = api_tokens.c
        statement = (
            select(api_tokens, users.c.role.label("owner_role"))
            .outerjoin(users, users.c.id == row.user_id)
            .where(row.hash == hash_secret(secret), row.revoked_ms == 0, row.expires_ms > now_ms)
        )
        with self._store.read() as connection:
            item = connection.execute(statement).first()
        if item is None:
            return None
        if now_ms - item.last_used_ms >= NOTE_MS:
            with self._store.write() as connection:
                connection.execute(update(api_tokens).where(row.id == item.id).values(last_used_ms=now_ms))
        return Actor(name=f"token:{item.id} {item.name}", role=_lower(item.role, item.owner_role))


def _lower(role: Role, owner: Role | None) -> Role:
    return role if owner is None else ROLES[min(ROLES.index(role), ROLES.index(owner))]


def _view(item: Row[Any], now_ms: int) -> TokenView:
    state: TokenState = "revoked" if item.revoked_ms else "expired" if item.expires_ms <= now_ms else "valid"
    return TokenView(
        id=item.id,
        name=item.name,
        role=item.role,
        state=state,
        created_by=item.created_by,
        created_ms=item.created_ms,
        expires_ms=item.expires_ms,
        last_used_ms=item.last_used_ms,
    )
