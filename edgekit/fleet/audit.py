"""Who changed what, when and why: one row a decision of a person or of the system, never changed afterwards.

The row is written in the transaction of the change itself, so that neither stands without the other.

>>> from edgekit.fleet.store import Store
>>> store = Store("sqlite://")
>>> with store.write() as connection:
...     record(connection, actor="operator", action="rollout.halted", subject="rollout:12", reason="too hot", now_ms=1)
>>> Audit(store).page().entries[0].action
'rollout.halted'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
from sqlalchemy import BigInteger, Column, Connection, Index, Integer, String, Table, Text, insert, select

from edgekit.fleet.tables import metadata
from edgekit.schema.base import Record

if TYPE_CHECKING:
    from edgekit.fleet.store import Store

SYSTEM = "system"
MAX_REASON = 2000
_MAX_NAME = 200

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("time_ms", BigInteger, nullable=False),
    Column("actor", String(_MAX_NAME), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(_MAX_NAME), nullable=False),
    Column("reason", String(MAX_REASON), nullable=False),
    Column("fields", Text, nullable=False),
)
Index("audit_log_by_subject", audit_log.c.subject, audit_log.c.id)


class AuditEntry(Record, frozen=True, kw_only=True):
    """One decision: ``action`` is ``noun.participle``, ``subject`` is ``kind:name``."""

    id: int
    time_ms: int
    actor: str
    action: str
    subject: str
    reason: str = ""
    fields: dict[str, str | int | float | bool | None] = {}


class AuditPage(Record, frozen=True, kw_only=True):
    """Entries, newest first; ``next`` is the ``before`` of the page after this one."""

    entries: tuple[AuditEntry, ...]
    next: int | None = None


def record(
    connection: Connection,
    *,
    actor: str,
    action: str,
    subject: str,
    now_ms: int,
    reason: str = "",
    fields: Mapping[str, str | int | float | bool | None] | None = None,
) -> None:
    """Write an entry, in the caller's transaction.

    Args:
        connection: of the transaction that makes the change.
        actor: the person's or token's name, or ``SYSTEM`` and what in it, ``system:alerts``.
        action: ``rollout.halted``, ``alert.acknowledged``.
        subject: ``rollout:12``, ``device:lab/cam-7``.
        now_ms: Unix time in milliseconds.
        reason: why, in the words of who did it.
        fields: figures and names that belong to it; never a secret.
    """
    connection.execute(
        insert(audit_log).values(
            time_ms=now_ms,
            actor=actor[:_MAX_NAME],
            action=action,
            subject=subject[:_MAX_NAME],
            reason=reason[:MAX_REASON],
            fields=msgspec.json.encode(dict(fields or {})).decode(),
        )
    )


class Audit:
    """The log as pages."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def page(self, *, before: int | None = None, subject: str = "", actor: str = "", limit: int = 100) -> AuditPage:
        """Entries, newest first.

        Args:
            before: the ``next`` of the page before.
            subject: only of this subject, or of this kind when it ends with a colon (``rollout:``).
            actor: only by this actor.
            limit: most on a page.
        """
        row = audit_log.c
        statement = select(audit_log).order_by(row.id.desc()).limit(limit + 1)
        if before is not None:
            statement = statement.where(row.id < before)
        if subject.endswith(":"):
            statement = statement.where(row.subject.startswith(subject, autoescape=True))
        elif subject:
            statement = statement.where(row.subject == subject)
        if actor:
            statement = statement.where(row.actor == actor)
        with self._store.read() as connection:
            found = connection.execute(statement).all()
        entries = tuple(
            AuditEntry(
                id=item.id,
                time_ms=item.time_ms,
                actor=item.actor,
                action=item.action,
                subject=item.subject,
                reason=item.reason,
                fields=msgspec.json.decode(item.fields),
            )
            for item in found[:limit]
        )
        return AuditPage(entries=entries, next=entries[-1].id if len(found) > limit else None)
