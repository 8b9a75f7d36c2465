"""Sessions: a random id in a cookie, its hash in the database. Each ends when it is idle, when it is old, and at a word.

Whoever reads the database learns no id that a server would take. The token against forged requests is derived from the id, so
it ends with it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from sqlalchemy import delete, insert, or_, select, update

from edgekit.fleet.access.guard import Role
from edgekit.fleet.access.tables import sessions, users
from edgekit.fleet.access.views import SessionView
from edgekit.fleet.store import Store
from edgekit.schema.base import Record

IDLE_MS = 12 * 3_600_000
LONGEST_MS = 7 * 24 * 3_600_000
NOTE_MS = 60_000
"""A session's last use is written down this often."""
_BYTES = 32


class Session(Record, frozen=True, kw_only=True):
    """Whose session it is; the role is the account's of this moment."""

    user_id: int
    name: str
    role: Role


def hash_secret(secret: str) -> str:
    """How a secret with 256 random bits is kept: hex SHA-256."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Sessions:
    """The sessions in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def start(self, user_id: int, *, address: str, agent: str, now_ms: int, replaces: str = "") -> str:
        """Begin a session and tell its id, which nobody else knows.

        Args:
            user_id: whose.
            address: from where.
            agent: the browser, as it calls itself.
            now_ms: Unix time in milliseconds.
            replaces: the id that the browser had before; it ends.
        """
        secret = secrets.token_urlsafe(_BYTES)
        with self._store.write() as connection:
            self._sweep(now_ms)
            if replaces:
                connection.execute(delete(sessions).where(sessions.c.id_hash == hash_secret(replaces)))
            connection.execute(
                insert(sessions).values(
                    id_hash=hash_secret(secret),
                    user_id=user_id,
                    created_ms=now_ms,
                    seen_ms=now_ms,
                    expires_ms=now_ms + LONGEST_MS,
                    address=address[:64],
                    agent=agent[:200],
                )
            )
            connection.execute(
                update(users).where(users.c.id == user_id).values(last_login_ms=now_ms, last_address=address[:64])
            )
        return secret

    def _sweep(self, now_ms: int) -> None:
        row = sessions.c
        with self._store.write() as connection:
            connection.execute(delete(sessions).where(or_(row.expires_ms <= now_ms, row.seen_ms <= now_ms - IDLE_MS)))

    def find(self, secret: str, now_ms: int) -> Session | None:
        """Whose session this id is; None when there is none, or it has ended."""
        row = sessions.c
        statement = (
            select(row.seen_ms, users.c.id, users.c.name, users.c.role)
            .join(users, users.c.id == row.user_id)
            .where(row.id_hash == hash_secret(secret), row.expires_ms > now_ms, row.seen_ms > now_ms - IDLE_MS)
        )
        with self._store.read() as connection:
            item = connection.execute(statement).first()
        if item is None:
            return None
        if now_ms - item.seen_ms >= NOTE_MS:
            with self._store.write() as connection:
                connection.execute(update(sessions).where(row.id_hash == hash_secret(secret)).values(seen_ms=now_ms))
        return Session(user_id=item.id, name=item.name, role=item.role)

    def end(self, secret: str) -> None:
        """End one."""
        with self._store.write() as connection:
            connection.execute(delete(sessions).where(sessions.c.id_hash == hash_secret(secret)))

    def end_all(self, user_id: int, *, but: str = "") -> int:
        """End all sessions of an account, except for one; how many ended."""
        condition = (sessions.c.user_id == user_id, sessions.c.id_hash != hash_secret(but))
        with self._store.write() as connection:
            return connection.execute(delete(sessions).where(*condition)).rowcount

    def list(self, user_id: int, *, current: str, now_ms: int) -> tuple[SessionView, ...]:
        """The open sessions of an account, newest first."""
        row = sessions.c
        statement = (
            select(sessions, users.c.name)
            .join(users, users.c.id == row.user_id)
            .where(row.user_id == user_id, row.expires_ms > now_ms, row.seen_ms > now_ms - IDLE_MS)
            .order_by(row.seen_ms.desc())
        )
        with self._store.read() as connection:
            found = connection.execute(statement).all()
        here = hash_secret(current)
        return tuple(
            SessionView(
                user=item.name,
                created_ms=item.created_ms,
                seen_ms=item.seen_ms,
                expires_ms=item.expires_ms,
                address=item.address,
                agent=item.agent,
                is_current=item.id_hash == here,
            )
            for item in found
        )


def csrf_token(secret: str) -> str:
    """The token of a session's forms, with a fresh mask, so that compressing a page tells nothing of it (BREACH)."""
    mask = secrets.token_bytes(_BYTES)
    plain = _csrf_key(secret)
    return (mask + bytes(a ^ b for a, b in zip(mask, plain, strict=True))).hex()


def is_csrf_token(secret: str, given: str) -> bool:
    """Whether a token is one of this session."""
    try:
        data = bytes.fromhex(given)
    except ValueError:
        return False
    if len(data) != 2 * _BYTES:
        return False
    plain = bytes(a ^ b for a, b in zip(data[:_BYTES], data[_BYTES:], strict=True))
    return hmac.compare_digest(plain, _csrf_key(secret))


def _csrf_key(secret: str) -> bytes:
    return hmac.digest(secret.encode(), b"edgekit csrf", "sha256")
