"""How often somebody may be wrong: a bucket per address, and one for all of them together. Whoever is right costs nothing.

>>> throttle = Throttle(burst=2, per_minute=60.0)
>>> [throttle.is_open("10.0.0.1", now_s=0.0) and throttle.note_failure("10.0.0.1", now_s=0.0) is None for _ in range(3)]
[True, True, False]
>>> throttle.is_open("10.0.0.1", now_s=1.0)
True
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

MAX_ADDRESSES = 10_000


@dataclass
class _Bucket:
    size: float
    per_s: float
    left: float
    at_s: float

    def fill(self, now_s: float) -> float:
        self.left = min(self.size, self.left + max(0.0, now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        return self.left


@dataclass
class Throttle:
    """Buckets that fill again with time; ``factor`` is how much more all addresses together may fail than one."""

    burst: float = 10.0
    per_minute: float = 6.0
    factor: float = 50.0
    _buckets: dict[str, _Bucket] = field(default_factory=dict)
    _all: _Bucket | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _new(self, now_s: float, factor: float = 1.0) -> _Bucket:
        size = self.burst * factor
        return _Bucket(size=size, per_s=self.per_minute * factor / 60.0, left=size, at_s=now_s)

    def is_open(self, address: str, *, now_s: float) -> bool:
        """Whether an address may try now."""
        with self._lock:
            own = self._buckets.get(address)
            return all(bucket.fill(now_s) >= 1.0 for bucket in (own, self._all) if bucket is not None)

    def note_failure(self, address: str, *, now_s: float) -> None:
        """Somebody was wrong."""
        with self._lock:
            own = self._buckets.pop(address, None) or self._new(now_s)
            self._all = self._all or self._new(now_s, self.factor)
            self._buckets[address] = own  # the last one that was wrong is the last one to be forgotten
            for bucket in (own, self._all):
                bucket.left = max(0.0, bucket.fill(now_s) - 1.0)
            if len(self._buckets) > MAX_ADDRESSES:
                self._buckets.pop(next(iter(self._buckets)))
