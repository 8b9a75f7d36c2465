"""The host's and the agent's own figures, read from /proc and /sys: no package is needed for that on Linux."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")
MEGA = 1e6


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def cpu_seconds(pid: int) -> float:
    """Processor time that a process used so far; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _TICK
    except (OSError, IndexError, ValueError):
        return 0.0


def memory_free_bytes() -> float:
    """Memory that programs can still have; NaN where the kernel does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    return math.nan


def temperature_c() -> float:
    """The hottest thermal zone; NaN where there is none."""
    values = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            values.append(int(zone.read_text()) / 1000.0)
    return max(values, default=math.nan)


def disk_free_bytes(path: Path) -> int:
    """Bytes that this user can still write."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


@dataclass
class CpuMeter:
    """Processor use of some processes between two calls, percent of one core."""

    _last: dict[int, float] = field(default_factory=dict)
    _at: float = field(default_factory=time.monotonic)

    def take(self, pids: Sequence[int]) -> float:
        """Percent of one core since the last call; a process that is new counts from its start.

        A process that is not asked for now and then (one that is being drained) keeps its mark as long as it lives, so that
        what it used before is never counted twice.
        """
        now = time.monotonic()
        used = {pid: cpu_seconds(pid) for pid in pids}
        spent = sum(max(0.0, value - self._last.get(pid, 0.0)) for pid, value in used.items())
        elapsed = max(now - self._at, 1e-6)
        resting = {pid: value for pid, value in self._last.items() if Path(f"/proc/{pid}").exists()}
        self._last, self._at = resting | used, now
        return 100.0 * spent / elapsed
