"""Home Assistant's MQTT discovery: each device of the fleet as a device there, without a line of its configuration. No I/O.

A retained configuration a device (``homeassistant/device/ID/config``, one payload for all its entities), its state as JSON, and
its availability. Configurations go again when Home Assistant says that it was born, and are emptied when a device is gone.

>>> bridge = HomeAssistant()
>>> [message.topic for message in bridge.update([])]
['edgekit-ha/bridge/availability']
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from edgekit import __version__
from edgekit.errors import UsageError
from edgekit.fleet.bridges.source import BridgedDevice
from edgekit.fleet.packets import ConnectOptions, Filter, Will

BIRTH = b"online"
ONLINE, OFFLINE = b"online", b"offline"
KEEP_ALIVE_S = 30
_PRECISION = {"ms": 2, "1/s": 1, "%": 0, "MB": 0}


class Published(NamedTuple):
    """A retained message, QoS 1."""

    topic: str
    payload: bytes


class _Entity(NamedTuple):
    """A sensor: its key in the state, its name for people, and how Home Assistant shows it."""

    key: str
    name: str
    unit: str = ""
    device_class: str = ""
    state_class: str = ""
    is_diagnostic: bool = False


SENSORS = (
    _Entity("state", "State"),
    _Entity("release", "Model release"),
    _Entity("latency_p50_ms", "Latency p50", "ms", "duration", "measurement"),
    _Entity("latency_p99_ms", "Latency p99", "ms", "duration", "measurement"),
    _Entity("throughput_per_s", "Inferences per second", "1/s", "", "measurement"),
    _Entity("drift", "Drift", "", "", "measurement"),
    _Entity("cpu_percent", "Processor", "%", "", "measurement", is_diagnostic=True),
    _Entity("rss_mb", "Memory", "MB", "data_size", "measurement", is_diagnostic=True),
    _Entity("outbox", "Messages kept", "", "", "measurement", is_diagnostic=True),
    _Entity("refused", "Releases refused", "", "", "measurement", is_diagnostic=True),
    _Entity("last_error", "Last error", is_diagnostic=True),
)
"""What each device shows; ``key`` is a field of its state message."""


class HomeAssistant:
    """What to publish when the fleet changes, or Home Assistant starts."""

    def __init__(self, *, prefix: str = "homeassistant", topic: str = "edgekit-ha", dashboard: str = "") -> None:
        """Nothing is known yet.

        Args:
            prefix: of discovery, as Home Assistant is configured.
            topic: below which states and availabilities are published.
            dashboard: the fleet server's address, for links.

        Raises:
            UsageError: ``homeassistant.topic``.
        """
        for text in (prefix, topic):
            if not text or any(sign in text for sign in "+#") or text.startswith("$") or text.strip("/") != text:
                raise UsageError("homeassistant.topic", f"{text!r}: not a topic to publish below.")
        self._prefix, self._topic, self._dashboard = prefix, topic, dashboard.rstrip("/")
        self._devices: dict[tuple[str, str], BridgedDevice] = {}
        self._told: dict[str, bytes] = {}

    @property
    def filters(self) -> tuple[Filter, ...]:
        """Home Assistant's own birth and death, and what an earlier run left behind."""
        status = Filter(pattern=f"{self._prefix}/status", qos=1)
        return (status, Filter(pattern=f"{self._prefix}/device/+/config", qos=1))

    @property
    def availability(self) -> str:
        """Where this bridge says whether it is there."""
        return f"{self._topic}/bridge/availability"

    def connecting(self, client_id: str) -> ConnectOptions:
        """The next connect; the will makes every device unavailable when the bridge is gone."""
        self._told.clear()
        will = Will(topic=self.availability, payload=OFFLINE, qos=1, is_retained=True)
        return ConnectOptions(client_id=client_id, keep_alive_s=KEEP_ALIVE_S, will=will)

    def leaving(self) -> Published:
        """To be published before an intended disconnect."""
        return Published(self.availability, OFFLINE)

    def update(self, devices: Iterable[BridgedDevice]) -> list[Published]:
        """The fleet as it is now; what has changed of what Home Assistant was told."""
        self._devices = {(device.site, device.device): device for device in devices}
        wanted: dict[str, bytes] = {self.availability: ONLINE}
        for device in self._devices.values():
            wanted |= self._messages(device)
        gone = [topic for topic, payload in self._told.items() if topic not in wanted and payload]
        changed = [Published(topic, payload) for topic, payload in wanted.items() if self._told.get(topic) != payload]
        self._told = wanted
        return [*changed, *(Published(topic, b"") for topic in gone)]

    def hear(self, topic: str, payload: bytes) -> list[Published]:
        """Home Assistant was born: everything again. A configuration of ours whose device is gone: it is emptied."""
        if topic == f"{self._prefix}/status":
            return [Published(where, what) for where, what in self._told.items()] if payload == BIRTH else []
        is_ours = topic.startswith(f"{self._prefix}/device/edgekit_") and payload
        if is_ours and self._told and topic not in self._told and self._is_of_this_bridge(payload):
            return [Published(topic, b"")]
        return []

    def _is_of_this_bridge(self, payload: bytes) -> bool:
        try:
            found = msgspec.json.decode(payload)
        except msgspec.DecodeError:
            return False
        return isinstance(found, dict) and str(found.get("state_topic", "")).startswith(f"{self._topic}/")

    def _messages(self, device: BridgedDevice) -> dict[str, bytes]:
        base = f"{self._topic}/{device.site}/{device.device}"
        name = f"edgekit_{device.site}_{device.device}"
        return {
            f"{self._prefix}/device/{name}/config": self._config(device, name, base),
            f"{base}/availability": OFFLINE if device.state == "offline" else ONLINE,
            f"{base}/state": msgspec.json.encode(_state(device)),
        }

    def _config(self, device: BridgedDevice, name: str, base: str) -> bytes:
        about: dict[str, Any] = {
            "identifiers": [name],
            "name": f"{device.site} {device.device}",
            "manufacturer": "edgekit",
            "model": device.arch or "edge device",
            "sw_version": device.agent_version,
            "suggested_area": device.site,
        }
        if self._dashboard:
            about["configuration_url"] = f"{self._dashboard}/devices/{device.site}/{device.device}"
        config: dict[str, Any] = {
            "device": about,
            "origin": {"name": "edgekit", "sw_version": __version__},
            "components": {entity.key: _component(entity, name) for entity in SENSORS},
            "state_topic": f"{base}/state",
            "availability": [{"topic": self.availability}, {"topic": f"{base}/availability"}],
            "availability_mode": "all",
            "qos": 1,
        }
        return msgspec.json.encode(config)


def _component(entity: _Entity, name: str) -> dict[str, Any]:
    """One sensor of a device's configuration."""
    found: dict[str, Any] = {
        "platform": "sensor",
        "unique_id": f"{name}_{entity.key}",
        "name": entity.name,
        "value_template": f"{{{{ value_json.{entity.key} }}}}",
    }
    if entity.unit:
        found |= {"unit_of_measurement": entity.unit, "suggested_display_precision": _PRECISION[entity.unit]}
    if entity.device_class:
        found["device_class"] = entity.device_class
    if entity.state_class:
        found["state_class"] = entity.state_class
    if entity.is_diagnostic:
        found["entity_category"] = "diagnostic"
    return found


def _state(device: BridgedDevice) -> dict[str, Any]:
    """What the entities' templates read; null shows as unknown."""
    release = f"{device.model}@{device.version}" if device.model else None
    special: dict[str, Any] = {"release": release, "last_error": device.last_error[:255]}
    return {entity.key: special[entity.key] if entity.key in special else getattr(device, entity.key) for entity in SENSORS}
