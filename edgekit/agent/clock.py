"""How far this device's clock can be trusted, and when it jumped.

The kernel knows whether somebody disciplines the clock (``adjtimex``, read only). Where it must not be asked (a sandbox) the
mark that systemd-timesyncd leaves says so; where nothing says anything the clock is the ``system``'s, of unknown quality.

A device without a battery-backed clock begins in the past and jumps when it hears the time. What it stamped before is wrong by
the same amount: a jump out of an unsynchronized time is told with its size and the last sequence number before it, and the
server moves the older stamps of that boot. Nothing is rewritten on the device, so the correction is exact and comes once.

    >>> clock = Clock(wall_ms=lambda: 5_000, mono_s=lambda: 1.0, ask=lambda: "unsynced")
    >>> clock.check() is None, clock.source
    (True, 'unsynced')
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.schema.message import ClockSource

TIMESYNC_MARK = Path("/run/systemd/timesync/synchronized")
STEP_MS = 1000
"""A smaller difference is the clock being steered, or a machine that was busy."""
_TIME_ERROR = 5
_STA_UNSYNC = 0x40
_TIMEX_BYTES = 512
_STATUS_OFFSET = 5 * ctypes.sizeof(ctypes.c_long)
"""``struct timex``: modes (padded to a long), offset, freq, maxerror, esterror, status."""


def clock_source() -> ClockSource:
    """What the kernel says of the clock: ``ntp`` when somebody keeps it right, ``unsynced`` when nobody does."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: only read
        state = libc.adjtimex(buffer)
    except (OSError, AttributeError):
        state = -1
    if state < 0:
        return "ntp" if TIMESYNC_MARK.exists() else "system"
    status = ctypes.c_int.from_buffer(buffer, _STATUS_OFFSET).value
    return "unsynced" if state == _TIME_ERROR or status & _STA_UNSYNC else "ntp"


@dataclass(frozen=True, kw_only=True)
class Step:
    """The clock jumped by so much; ``was_set``: it was kept right before, so that older stamps are as good as ever."""

    delta_ms: int
    was_set: bool


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _mono_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if os.name == "posix" else time.monotonic()


@dataclass
class Clock:
    """Watches the wall clock against one that never jumps (and counts sleep)."""

    wall_ms: Callable[[], int] = _wall_ms
    mono_s: Callable[[], float] = _mono_s
    ask: Callable[[], ClockSource] = clock_source
    source: ClockSource = "system"
    _offset_ms: float = field(default=0.0)

    def __post_init__(self) -> None:
        self.source = self.ask()
        self._offset_ms = self._measure()

    def _measure(self) -> float:
        return self.wall_ms() - self.mono_s() * 1000.0

    def check(self) -> Step | None:
        """The jump since the last look, if there was one; cheap enough for every message."""
        offset = self._measure()
        delta, self._offset_ms = offset - self._offset_ms, offset
        if abs(delta) < STEP_MS:
            return None
        before, self.source = self.source, self.ask()
        return Step(delta_ms=round(delta), was_set=before == "ntp")

    def refresh(self) -> bool:
        """Ask the kernel again; whether it says something else."""
        before, self.source = self.source, self.ask()
        return self.source != before
