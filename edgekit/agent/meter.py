"""What a worker counts between two collections.

The hot path appends two floats; histograms are filled when the figures are taken, or when enough have come together.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from edgekit.agent.link import Figures
from edgekit.telemetry.histogram import LatencyHistogram

FOLD_AT = 4096


@dataclass
class Meter:
    """Counters and latencies of one worker, milliseconds."""

    total_requests: int = 0
    total_errors: int = 0
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

    def count(self, *, latency_ms: float, bytes_in: int, is_error: bool, is_rejected: bool) -> None:
        """One inference request was answered. A rejected one is the client's fault, an error is ours."""
        self.total_requests += 1
        self._requests += 1
        self._bytes_in += bytes_in
        self.total_errors += is_error
        self._errors += is_error
        self._rejected += is_rejected
        self._latency.append(latency_ms)
        if len(self._latency) >= FOLD_AT:
            self._fold()

    def count_run(self, *, inference_ms: float, queue_ms: float, samples: int, out_of_range: int) -> None:
        """The model ran once."""
        self._inference.append(inference_ms)
        self._queue.append(queue_ms)
        self._samples += samples
        self._out_of_range += out_of_range

    def count_confidence(self, total: float, count: int) -> None:
        """Confidences of a classifier's answers, summed."""
        self._confidence_sum += total
        self._confidence_count += count

    def _fold(self) -> None:
        for values, bins in (
            (self._latency, self._latency_bins),
            (self._inference, self._inference_bins),
            (self._queue, self._queue_bins),
        ):
            for value in values:
                bins.add(value)
            del values[:]

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
        )
        self._requests = self._errors = self._rejected = self._samples = self._out_of_range = 0
        self._bytes_in = self._confidence_count = 0
        self._confidence_sum = 0.0
        self._latency_bins, self._inference_bins, self._queue_bins = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
        return figures
