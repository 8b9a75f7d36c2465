"""Work orders: opened by alerts or by people, taken by a program that has the compiler and the keys, finished with a result.

A worker holds an order for a time and says again that it is at it; one that dies loses its order to the next.

>>> from edgekit.fleet.store import Store
>>> work = Work(Store("sqlite://"))
>>> order = work.open(kind="recalibrate", model="kws", reason="drift", actor="operator", now_ms=1)
>>> work.open(kind="recalibrate", model="kws", reason="more drift", actor="operator", now_ms=2).id == order.id
True
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, and_, insert, or_, select, update

from edgekit.errors import UsageError
from edgekit.fleet import audit
from edgekit.fleet.store import Store
from edgekit.fleet.work.tables import work_orders
from edgekit.schema.work import WorkKind, WorkOrder

__all__ = ["LEASE_MS", "Work", "WorkKind", "WorkOrder"]

LEASE_MS = 15 * 60_000
MAX_RESULT = 4000


def _order(row: Row[Any]) -> WorkOrder:
    return WorkOrder(**{name: getattr(row, name) for name in WorkOrder.__struct_fields__})


class Work:
    """The work orders of one fleet."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def open(
        self, *, kind: WorkKind, model: str, reason: str, actor: str, now_ms: int, manifest: str = "", alert_id: int = 0
    ) -> WorkOrder:
        """Open an order, or give the one of this kind that is open for the model already.

        Raises:
            UsageError: ``work.model``.
        """
        if not model:
            raise UsageError("work.model", f"{kind}: a work order is for one model.", hint="Group the rule by model.")
        row = work_orders.c
        with self._store.write() as connection:
            same = (row.kind == kind, row.model == model, row.state.in_(("open", "taken")))
            known = connection.execute(select(work_orders).where(*same)).first()
            if known is not None:
                return _order(known)
            number = connection.execute(
                insert(work_orders)
                .values(
                    kind=kind,
                    model=model,
                    manifest=manifest,
                    reason=reason[:2000],
                    alert_id=alert_id,
                    state="open",
                    created_ms=now_ms,
                    created_by=actor,
                    worker="",
                    taken_ms=0,
                    lease_until_ms=0,
                    finished_ms=0,
                    result="",
                )
                .returning(row.id)
            ).scalar_one()
            self._note(connection, number, "work.opened", actor, reason, now_ms)
            return self._load(connection, number)

    def list(self, *, model: str = "", state: str = "", limit: int = 100) -> tuple[WorkOrder, ...]:
        """Orders, newest first."""
        row = work_orders.c
        statement = select(work_orders).order_by(row.id.desc()).limit(limit)
        statement = statement.where(row.model == model) if model else statement
        statement = statement.where(row.state == state) if state else statement
        with self._store.read() as connection:
            return tuple(_order(item) for item in connection.execute(statement))

    def get(self, number: int) -> WorkOrder:
        """One order.

        Raises:
            UsageError: ``work.unknown``.
        """
        with self._store.read() as connection:
            return self._load(connection, number)

    def take(self, number: int, *, worker: str, now_ms: int, actor: str = "") -> WorkOrder:
        """Take an order, or say again that one is at it; ``actor`` is who the audit log names, the worker by default.

        Raises:
            UsageError: ``work.unknown``; ``work.state`` when another worker has it, or it is over.
        """
        row = work_orders.c
        free = or_(row.state == "open", and_(row.state == "taken", or_(row.worker == worker, row.lease_until_ms < now_ms)))
        with self._store.write() as connection:
            before = self._load(connection, number)
            is_new = before.worker != worker or before.state != "taken"
            values: dict[str, Any] = {"state": "taken", "worker": worker, "lease_until_ms": now_ms + LEASE_MS}
            values |= {"taken_ms": now_ms} if is_new else {}
            taken = connection.execute(update(work_orders).where(row.id == number, free).values(**values))
            if not taken.rowcount:
                who = f" by {before.worker}" if before.worker else ""
                raise UsageError("work.state", f"work order {number} is {before.state}{who}.")
            if is_new:
                self._note(connection, number, "work.taken", actor or worker, "", now_ms, worker)
            return self._load(connection, number)

    def finish(self, number: int, *, worker: str, is_done: bool, result: str, now_ms: int, actor: str = "") -> WorkOrder:
        """Say what came of an order.

        Raises:
            UsageError: ``work.unknown``, ``work.state``.
        """
        with self._store.write() as connection:
            before = self._load(connection, number)
            if before.state != "taken" or before.worker != worker:
                raise UsageError("work.state", f"work order {number} is {before.state}, and not {worker}'s.")
            state = "done" if is_done else "failed"
            connection.execute(
                update(work_orders)
                .where(work_orders.c.id == number)
                .values(state=state, finished_ms=now_ms, result=result[:MAX_RESULT])
            )
            self._note(connection, number, f"work.{state}", actor or worker, result, now_ms, worker)
            return self._load(connection, number)

    @staticmethod
    def _load(connection: Connection, number: int) -> WorkOrder:
        row = connection.execute(select(work_orders).where(work_orders.c.id == number)).one_or_none()
        if row is None:
            raise UsageError("work.unknown", f"work order {number}: no such order.")
        return _order(row)

    @staticmethod
    def _note(  # noqa: PLR0917
        connection: Connection, number: int, action: str, actor: str, reason: str, now_ms: int, worker: str = ""
    ) -> None:
        fields = {"worker": worker} if worker else {}
        audit.record(
            connection, actor=actor, action=action, subject=f"work:{number}", reason=reason, now_ms=now_ms, fields=fields
        )
