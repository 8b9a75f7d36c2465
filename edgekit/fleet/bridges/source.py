"""What bridges tell of a device: read from the fleet server's API, whole, again and again.

>>> devices = read_devices(lambda path: get_json(url, path))  # doctest: +SKIP
>>> devices[0].state                                          # doctest: +SKIP
'online'
"""

from __future__ import annotations

import logging
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edgekit.errors import EdgekitError
from edgekit.fleet.views import DevicePage, DeviceView
from edgekit.schema.base import Record

logger = logging.getLogger(__name__)

PAGE = 500
Fetch = Callable[[str], Any]
"""Answers a path of the API with decoded JSON; it raises an EdgekitError when the server does not answer."""


class _Version(Record, frozen=True, kw_only=True):
    version: str
    device_class: str = ""
    effect: float | None = None


class _Versions(Record, frozen=True, kw_only=True):
    versions: tuple[_Version, ...] = ()


class BridgedDevice(Record, frozen=True, kw_only=True):
    """One device; a figure that nobody reported is null."""

    site: str
    device: str
    state: str
    last_seen_ms: int
    model: str
    version: str
    model_digest: str
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    throughput_per_s: float | None
    cpu_percent: float | None
    rss_mb: float | None
    outbox: int | None
    refused: int
    drift: float | None
    """The largest effect that the server sees on the version that it runs."""
    last_error: str
    arch: str
    agent_version: str

    @property
    def is_online(self) -> bool:
        """Whether it is connected, and says something."""
        return self.state == "online"


def read_devices(fetch: Fetch) -> tuple[BridgedDevice, ...]:
    """Every device of the fleet.

    Raises:
        EdgekitError: the server does not answer.
    """
    found: list[DeviceView] = []
    after = ""
    while True:
        query = urllib.parse.urlencode({"after": after, "limit": PAGE})
        page = msgspec.convert(fetch(f"/api/v1/devices?{query}"), DevicePage)
        found += page.devices
        after = page.next
        if not after:
            break
    drift = _read_drift(fetch, {view.model for view in found if view.model})
    return tuple(_bridged(view, drift.get((view.model, view.version))) for view in found)


def _read_drift(fetch: Fetch, models: set[str]) -> Mapping[tuple[str, str], float]:
    """The effect by model and version; nothing from a server that watches no drift."""
    found: dict[tuple[str, str], float] = {}
    for model in sorted(models):
        try:
            page = msgspec.convert(fetch(f"/api/v1/models/{urllib.parse.quote(model)}/versions"), _Versions)
        except (EdgekitError, msgspec.ValidationError) as error:
            logger.debug("event=no_drift model=%s error=%r", model, str(error))
            continue
        for version in page.versions:
            if not version.device_class and version.effect is not None:
                found[model, version.version] = version.effect
    return found


def _bridged(view: DeviceView, drift: float | None) -> BridgedDevice:
    return BridgedDevice(
        site=view.site,
        device=view.device,
        state=view.state,
        last_seen_ms=view.last_seen_ms,
        model=view.model,
        version=view.version,
        model_digest=view.model_digest,
        latency_p50_ms=view.latency_p50_ms,
        latency_p99_ms=view.latency_p99_ms,
        throughput_per_s=view.throughput_per_s,
        cpu_percent=view.cpu_percent,
        rss_mb=view.rss_mb,
        outbox=view.outbox_messages,
        refused=view.refused,
        drift=drift,
        last_error=view.last_error,
        arch=view.arch,
        agent_version=view.agent_version,
    )
