"""``/metrics``: the fleet in Prometheus' text format, by site, model and release, never by device.

What is a figure of the last quarter of an hour is a gauge; what only grows is a counter of this process and begins again with
it, as Prometheus expects. Asking is cheap: the figures are those of the last ten seconds.

>>> print(Family("edgekit_devices", "gauge", "Devices.", [({"state": "online"}, 3.0)]).text(), end="")
# HELP edgekit_devices Devices.
# TYPE edgekit_devices gauge
edgekit_devices{state="online"} 3
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fastapi import APIRouter, Response

from edgekit import __version__
from edgekit.fleet.alerting.signals import Signal
from edgekit.fleet.services import Services

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FRESH_S = 10.0
MAX_SERIES = 2000
"""Of one name: a runaway label must not take the scraper down."""
_OF_SIGNALS: dict[str, tuple[str, float, str]] = {
    "device.offline": ("edgekit_devices_offline_ratio", 1, "Share of devices whose connection was lost."),
    "device.silent": ("edgekit_devices_silent_ratio", 1, "Share of devices that are connected and say nothing."),
    "install.failed_share": ("edgekit_installs_failed_ratio", 1, "Share of devices that failed to install, of the last day."),
    "rolled_back.share": ("edgekit_rolled_back_ratio", 1, "Share of devices that went back, of the last day."),
    "latency.p95_ms": ("edgekit_inference_duration_p95_seconds", 1e-3, "95th percentile of the last 15 minutes."),
    "error.share": ("edgekit_inference_errors_ratio", 1, "Share of requests that failed in the last 15 minutes."),
    "rejected.share": ("edgekit_inference_rejected_ratio", 1, "Share of refused inputs in the last 15 minutes."),
    "drift.effect": ("edgekit_drift_effect", 1, "Effect of input drift, bias-corrected PSI."),
    "drift.evidence": ("edgekit_drift_evidence_ratio", 1, "Evidence of input drift, of what raises an alarm."),
    "prediction_drift": ("edgekit_prediction_drift_effect", 1, "Effect of drift in the answers."),
    "accuracy.estimated": ("edgekit_accuracy_estimated_ratio", 1, "Accuracy, estimated before labels come."),
    "accuracy.realised": ("edgekit_accuracy_realised_ratio", 1, "Accuracy of answers whose label came."),
    "contract.violations": ("edgekit_contract_violations_ratio", 1, "Share of inputs with a verdict."),
    "missing.share": ("edgekit_input_missing_ratio", 1, "Share of missing values."),
    "saturation.share": ("edgekit_input_saturated_ratio", 1, "Share of values beyond the reference's range."),
}


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


@dataclass
class Family:
    """One metric with its series."""

    name: str
    kind: str
    help: str
    series: list[tuple[dict[str, str], float]] = field(default_factory=list)

    def text(self) -> str:
        """Its lines."""
        lines = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} {self.kind}"]
        for labels, value in self.series[:MAX_SERIES]:
            inner = ",".join(f'{name}="{_escape(text)}"' for name, text in sorted(labels.items()))
            lines.append(f"{self.name}{f'{{{inner}}}' if inner else ''} {value:.10g}")
        return "\n".join(lines) + "\n"


class Metrics:
    """The text, made at most once in ``FRESH_S``."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = threading.Lock()
        self._made_at, self._text = -FRESH_S, ""

    def text(self) -> str:
        """What a scraper reads."""
        with self._lock:
            if time.monotonic() - self._made_at >= FRESH_S:
                self._text = "".join(family.text() for family in self._families(time.time_ns() // 1_000_000) if family.series)
                self._made_at = time.monotonic()
            return self._text

    def _families(self, now_ms: int) -> Iterator[Family]:
        yield Family("edgekit_build_info", "gauge", "The server's version.", [({"version": __version__}, 1.0)])
        yield from self._fleet(now_ms)
        yield from self._ingest()
        yield from self._jobs()
        yield from self._alerts(now_ms)
        yield from self._rollouts(now_ms)

    def _fleet(self, now_ms: int) -> Iterator[Family]:
        view = self._services.store.fleet(now_ms)
        states = {"online": view.online, "stale": view.stale, "offline": view.offline}
        yield Family("edgekit_devices", "gauge", "Devices by state.", [({"state": s}, float(n)) for s, n in states.items()])
        yield Family(
            "edgekit_devices_serving",
            "gauge",
            "Devices that serve a release.",
            [({"model": r.model, "version": r.version}, float(r.serving)) for r in view.releases],
        )
        yield Family(
            "edgekit_inference_requests_per_second", "gauge", "Requests of all devices now.", [({}, view.requests_per_s)]
        )

    def _ingest(self) -> Iterator[Family]:
        if self._services.ingest is None:
            return
        status = self._services.ingest.status()
        results = {"stored": status.stored, "duplicate": status.duplicates, "malformed": status.malformed}
        yield Family("edgekit_ingest_received_total", "counter", "Messages received.", [({}, float(status.received))])
        yield Family(
            "edgekit_ingest_messages_total",
            "counter",
            "Messages by what became of them.",
            [({"result": name}, float(number)) for name, number in results.items()],
        )
        yield Family("edgekit_ingest_lag_seconds", "gauge", "How long the oldest unstored message waits.", [({}, status.lag_s)])
        connected = float(status.is_broker_connected)
        yield Family("edgekit_ingest_broker_connected", "gauge", "Whether the broker is connected.", [({}, connected)])

    def _jobs(self) -> Iterator[Family]:
        views = self._services.jobs.views()
        for name, what in (("runs", "Runs"), ("failures", "Failed runs")):
            series = [({"job": view.name}, float(getattr(view, name))) for view in views]
            yield Family(f"edgekit_job_{name}_total", "counter", f"{what} of background jobs.", series)

    def _alerts(self, now_ms: int) -> Iterator[Family]:
        alerts = self._services.alerts
        if alerts is None:
            return
        counts: dict[tuple[str, str], int] = {}
        for alert in alerts.open_alerts():
            state = "muted" if alert.muted else "acknowledged" if alert.is_acknowledged(now_ms) else "firing"
            counts[alert.level, state] = counts.get((alert.level, state), 0) + 1
        for level in ("info", "warning", "critical"):
            counts.setdefault((level, "firing"), 0)
        series = [({"level": level, "state": state}, float(number)) for (level, state), number in sorted(counts.items())]
        yield Family("edgekit_alerts", "gauge", "Alerts that fire.", series)
        yield from _of_signals(alerts.recent_signals(now_ms))

    def _rollouts(self, now_ms: int) -> Iterator[Family]:
        rollouts = self._services.rollouts
        if rollouts is None:
            return
        series = []
        for view in rollouts.views(now_ms):
            if view.progress.state in {"running", "paused", "halted", "rolling_back"}:
                labels = {"rollout": str(view.id), "model": view.spec.model, "version": view.spec.version}
                for stage in ("waiting", "pending", "silent", "committed", "failed", "reverted"):
                    count = sum(getattr(wave, stage) for wave in view.waves)
                    series.append(({**labels, "stage": stage}, float(count)))
        yield Family("edgekit_rollout_devices", "gauge", "Devices of rollouts under way.", series)


def _of_signals(signals: Iterable[Signal]) -> Iterator[Family]:
    found: dict[str, Family] = {}
    for signal in signals:
        if signal.name in _OF_SIGNALS:
            name, scale, help_text = _OF_SIGNALS[signal.name]
            family = found.setdefault(name, Family(name, "gauge", help_text))
            family.series.append(({label: text for label, text in signal.labels.items() if text}, signal.value * scale))
    yield from found.values()


def make_router(services: Services) -> APIRouter:
    """``/metrics``."""
    router = APIRouter(tags=["metrics"])
    metrics = Metrics(services)

    @router.get("/metrics", response_class=Response)
    def read() -> Response:
        """The fleet for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router
