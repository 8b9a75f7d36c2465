"""What a worker counts of one model between two collections.

The hot path appends two floats; histograms are filled when the figures are taken, or when enough have come together. Sketches
of inputs and answers cost more, and have a budget: at most ``SKETCH_SHARE`` of the time. Beyond it samples are left out, and
how many were sketched is told.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgekit.agent.link import Figures
from edgekit.telemetry.histogram import LatencyHistogram

if TYPE_CHECKING:
    from edgekit.monitor.sketch import Sketcher
    from edgekit.schema.baseline import ReferenceProfile

logger = logging.getLogger(__name__)

FOLD_AT = 4096
TIMED = ("request", "inference", "queue")
SKETCH_SHARE = 0.05
"""Of one core, averaged over the time since the last collection."""
FREE_SECONDS = 0.05
"""What may be spent at once after a collection, before the share counts."""


@dataclass
class Meter:
    """Counters, latencies in milliseconds, and sketches of one model in one worker. Used from one thread at a time."""

    model_digest: str = ""
    profile: ReferenceProfile | None = None
    profile_crc: int = 0
    """CRC-32 of the profile as it travelled."""
    total_requests: int = 0
    total_errors: int = 0
    total_rejected: int = 0
    total_samples: int = 0
    total_out_of_range: int = 0
    total_verdicts: dict[str, int] = field(default_factory=dict)
    _lifetime: dict[str, tuple[LatencyHistogram, float]] = field(
        default_factory=lambda: {name: (LatencyHistogram(), 0.0) for name in TIMED}
    )
    _requests: int = 0
    _errors: int = 0
    _rejected: int = 0
    _samples: int = 0
    _out_of_range: int = 0
    _bytes_in: int = 0
    _confidence_sum: float = 0.0
    _confidence_count: int = 0
    _latency: array[float] = field(default_factory=lambda: array("d"))
    _inference: array[float] = field(default_factory=lambda: array("d"))
    _queue: array[float] = field(default_factory=lambda: array("d"))
    _latency_bins: LatencyHistogram = field(default_factory=LatencyHistogram)
    _inference_bins: LatencyHistogram = field(default_factory=LatencyHistogram)
    _queue_bins: LatencyHistogram = field(default_factory=LatencyHistogram)
    _sketcher: Sketcher | None = None
    _sketched: int = 0
    _sketch_seconds: float = 0.0
    _since: float = field(default_factory=time.monotonic)
    _verdicts: dict[str, int] = field(default_factory=dict)
    _labelled: int = 0
    _right: int = 0

    def __post_init__(self) -> None:
        if self.profile is not None:
            from edgekit.monitor.sketch import Sketcher  # noqa: PLC0415 - numpy: a worker without a model stays small

            self._sketcher = Sketcher(self.profile)

    def count(self, *, latency_ms: float, bytes_in: int, is_error: bool, is_rejected: bool) -> None:
        """One inference request was answered. A rejected one is the client's fault, an error is ours."""
        self.total_requests += 1
        self._requests += 1
        self._bytes_in += bytes_in
        self.total_errors += is_error
        self._errors += is_error
        self._rejected += is_rejected
        self.total_rejected += is_rejected
        self._latency.append(latency_ms)
        if len(self._latency) >= FOLD_AT:
            self._fold()

    def count_run(self, *, inference_ms: float, queue_ms: float, samples: int, out_of_range: int) -> None:
        """The model ran once."""
        self._inference.append(inference_ms)
        self._queue.append(queue_ms)
        self._samples += samples
        self._out_of_range += out_of_range
        self.total_samples += samples
        self.total_out_of_range += out_of_range

    def count_confidence(self, total: float, count: int) -> None:
        """Confidences of a classifier's answers, summed."""
        self._confidence_sum += total
        self._confidence_count += count

    def observe(self, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Sketch an answer's inputs and outputs, as far as the budget goes; called when the answer has been written."""
        if self._sketcher is None:
            return
        now = time.monotonic()
        if self._sketch_seconds > FREE_SECONDS + SKETCH_SHARE * (now - self._since):
            return
        try:
            self._sketcher.observe(feeds, outputs)
        except Exception:  # figures must never cost an answer
            logger.exception("event=sketch_failed")
            self._sketcher = None
            return
        self._sketched += max((array.shape[0] for array in feeds.values() if array.ndim), default=1)
        self._sketch_seconds += time.monotonic() - now

    def verdict(self, name: str, action: str, count: int) -> None:
        """The input contract made an exception: ``action`` is reject, clip, impute or pass, ``name`` an input or column."""
        key = f"{action} {name}"
        self._verdicts[key] = self._verdicts.get(key, 0) + count
        self.total_verdicts[key] = self.total_verdicts.get(key, 0) + count

    def count_labels(self, count: int, right: int) -> None:
        """True answers came to some of this model's predictions."""
        self._labelled += count
        self._right += right

    def _fold(self) -> None:
        for name, values, bins in (
            ("request", self._latency, self._latency_bins),
            ("inference", self._inference, self._inference_bins),
            ("queue", self._queue, self._queue_bins),
        ):
            fresh = LatencyHistogram()
            for value in values:
                fresh.add(value)
            bins.merge(fresh)
            lifetime, total_ms = self._lifetime[name]
            lifetime.merge(fresh)
            self._lifetime[name] = (lifetime, total_ms + sum(values))
            del values[:]

    def durations(self) -> Mapping[str, tuple[LatencyHistogram, float]]:
        """Histogram and sum since the worker's start, milliseconds, of ``TIMED``."""
        self._fold()
        return self._lifetime

    def take(self) -> Figures:
        """The figures since the last call; they start again from nothing."""
        self._fold()
        figures = Figures(
            requests=self._requests,
            errors=self._errors,
            rejected=self._rejected,
            samples=self._samples,
            out_of_range=self._out_of_range,
            confidence_sum=self._confidence_sum,
            confidence_count=self._confidence_count,
            bytes_in=self._bytes_in,
            latency=self._latency_bins.encode(),
            inference=self._inference_bins.encode(),
            queue=self._queue_bins.encode(),
            model_digest=self.model_digest,
            sketches=self._sketcher.take() if self._sketcher is not None and self._sketched else (),
            sketched=self._sketched,
            verdicts=self._verdicts,
            labelled=self._labelled,
            right=self._right,
            profile=self.profile_crc,
        )
        self._labelled = self._right = 0
        self._verdicts, self._sketched, self._sketch_seconds, self._since = {}, 0, 0.0, time.monotonic()
        self._requests = self._errors = self._rejected = self._samples = self._out_of_range = 0
        self._bytes_in = self._confidence_count = 0
        self._confidence_sum = 0.0
        self._latency_bins, self._inference_bins, self._queue_bins = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
        return figures
