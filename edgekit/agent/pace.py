"""A bounded rate: so many a second on average, a second's worth at once.

>>> pace = Pace(per_s=2.0)
>>> pace.take(10.0), pace.take(10.0), pace.wait_s(10.0)
(None, None, 0.5)
>>> Pace().wait_s(0.0)
0.0
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Pace:
    """A token bucket. ``per_s`` 0: no bound."""

    per_s: float = 0.0
    _tokens: float = -1.0
    _at: float = 0.0

    def _fill(self, now_s: float) -> None:
        most = max(1.0, self.per_s)
        passed = now_s - self._at
        self._tokens = most if self._tokens < 0 else min(most, self._tokens + passed * self.per_s)
        self._at = now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next may go; 0 for now."""
        if not self.per_s:
            return 0.0
        self._fill(now_s)
        return max(0.0, (1.0 - self._tokens) / self.per_s)

    def take(self, now_s: float) -> None:
        """One goes."""
        if self.per_s:
            self._fill(now_s)
            self._tokens = max(0.0, self._tokens - 1.0)
