"""Many broken inputs become one event, not one a request.

A worker's verdicts come with its figures, window by window. When more than the contract's share of a window's samples broke it,
that is an event; the next one comes only after the share has fallen below half of that and risen again.

What is counted against the share: what was refused, clipped or filled in. Values that passed count only where the contract
names a share of its own, since a value that was not seen in calibration is legal input otherwise, and drift's to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgekit.agent.link import Figures
from edgekit.schema.contract import Contract

DEFAULT_SHARE = 0.1
LEAST_SAMPLES = 20
"""Fewer say nothing about a share."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A share that was passed: of ``samples``, mostly by ``name``."""

    model_digest: str
    name: str
    action: str
    share: float
    limit: float
    samples: int

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.name}: {self.share:.1%} of {self.samples} samples {_DONE[self.action]}, the limit is {self.limit:.1%}"


_DONE = {"reject": "refused", "clip": "clipped", "impute": "filled in", "pass": "passed though they break the contract"}


@dataclass
class ViolationWatch:
    """Remembers which models are above their limit."""

    _samples: dict[str, int] = field(default_factory=dict)
    _counts: dict[str, dict[str, int]] = field(default_factory=dict)
    _above: set[str] = field(default_factory=set)

    def judge(self, figures: Figures, contract: Contract) -> Violation | None:
        """Take one model's figures; windows with few samples are put together.

        Returns:
            The violation, when its limit was passed just now.
        """
        digest = figures.model_digest
        samples = self._samples.get(digest, 0) + figures.samples + _refused(figures.verdicts)
        counts = self._counts.pop(digest, {})
        for key, count in figures.verdicts.items():
            counts[key] = counts.get(key, 0) + count
        if samples < LEAST_SAMPLES:
            self._samples[digest], self._counts[digest] = samples, counts
            return None
        self._samples.pop(digest, None)
        limit = DEFAULT_SHARE if contract.violation_share is None else contract.violation_share
        counted = {key: n for key, n in counts.items() if contract.violation_share is not None or not key.startswith("pass ")}
        worst = max(counted, key=lambda key: counted[key], default="")
        share = min(1.0, counted.get(worst, 0) / samples)
        if share <= limit:
            if share <= limit / 2:
                self._above.discard(digest)
            return None
        if digest in self._above:
            return None
        self._above.add(digest)
        action, _space, name = worst.partition(" ")
        return Violation(model_digest=digest, name=name, action=action, share=share, limit=limit, samples=samples)


def _refused(verdicts: Mapping[str, int]) -> int:
    """Samples of requests that were refused, which no other figure counts; the worst column stands for all."""
    return max((count for key, count in verdicts.items() if key.startswith("reject ")), default=0)
