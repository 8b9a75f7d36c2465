"""Alerts as a part of the server: the signals of every part, and the jobs that judge and deliver."""

from __future__ import annotations

import time
from collections.abc import Iterable

from edgekit.fleet.alerting.delivery import Courier
from edgekit.fleet.alerting.service import Alerts
from edgekit.fleet.alerting.signals import Signal
from edgekit.fleet.alerting.sources import server_signals, store_signals
from edgekit.fleet.services import Services

TURN_SECONDS = 10.0
DELIVERY_SECONDS = 2.0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def open_alerts(services: Services) -> Alerts:
    """The service; its jobs are registered and run when the server does.

    Raises:
        UsageError: the rules are wrong.
    """

    def from_watch(now_ms: int) -> Iterable[Signal]:
        return services.watch.signals(now_ms) if services.watch is not None else ()

    def from_rollouts(now_ms: int) -> Iterable[Signal]:
        return services.rollouts.signals(now_ms) if services.rollouts is not None else ()

    config = services.config
    service = Alerts(
        services,
        sources=(
            lambda now_ms: store_signals(services, now_ms),
            lambda now_ms: server_signals(services, now_ms),
            from_watch,
            from_rollouts,
        ),
        courier=Courier(is_private_allowed=config.is_private_webhook_allowed),
        base_url=config.public_url.rstrip("/"),
    )

    def turn() -> None:
        service.turn(_now_ms())
        services.jobs.wake("deliveries")

    services.jobs.every(TURN_SECONDS, "alerts", turn)
    services.jobs.every(DELIVERY_SECONDS, "deliveries", lambda: _deliver_all(service))
    return service


def _deliver_all(service: Alerts) -> None:
    while service.deliver(_now_ms()):
        pass
