"""Accounts: a name, a role, and a password or an identity elsewhere.

>>> from edgekit.fleet.store import Store
>>> accounts = Accounts(Store("sqlite://"))
>>> accounts.add("lee", role="operator", password="correct horse battery", actor="local", now_ms=1)
>>> accounts.list()[0].role
'operator'
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from edgekit.errors import UsageError
from edgekit.fleet import audit
from edgekit.fleet.access.guard import ROLES, Role
from edgekit.fleet.access.passwords import check_password, hash_password, is_outdated, is_right
from edgekit.fleet.access.tables import api_tokens, sessions, users
from edgekit.fleet.access.views import UserView
from edgekit.fleet.store import Store
from edgekit.schema.base import Record

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}\Z")
RESERVED = frozenset({"local", "token", "system"})
"""Names that the audit log gives to others."""


class Account(Record, frozen=True, kw_only=True):
    """Who was found."""

    id: int
    name: str
    role: Role


def check_role(role: str) -> Role:
    """A role by its name.

    Raises:
        UsageError: ``access.role``.
    """
    for known in ROLES:
        if role == known:
            return known
    raise UsageError("access.role", f"{role}: no such role.", hint=f"Choose {', '.join(ROLES)}.")


class Accounts:
    """The accounts in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def has_any(self) -> bool:
        """Whether anybody has an account."""
        with self._store.read() as connection:
            return connection.execute(select(users.c.id).limit(1)).first() is not None

    def list(self) -> tuple[UserView, ...]:
        """Every account, by name."""
        row = users.c
        count = select(func.count()).where(sessions.c.user_id == row.id).scalar_subquery()
        with self._store.read() as connection:
            found = connection.execute(select(users, count.label("open")).order_by(row.name)).all()
        return tuple(
            UserView(
                name=item.name,
                role=item.role,
                issuer=item.issuer,
                created_ms=item.created_ms,
                last_login_ms=item.last_login_ms,
                sessions=item.open,
            )
            for item in found
        )

    def find(self, name: str) -> Account | None:
        """An account by its name."""
        with self._store.read() as connection:
            item = connection.execute(select(users).where(users.c.name == name)).first()
        return Account(id=item.id, name=item.name, role=item.role) if item else None

    def known(self, name: str) -> Account:
        """The same, or the error that says that there is none.

        Raises:
            UsageError: ``access.unknown``.
        """
        with self._store.read() as connection:
            item = _known(connection, name)
        return Account(id=item.id, name=item.name, role=item.role)

    def add(self, name: str, *, role: str, password: str, actor: str, now_ms: int) -> None:
        """Make an account with a password.

        Raises:
            UsageError: ``access.name``, ``access.role``, ``access.password`` or ``access.taken``.
        """
        _check_name(name)
        check_password(password, name=name)
        values = {"role": check_role(role), "password_hash": hash_password(password)}
        with self._store.write() as connection:
            if _row(connection, name) is not None:
                raise UsageError("access.taken", f"{name}: there is such a user.", hint=f"edgekit fleet user passwd {name}")
            connection.execute(insert(users).values(name=name, created_ms=now_ms, **values))
            audit.record(
                connection, actor=actor, action="user.added", subject=f"user:{name}", fields={"role": role}, now_ms=now_ms
            )

    def set_password(self, name: str, password: str, *, actor: str, now_ms: int) -> None:
        """Give another password and end every session of the account.

        Raises:
            UsageError: ``access.unknown``, ``access.password``, ``access.elsewhere``.
        """
        check_password(password, name=name)
        hashed = hash_password(password)
        with self._store.write() as connection:
            item = _known(connection, name)
            if item.issuer:
                text = f"{name}: logs in at {item.issuer} and has no password here."
                raise UsageError("access.elsewhere", text, hint="Change it there.")
            connection.execute(update(users).where(users.c.id == item.id).values(password_hash=hashed))
            connection.execute(delete(sessions).where(sessions.c.user_id == item.id))
            audit.record(connection, actor=actor, action="user.password_changed", subject=f"user:{name}", now_ms=now_ms)

    def set_role(self, name: str, role: str, *, actor: str, now_ms: int) -> None:
        """Give another role; it holds from the next request on.

        Raises:
            UsageError: ``access.unknown``, ``access.role``, ``access.last_admin``.
        """
        wanted = check_role(role)
        with self._store.write() as connection:
            item = _known(connection, name)
            if wanted != "admin":
                _keep_an_admin(connection, item)
            connection.execute(update(users).where(users.c.id == item.id).values(role=wanted))
            fields = {"before": item.role, "role": wanted}
            audit.record(
                connection, actor=actor, action="user.role_changed", subject=f"user:{name}", fields=fields, now_ms=now_ms
            )

    def remove(self, name: str, *, actor: str, now_ms: int) -> None:
        """Remove an account with its sessions; its tokens are revoked.

        Raises:
            UsageError: ``access.unknown``, ``access.last_admin``.
        """
        with self._store.write() as connection:
            item = _known(connection, name)
            _keep_an_admin(connection, item)
            connection.execute(delete(sessions).where(sessions.c.user_id == item.id))
            revoked = {"user_id": None, "revoked_ms": now_ms}
            connection.execute(
                update(api_tokens).where(api_tokens.c.user_id == item.id, api_tokens.c.revoked_ms == 0).values(**revoked)
            )
            connection.execute(update(api_tokens).where(api_tokens.c.user_id == item.id).values(user_id=None))
            connection.execute(delete(users).where(users.c.id == item.id))
            audit.record(connection, actor=actor, action="user.removed", subject=f"user:{name}", now_ms=now_ms)

    def last_address(self, name: str) -> str:
        """From where an account was last used; empty for never."""
        with self._store.read() as connection:
            return connection.execute(select(users.c.last_address).where(users.c.name == name)).scalar() or ""

    def authenticate(self, name: str, password: str) -> Account | None:
        """Who this is; None for a wrong password as for an unknown name, after the same time."""
        with self._store.read() as connection:
            item = _row(connection, name)
        if not is_right(item.password_hash if item else "", password) or item is None:
            return None
        if is_outdated(item.password_hash):
            fresh = hash_password(password)
            with self._store.write() as connection:
                connection.execute(update(users).where(users.c.id == item.id).values(password_hash=fresh))
        return Account(id=item.id, name=item.name, role=item.role)

    def from_elsewhere(self, *, issuer: str, subject: str, name: str, role: Role, now_ms: int) -> Account:
        """The account of an identity that a provider vouches for, made at its first login; the provider decides the role.

        Raises:
            UsageError: ``access.name``, ``access.taken`` when somebody else has the name.
        """
        here = (users.c.issuer == issuer, users.c.subject == subject)
        with self._store.write() as connection:
            item = connection.execute(select(users).where(*here)).first()
            if item is not None:
                if item.role != role:
                    connection.execute(update(users).where(users.c.id == item.id).values(role=role))
                    fields = {"before": item.role, "role": role}
                    _note(connection, "user.role_changed", item.name, actor=issuer, fields=fields, now_ms=now_ms)
                return Account(id=item.id, name=item.name, role=role)
            _check_name(name)
            if _row(connection, name) is not None:
                text = f"{name}: this server has a user of that name who is not known at {issuer}."
                raise UsageError("access.taken", text, hint="Remove one of the two: edgekit fleet user remove.")
            values = {"name": name, "role": role, "issuer": issuer, "subject": subject, "created_ms": now_ms}
            made = connection.execute(insert(users).values(**values).returning(users.c.id)).scalar_one()
            _note(connection, "user.added", name, actor=issuer, fields={"role": role}, now_ms=now_ms)
            return Account(id=made, name=name, role=role)


