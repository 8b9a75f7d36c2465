"""What is shown of alerts. Times are Unix milliseconds, UTC."""

from __future__ import annotations

from typing import Literal

from edgekit.fleet.alerting.engine import Alert, Silence
from edgekit.schema.base import Record

DeliveryStatus = Literal["pending", "sent", "failed"]


class AlertEvent(Record, frozen=True, kw_only=True):
    """Something that happened to an alert."""

    time_ms: int
    actor: str
    what: str
    detail: str = ""


class DeliveryView(Record, frozen=True, kw_only=True):
    """One message to one address; ``channel`` is the address without its secrets."""

    id: int
    alert_id: int
    contact: str
    channel: str
    kind: str
    status: DeliveryStatus
    attempts: int
    created_ms: int
    next_ms: int
    error: str = ""


class AlertView(Record, frozen=True, kw_only=True):
    """One alert, with its timeline and deliveries where one was asked for."""

    alert: Alert
    is_acknowledged: bool = False
    timeline: tuple[AlertEvent, ...] = ()
    deliveries: tuple[DeliveryView, ...] = ()


class AlertPage(Record, frozen=True, kw_only=True):
    """Alerts, newest first; ``next`` is the ``before`` of the page after this one."""

    alerts: tuple[AlertView, ...]
    next: int | None = None


class SilencePage(Record, frozen=True, kw_only=True):
    """Silences that are not over."""

    silences: tuple[Silence, ...]
