"""What changed, pushed to open pages: one server-sent event stream a tab, at most one event a second.

An event names the devices that changed; the page then fetches the fragment that it shows. The event's id is the store's stamp,
so a tab that lost its connection goes on where it was (``Last-Event-ID``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from edgekit.fleet.store import Store

PERIOD_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
MAX_NAMED = 200
MAX_ID_DIGITS = 18


def format_event(stamp: int, changed: set[tuple[str, str]]) -> bytes:
    """One event: ``all`` instead of the names when too many changed."""
    names = "all" if len(changed) > MAX_NAMED else sorted(f"{site}/{device}" for site, device in changed)
    return f"id: {stamp}\nevent: change\ndata: {msgspec.json.encode(names).decode()}\n\n".encode()


def _read_stamp(last_id: str, now: int) -> int:
    """The stamp that a tab saw last; the newest one when it says nothing that can be one."""
    is_number = last_id.isascii() and last_id.isdigit() and len(last_id) <= MAX_ID_DIGITS
    return int(last_id) if is_number and int(last_id) <= now else now


async def stream(store: Store, last_id: str, is_gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
    """The events of one tab.

    Args:
        store: whose changes.
        last_id: the ``Last-Event-ID`` header; changes after it are told at once.
        is_gone: whether the client has closed the connection.
    """
    now, _changed = store.changes_since(0)
    stamp = _read_stamp(last_id, now)
    yield b"retry: 2000\n\n"
    quiet = 0.0
    while not await is_gone():
        newest, changed = await asyncio.to_thread(store.changes_since, stamp)
        if changed:
            yield format_event(newest, changed)
            stamp, quiet = newest, 0.0
        elif quiet >= HEARTBEAT_SECONDS:
            yield b": still here\n\n"
            quiet = 0.0
        await asyncio.sleep(PERIOD_SECONDS)
        quiet += PERIOD_SECONDS
