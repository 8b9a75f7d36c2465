"""What the device's page reads beside the store's own record: verdicts of the input contract, events by topic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec
from sqlalchemy import select

from edgekit.fleet import tables
from edgekit.fleet.store import Store
from edgekit.fleet.views import EventView
from edgekit.schema.base import Record

RELEASE_KINDS = frozenset(
    {
        "release_found",
        "install_started",
        "install_finished",
        "install_refused",
        "install_failed",
        "rolled_back",
        "probation_started",
        "committed",
        "release_recalled",
        "release_expired",
        "shadow_started",
        "shadow_finished",
        "desired_accepted",
        "desired_refused",
    }
)
COMMAND_KINDS = frozenset({"command_received", "command_finished", "updates_paused", "updates_resumed"})


class Histories(Record, frozen=True, kw_only=True):
    """A device's events by what they are about; ``others`` are the rest."""

    releases: tuple[EventView, ...]
    commands: tuple[EventView, ...]
    others: tuple[EventView, ...]


class VerdictCount(Record, frozen=True, kw_only=True):
    """How often an exception of the input contract was made."""

    name: str
    count: int


def split_events(events: Iterable[EventView]) -> Histories:
    """Sort a device's events."""
    listed = tuple(events)
    return Histories(
        releases=tuple(item for item in listed if item.kind in RELEASE_KINDS),
        commands=tuple(item for item in listed if item.kind in COMMAND_KINDS),
        others=tuple(item for item in listed if item.kind not in RELEASE_KINDS | COMMAND_KINDS),
    )


def count_verdicts(store: Store, site: str, device: str, since_ms: int) -> tuple[VerdictCount, ...]:
    """Exceptions that a device's input contract made, most frequent first."""
    row, owner = tables.model_windows.c, tables.devices.c
    statement = (
        select(row.verdicts)
        .join(tables.devices, owner.id == row.device_id)
        .where(owner.site == site, owner.device == device, row.start_ms >= since_ms, row.verdicts.is_not(None))
    )
    counts: Counter[str] = Counter()
    with store.read() as connection:
        for (data,) in connection.execute(statement):
            counts.update(msgspec.msgpack.decode(data, type=dict[str, int]))
    return tuple(VerdictCount(name=name, count=number) for name, number in counts.most_common())
