"""A model that hangs in native code: seen from outside, by its worker's page of shared memory. Pure; the time is an argument.

>>> watch = HangWatch(limit_s=30.0)
>>> watch.look([(7, "kws", True, 12)], 0.0), watch.look([(7, "kws", True, 12)], 31.0)
('', 'kws')
>>> watch.look([(7, "kws", True, 13)], 32.0)
''
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class HangWatch:
    """Since when which model has been at the same inference."""

    limit_s: float
    _since: dict[tuple[int, str], tuple[int, float]] = field(default_factory=dict)

    def look(self, models: Iterable[tuple[int, str, bool, int]], now: float) -> str:
        """The name of a model that hangs; empty for none.

        Args:
            models: worker's process id, model, whether it is at work, and how many inferences it has ended.
            now: monotonic seconds.
        """
        seen: dict[tuple[int, str], tuple[int, float]] = {}
        hanging = ""
        for pid, name, is_busy, inferences in models:
            if not is_busy:
                continue
            before = self._since.get((pid, name))
            seen[pid, name] = before if before is not None and before[0] == inferences else (inferences, now)
            if now - seen[pid, name][1] > self.limit_s:
                hanging = name
        self._since = seen
        return hanging
