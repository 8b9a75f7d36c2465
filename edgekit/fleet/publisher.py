"""What the server says to devices: one connection to the broker, apart from the ingest's.

A message is published once it is wanted and the broker is there; what was not confirmed is the caller's to publish again, which
is why everything that matters is retained and stands in the database with what was confirmed of it.

>>> publisher = Publisher(address, client_id="fleet-publisher")  # doctest: +SKIP
>>> publisher.publish("ek/1/lab/cam-7/des", envelope, is_retained=True).result(10)  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edgekit.errors import EnvironmentFault
from edgekit.fleet.config import BrokerAddress

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 30
MAX_WAITING = 20_000
MAX_INFLIGHT = 200
FIRST_FAILURE = 0x80


class Publisher:
    """Publishes for the server. Safe to use from several threads.

    Args:
        address: the broker.
        client_id: its name at the broker.
        on_connected: called, in a thread of its own making, each time the broker is there again.
    """

    def __init__(self, address: BrokerAddress, *, client_id: str, on_connected: Callable[[], None] = lambda: None) -> None:
        self._address = address
        self.on_connected = on_connected
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[None]] = {}
        self._confirmed_early: dict[int, BaseException | None] = {}
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        self._client.max_inflight_messages_set(MAX_INFLIGHT)
        self._client.max_queued_messages_set(MAX_WAITING)
        self._client.reconnect_delay_set(min_delay=1, max_delay=30)
        if address.username:
            self._client.username_pw_set(address.username, address.password)
        if (context := address.tls_context()) is not None:
            self._client.tls_set_context(context)

    @property
    def is_connected(self) -> bool:
        """Whether the broker is there."""
        return self._client.is_connected()

    def start(self) -> None:
        """Connect in the background, again and again until the broker is there."""
        self._client.connect_async(self._address.host, self._address.port, keepalive=KEEP_ALIVE_SECONDS)
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnect; what was not confirmed fails."""
        self._client.disconnect()
        self._client.loop_stop()
        self._fail_all("the server is stopping")

    def publish(self, topic: str, payload: bytes, *, is_retained: bool = False, qos: int = 1) -> Future[None]:
        """Publish a message.

        Returns:
            Done when the broker has confirmed it; fails with ``EnvironmentFault`` ``broker.unreachable`` or ``broker.refused``.
        """
        future: Future[None] = Future()
        if not self._client.is_connected():
            future.set_exception(_unreachable(f"{self._address}: not connected"))
            return future
        info = self._client.publish(topic, payload, qos=qos, retain=is_retained)
        with self._lock:  # not around publish(): paho confirms with its own lock held, which publish() wants, too
            if info.rc != mqtt.MQTT_ERR_SUCCESS:
                future.set_exception(_unreachable(f"{self._address}: {mqtt.error_string(info.rc)}"))
            elif info.mid in self._confirmed_early:
                _settle(future, self._confirmed_early.pop(info.mid))
            elif qos == 0:
                future.set_result(None)
            else:
                self._waiting[info.mid] = future
        return future

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            logger.warning("event=publisher_refused reason=%r", str(reason))
            return
        threading.Thread(target=self.on_connected, name="publisher-connected", daemon=True).start()

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, _reason: Any, _properties: Any) -> None:
        self._fail_all(f"{self._address}: the connection was lost")

    def _on_publish(self, _client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        error = None
        if reason is not None and reason.value >= FIRST_FAILURE:
            error = EnvironmentFault("broker.refused", f"{self._address}: {reason}.", hint="Check this server's rights there.")
        with self._lock:
            future = self._waiting.pop(mid, None)
            if future is None:
                self._confirmed_early[mid] = error
        if future is not None:
            _settle(future, error)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            self._confirmed_early.clear()
        for future in waiting.values():
            _settle(future, _unreachable(why))


def _settle(future: Future[None], error: BaseException | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _unreachable(why: str) -> EnvironmentFault:
    return EnvironmentFault("broker.unreachable", f"{why}.", hint="It is tried again.")
