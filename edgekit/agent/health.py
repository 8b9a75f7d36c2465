"""When a worker that keeps dying is restarted, and when it is given up: pure, the time is an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

CRASHES_BEFORE_FALLBACK = 3
CRASH_WINDOW_S = 120.0
MAX_DELAY_S = 30.0


@dataclass
class CrashLedger:
    """Crashes of the serving worker.

    The first crash in a while is answered by an immediate restart; the next wait 1, 2, 4 ... seconds. With three crashes
    within two minutes the model is not worth another try: ``is_looping``.
    """

    _times: deque[float] = field(default_factory=deque)
    total: int = 0

    def note(self, now: float) -> None:
        """A crash happened."""
        self.total += 1
        self._times.append(now)
        while self._times and now - self._times[0] > CRASH_WINDOW_S:
            self._times.popleft()

    def forget(self) -> None:
        """Another model serves: the past is not its fault."""
        self._times.clear()

    @property
    def is_looping(self) -> bool:
        """Whether it crashed too often in too short a time."""
        return len(self._times) >= CRASHES_BEFORE_FALLBACK

    @property
    def delay_s(self) -> float:
        """Seconds to wait before the restart."""
        recent = len(self._times)
        return 0.0 if recent <= 1 else min(MAX_DELAY_S, 2.0 ** (recent - 2))
