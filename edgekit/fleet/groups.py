"""Groups of devices: a list of members, or a selector that is looked up anew each time.

>>> from edgekit.fleet.store import Store
>>> groups = Groups(Store("sqlite://"))
>>> groups.put("north", selector="site=oslo|bergen", actor="operator", now_ms=1)
>>> [group.name for group in groups.list()]
['north']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, delete, func, insert, select, update

from edgekit.errors import UsageError
from edgekit.fleet import audit, tables
from edgekit.fleet.selector import Selector
from edgekit.fleet.store import Store
from edgekit.schema.base import Record

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")


class GroupView(Record, frozen=True, kw_only=True):
    """One group; ``selector`` is empty for a list of members."""

    name: str
    selector: str = ""
    note: str = ""
    devices: int = 0
    created_ms: int = 0


class Groups:
    """The groups of a fleet."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def dynamic(self) -> dict[str, str]:
        """The selectors of the groups that are no lists, for :meth:`Selector.clause`."""
        row = tables.groups.c
        with self._store.read() as connection:
            found = connection.execute(select(row.name, row.selector).where(row.selector != "")).all()
        return {item.name: item.selector for item in found}

    def list(self) -> tuple[GroupView, ...]:
        """Every group with how many devices are in it now."""
        dynamic = self.dynamic()
        with self._store.read() as connection:
            rows = connection.execute(select(tables.groups).order_by(tables.groups.c.name)).all()
            return tuple(
                GroupView(
                    name=row.name,
                    selector=row.selector,
                    note=row.note,
                    devices=self._count(connection, row.name, dynamic),
                    created_ms=row.created_ms,
                )
                for row in rows
            )

    @staticmethod
    def _count(connection: Connection, name: str, dynamic: dict[str, str]) -> int:
        clause = Selector.parse(f"group={name}").clause(dynamic)
        return connection.execute(select(func.count()).select_from(tables.devices).where(clause)).scalar() or 0

    def members(self, name: str) -> tuple[tuple[str, str], ...]:
        """Site and name of each device of a group, in order.

        Raises:
            UsageError: ``group.unknown``.
        """
        row = tables.devices.c
        clause = Selector.parse(f"group={name}").clause(self.dynamic())
        with self._store.read() as connection:
            self._id(connection, name)
            found = connection.execute(select(row.site, row.device).where(clause).order_by(row.site, row.device))
            return tuple((site, device) for site, device in found)

    def put(
        self, name: str, *, actor: str, now_ms: int, selector: str = "", devices: Sequence[str] = (), note: str = ""
    ) -> None:
        """Make a group, or say anew who is in it.

        Args:
            name: 1 to 63 of a-z, 0-9, - and _.
            actor: who does it.
            now_ms: Unix time in milliseconds.
            selector: who is in it, looked up each time.
            devices: or a list, ``site/device`` each.
            note: what it is for.

        Raises:
            UsageError: ``group.name``, ``group.members``, ``selector.malformed``, ``device.unknown``.
        """
        if not _NAME.match(name):
            raise UsageError("group.name", f"group {name!r}: not a name.", hint="Use 1 to 63 of a-z, 0-9, - and _.")
        if bool(selector.strip()) == bool(devices):
            raise UsageError("group.members", f"group {name}: give a selector or a list of devices, not both and not none.")
        text = str(Selector.parse(selector))
        Selector.parse(text).clause({**self.dynamic(), name: text})
        with self._store.write() as connection:
            self._write(connection, name, text, note, now_ms)
            if devices:
                self._fill(connection, name, devices)
            audit.record(
                connection,
                actor=actor,
                action="group.changed",
                subject=f"group:{name}",
                now_ms=now_ms,
                fields={"selector": text, "devices": len(devices)},
            )

    @staticmethod
    def _write(connection: Connection, name: str, selector: str, note: str, now_ms: int) -> None:
        table = tables.groups
        changed = connection.execute(update(table).where(table.c.name == name).values(selector=selector, note=note))
        if not changed.rowcount:
            connection.execute(insert(table).values(name=name, selector=selector, note=note, created_ms=now_ms))
        number = Groups._id(connection, name)
        connection.execute(delete(tables.group_members).where(tables.group_members.c.group_id == number))

    def _fill(self, connection: Connection, name: str, devices: Iterable[str]) -> None:
        number = self._id(connection, name)
        row = tables.devices.c
        for text in dict.fromkeys(devices):
            site, _, device = text.rpartition("/")
            found = connection.execute(select(row.id).where(row.site == (site or "default"), row.device == device)).scalar()
            if found is None:
                raise UsageError("device.unknown", f"group {name}: {text}: no such device has reported.")
            connection.execute(insert(tables.group_members).values(group_id=number, device_id=found))

    def remove(self, name: str, *, actor: str, now_ms: int) -> None:
        """Forget a group; its devices stay.

        Raises:
            UsageError: ``group.unknown``.
        """
        with self._store.write() as connection:
            number = self._id(connection, name)
            connection.execute(delete(tables.group_members).where(tables.group_members.c.group_id == number))
            connection.execute(delete(tables.groups).where(tables.groups.c.id == number))
            audit.record(connection, actor=actor, action="group.removed", subject=f"group:{name}", now_ms=now_ms)

    @staticmethod
    def _id(connection: Connection, name: str) -> int:
        found = connection.execute(select(tables.groups.c.id).where(tables.groups.c.name == name)).scalar()
        if found is None:
            raise UsageError("group.unknown", f"group {name}: no such group.", hint="edgekit fleet group list shows them.")
        return int(found)
