"""``GET /metrics``: the agent's figures in Prometheus' text format, version 0.0.4.

Names follow Prometheus' conventions: base units, ``_total`` for counters. A worker's counters begin again with it, which
``rate()`` understands; ``edgekit_agent_requests_total`` counts over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import msgspec

from edgekit.telemetry.histogram import PER_OCTAVE, LatencyHistogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS_MS = tuple(2.0**power for power in range(-3, 15))
"""Upper bounds of the buckets: where the histogram's own octaves end, so that counts are exact."""


class Metered(Protocol):
    """What one model counted since its worker began."""

    total_requests: int
    total_errors: int
    total_rejected: int
    total_samples: int
    total_out_of_range: int
    total_verdicts: dict[str, int]

    def durations(self) -> Mapping[str, tuple[LatencyHistogram, float]]:
        """Histogram and sum, milliseconds, by what was timed."""


def render(models: Mapping[tuple[str, str, str], Metered], status: bytes | None) -> bytes:
    """The page.

    Args:
        models: meters by model, version and digest.
        status: the supervisor's own view as JSON; None when it does not answer.
    """
    lines: list[str] = []
    lines += _models(models)
    if status is not None:
        lines += _agent(msgspec.json.decode(status))
    return ("\n".join(lines) + "\n").encode()


def _models(models: Mapping[tuple[str, str, str], Metered]) -> Iterator[str]:
    labels = {key: _labels(model=key[0], version=key[1]) for key in models}
    yield from _family("edgekit_model_info", "gauge", "The models that serve.")
    for name, version, digest in models:
        yield f"edgekit_model_info{{{_labels(model=name, version=version, digest=digest)}}} 1"
    counters = (
        ("edgekit_inference_requests", "Inference requests that were answered.", "total_requests"),
        ("edgekit_inference_errors", "Requests that failed here.", "total_errors"),
        ("edgekit_inference_rejected", "Requests that the caller got wrong, or that found the queue full.", "total_rejected"),
        ("edgekit_inference_samples", "Samples that went through the model.", "total_samples"),
        ("edgekit_input_out_of_range", "Samples with a value outside the calibrated range.", "total_out_of_range"),
    )
    for name, text, attribute in counters:
        yield from _family(f"{name}_total", "counter", text)
        for key, meter in models.items():
            yield f"{name}_total{{{labels[key]}}} {getattr(meter, attribute)}"
    yield from _family("edgekit_input_verdicts_total", "counter", "Exceptions that the input contract made.")
    for key, meter in models.items():
        for verdict, count in sorted(meter.total_verdicts.items()):
            action, _, column = verdict.partition(" ")
            yield f"edgekit_input_verdicts_total{{{labels[key]},{_labels(action=action, input=column)}}} {count}"
    timed = (
        ("request", "edgekit_request_duration_seconds", "From a request's first byte to its answer."),
        ("inference", "edgekit_inference_duration_seconds", "The model alone."),
        ("queue", "edgekit_queue_duration_seconds", "From a request's first byte to the model's start."),
    )
    for what, name, text in timed:
        yield from _family(name, "histogram", text)
        for key, meter in models.items():
            bins, total_ms = meter.durations()[what]
            yield from _histogram(name, labels[key], bins, total_ms)


def _histogram(name: str, labels: str, bins: LatencyHistogram, total_ms: float) -> Iterator[str]:
    counts = bins.counts
    for bound in BOUNDS_MS:
        last = round(math.log2(bound) * PER_OCTAVE) - 1
        below = sum(count for index, count in counts.items() if index <= last)
        yield f'{name}_bucket{{{labels},le="{bound / 1000:g}"}} {below}'
    yield f'{name}_bucket{{{labels},le="+Inf"}} {bins.count}'
    yield f"{name}_sum{{{labels}}} {total_ms / 1000:.9g}"
    yield f"{name}_count{{{labels}}} {bins.count}"


def _agent(status: Mapping[str, Any]) -> Iterator[str]:
    figures = (
        ("edgekit_agent_uptime_seconds", "gauge", "Since the agent's start.", status.get("uptime_s", 0.0)),
        ("edgekit_agent_resident_memory_bytes", "gauge", "Supervisor and workers.", status.get("rss_mb", 0.0) * 1e6),
        ("edgekit_agent_requests_total", "counter", "Requests of all workers.", status.get("requests", 0)),
        ("edgekit_agent_errors_total", "counter", "Failed requests of all workers.", status.get("errors", 0)),
        ("edgekit_broker_connected", "gauge", "1 while connected.", int(bool(status.get("is_broker_connected")))),
        ("edgekit_outbox_messages", "gauge", "Messages that wait to be sent.", status.get("outbox_messages", 0)),
        ("edgekit_outbox_bytes", "gauge", "What they take, about.", status.get("outbox_bytes", 0)),
        ("edgekit_last_error", "gauge", "1 while the updater's last round failed.", int(bool(status.get("last_error")))),
    )
    for name, kind, text, value in figures:
        yield from _family(name, kind, text)
        yield f"{name} {value:.12g}"


def _family(name: str, kind: str, text: str) -> Iterable[str]:
    return (f"# HELP {name} {text}", f"# TYPE {name} {kind}")


def _labels(**values: str) -> str:
    return ",".join(f'{name}="{_escape(value)}"' for name, value in values.items())


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
