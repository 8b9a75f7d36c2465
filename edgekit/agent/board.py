"""A page of shared memory a model: what its worker is doing right now, readable after the worker's sudden death.

The worker marks a model before each inference and unmarks it after; a crash in between is that model's. Counts and the last
latencies lie there too, so that probation loses nothing with a worker. One writer a page, readers take what they find.

    >>> board = Board.create(2)
    >>> board.page(1).enter()
    >>> board.running()
    (1,)
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.agent.faults import checkpoint, is_faulty
from edgekit.errors import DataError

PAGE_BYTES = 4096
RECENT = 512
_COUNTS = struct.Struct("<QQQQ")
_COUNTS_AT = 8
_RECENT_AT = 64
_IDLE = b"\0"
_BUSY = b"\1"


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What a model did in one worker: inferences that ended, those that failed, those with a value that is not finite."""

    inferences: int = 0
    failures: int = 0
    bad_outputs: int = 0


class Page:
    """One model's page."""

    def __init__(self, memory: mmap.mmap, number: int) -> None:
        self._memory, self._start = memory, number * PAGE_BYTES
        self._inferences = self._failures = self._bad = self._written = 0
        self._depth = 0

    def enter(self) -> None:
        """The model is at work from now on."""
        self._depth += 1
        self._memory[self._start : self._start + 1] = _BUSY

    def cancel(self) -> None:
        """It is done with something that is not counted: its loading, a request that was refused."""
        self._depth -= 1
        if self._depth <= 0:
            self._memory[self._start : self._start + 1] = _IDLE

    def leave(self, latency_ms: float, *, is_failed: bool) -> None:
        """It is done."""
        self._inferences += 1
        if is_failed:
            self._failures += 1
        else:
            place = self._start + _RECENT_AT + 4 * (self._written % RECENT)
            struct.pack_into("<f", self._memory, place, latency_ms)
            self._written += 1
        self._save()
        self.cancel()

    def note_bad_output(self) -> None:
        """An answer had a value that is not finite."""
        self._bad += 1
        self._save()

    def _save(self) -> None:
        place = self._start + _COUNTS_AT
        _COUNTS.pack_into(self._memory, place, self._inferences, self._failures, self._bad, self._written)

    @property
    def is_busy(self) -> bool:
        """Whether the model is, or was in its worker's last moment, at work."""
        return self._memory[self._start : self._start + 1] == _BUSY

    @property
    def tally(self) -> Tally:
        """The counts."""
        inferences, failures, bad, _ = _COUNTS.unpack_from(self._memory, self._start + _COUNTS_AT)
        return Tally(inferences=inferences, failures=failures, bad_outputs=bad)

    @property
    def recent_ms(self) -> Sequence[float]:
        """The last latencies of answers that did not fail, milliseconds, in no order."""
        *_, written = _COUNTS.unpack_from(self._memory, self._start + _COUNTS_AT)
        found = array("f")
        count = min(written, RECENT)
        found.frombytes(self._memory[self._start + _RECENT_AT : self._start + _RECENT_AT + 4 * count])
        return found


class WatchedSession:
    """A session (:class:`edgekit.runtime.session.Session`) that keeps its page."""

    def __init__(self, session: Any, page: Page, label: str = "") -> None:
        self._session, self._page, self._label = session, page, label
        self._is_faulty = is_faulty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once, under watch."""
        page = self._page
        page.enter()
        if self._is_faulty:
            checkpoint(f"run {self._label} {page.tally.inferences + 1}")
        started = time.perf_counter()
        try:
            outputs: dict[str, Any] = self._session.run(feeds)
        except DataError:  # the caller's fault
            page.cancel()
            raise
        except BaseException:
            page.leave(0.0, is_failed=True)
            raise
        page.leave((time.perf_counter() - started) * 1000.0, is_failed=False)
        return outputs


class Board:
    """The pages of one worker, in the order of its models."""

    def __init__(self, descriptor: int, count: int) -> None:
        self.descriptor, self._count = descriptor, count
        self._memory = mmap.mmap(descriptor, PAGE_BYTES * max(1, count))
        self._pages = tuple(Page(self._memory, number) for number in range(count))

    @classmethod
    def create(cls, count: int) -> Board:
        """A new one for so many models."""
        descriptor = os.memfd_create("edgekit-board", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, PAGE_BYTES * max(1, count))
        return cls(descriptor, count)

    def page(self, number: int) -> Page:
        """A model's page."""
        return self._pages[number]

    def running(self) -> tuple[int, ...]:
        """Which models are at work."""
        return tuple(number for number, page in enumerate(self._pages) if page.is_busy)

    def close(self) -> None:
        """Give up the descriptor; what is mapped stays readable."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def p95(values: Sequence[float]) -> float:
    """The value that 95 % of the values do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]) if ordered else 0.0