def _note(connection: Connection, action: str, name: str, *, actor: str, fields: dict[str, Any], now_ms: int) -> None:
    audit.record(connection, actor=actor, action=action, subject=f"user:{name}", fields=fields, now_ms=now_ms)


def _check_name(name: str) -> None:
    if not _NAME.match(name) or name in RESERVED:
        raise UsageError(
            "access.name",
            f"{name[:64]!r}: not a user's name.",
            hint=f"1 to 64 letters, digits and . _ @ + -, and none of {', '.join(sorted(RESERVED))}.",
        )


def _row(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(select(users).where(users.c.name == name)).first()


def _known(connection: Connection, name: str) -> Row[Any]:
    item = _row(connection, name)
    if item is None:
        raise UsageError("access.unknown", f"{name}: no such user.", hint="edgekit fleet user list shows them.")
    return item


def _keep_an_admin(connection: Connection, item: Row[Any]) -> None:
    """Refuse to leave users without an admin; the last user of all may go."""
    others = select(func.count()).select_from(users).where(users.c.id != item.id)
    total = connection.execute(others).scalar() or 0
    admins = connection.execute(others.where(users.c.role == "admin")).scalar() or 0
    if item.role == "admin" and not admins and total:
        text = f"{item.name}: is the last admin, and {total} others would stay without one."
        raise UsageError("access.last_admin", text, hint="Make somebody else admin first: edgekit fleet user role NAME admin.")
