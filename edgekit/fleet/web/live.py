"""What changed, pushed to open pages: one server-sent event stream a browser, at most one event a second.

An event names the devices that changed and the topics (``rollouts``, ``alerts``, ``audit``) that did; the page then asks for
itself again and puts in place what is different. The event's id says what the page has seen, so that a tab that lost its
connection goes on where it was (``Last-Event-ID``). However many tabs are open, the database is asked once a second.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Select, func, select

from edgekit.fleet import audit, tables
from edgekit.fleet.alerting import tables as alerting
from edgekit.fleet.rollout import tables as rollout
from edgekit.fleet.store import Store

PERIOD_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
MAX_NAMED = 200
MAX_ID_LENGTH = 200

_MARKS: Mapping[str, Select[Any]] = {
    "rollouts": select(func.coalesce(func.max(rollout.rollouts.c.updated_ms), 0)),
    "alerts": select(func.coalesce(func.max(alerting.alert_events.c.id), 0)),
    "audit": select(func.coalesce(func.max(audit.audit_log.c.id), 0)),
}
"""What grows when something of a topic changed."""
_SEEN: Select[Any] = select(func.coalesce(func.max(tables.devices.c.last_seen_ms), 0))
"""Where other servers ingest, too: that some device reported, not which."""


@dataclass(frozen=True)
class Mark:
    """What somebody has seen."""

    stamp: int
    topics: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join(str(number) for number in (self.stamp, *self.topics))

    @classmethod
    def parse(cls, text: str, newest: Mark) -> Mark:
        """What a page says it has seen; the newest when it says nothing that can be one."""
        numbers = text.split("-") if text.isascii() and len(text) <= MAX_ID_LENGTH else []
        if len(numbers) != 1 + len(newest.topics) or not all(number.isdigit() for number in numbers):
            return newest
        stamp, *topics = (int(number) for number in numbers)
        return cls(min(stamp, newest.stamp), tuple(topics))


class Pulse:
    """The newest mark, read once a period for everybody.

    Args:
        store: whose changes.
        is_shared: other servers write to the same database.
        monotonic: a steady clock, seconds.
    """

    def __init__(self, store: Store, *, is_shared: bool = False, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._store, self._monotonic = store, monotonic
        self._marks = (*_MARKS.values(), *((_SEEN,) if is_shared else ()))
        self._lock = threading.Lock()
        self._read_s = float("-inf")
        self._topics: tuple[int, ...] = ()

    def now(self) -> Mark:
        """What there is to see."""
        with self._lock:
            if self._monotonic() - self._read_s >= PERIOD_SECONDS / 2:
                with self._store.read() as connection:
                    self._topics = tuple(int(connection.execute(mark).scalar() or 0) for mark in self._marks)
                self._read_s = self._monotonic()
            return Mark(self._store.changes_since(1 << 62)[0], self._topics)

    def devices_since(self, stamp: int) -> set[tuple[str, str]]:
        """The devices that changed after a stamp."""
        return self._store.changes_since(stamp)[1]


def format_event(mark: Mark, devices: set[tuple[str, str]], topics: list[str], *, is_any: bool = False) -> bytes:
    """One event: ``all`` instead of the names when too many changed, or when nobody knows which did."""
    names = "all" if is_any or len(devices) > MAX_NAMED else sorted(f"{site}/{device}" for site, device in devices)
    data = msgspec.json.encode({"devices": names, "topics": topics}).decode()
    return f"id: {mark}\nevent: change\ndata: {data}\n\n".encode()


async def stream(pulse: Pulse, last_id: str, is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
    """The events of one browser.

    Args:
        pulse: what there is to see.
        last_id: the ``Last-Event-ID`` header; changes after it are told at once.
        is_gone: whether the client has closed the connection.
    """
    seen = Mark.parse(last_id, await asyncio.to_thread(pulse.now))
    yield b"retry: 2000\n\n"
    quiet = 0.0
    while not await is_gone():
        newest = await asyncio.to_thread(pulse.now)
        changed = [old != new for old, new in zip(seen.topics, newest.topics, strict=True)]
        topics = [name for name, is_new in zip(_MARKS, changed, strict=False) if is_new]
        devices, is_any = pulse.devices_since(seen.stamp), any(changed[len(_MARKS) :])
        if topics or devices or is_any:
            yield format_event(newest, devices, topics, is_any=is_any)
            seen, quiet = newest, 0.0
        elif quiet >= HEARTBEAT_SECONDS:
            yield b": still here\n\n"
            quiet = 0.0
        await asyncio.sleep(PERIOD_SECONDS)
        quiet += PERIOD_SECONDS
