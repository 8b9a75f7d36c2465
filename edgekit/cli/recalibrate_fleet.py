"""The fleet server as ``edgekit recalibrate`` sees it: work orders, samples, rollouts.

An order that is being worked on is asked for again every few minutes, so that it does not go to somebody else.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from edgekit.cli.fleet_http import get_json, send_bytes, send_json
from edgekit.errors import EdgekitError, EnvironmentFault
from edgekit.schema.work import FieldSample, SamplePage, WorkOrder

logger = logging.getLogger(__name__)

PAGE = 200
RENEW_S = 240.0
KINDS = ("recalibrate", "retrain")


def worker_name(place: Path) -> str:
    """Who works: this machine, and a folder on it, so that the same job run again is the same worker."""
    return f"{socket.gethostname()}:{hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:8]}"


def open_orders(url: str, model: str) -> list[WorkOrder]:
    """Orders that wait or whose worker fell silent, oldest first."""
    query = urllib.parse.urlencode({"model": model})
    found = msgspec.convert(get_json(url, f"/api/v1/work?{query}"), list[WorkOrder])
    now_ms = time.time_ns() // 1_000_000
    free = [
        order
        for order in found
        if order.kind in KINDS and (order.state == "open" or (order.state == "taken" and order.lease_until_ms < now_ms))
    ]
    return sorted(free, key=lambda order: order.id)


def my_orders(url: str, model: str, worker: str) -> list[WorkOrder]:
    """Orders that this worker has taken and not finished."""
    query = urllib.parse.urlencode({"model": model, "state": "taken"})
    found = msgspec.convert(get_json(url, f"/api/v1/work?{query}"), list[WorkOrder])
    return sorted((order for order in found if order.worker == worker), key=lambda order: order.id)


def find_order(url: str, number: int) -> WorkOrder:
    """One order."""
    return msgspec.convert(get_json(url, f"/api/v1/work/{number}"), WorkOrder)


def make_order(url: str, *, kind: str, model: str, reason: str) -> WorkOrder:
    """Open an order, so that what is done by hand is written down, too."""
    return msgspec.convert(send_json(url, "/api/v1/work", {"kind": kind, "model": model, "reason": reason}), WorkOrder)


def take_order(url: str, number: int, worker: str) -> WorkOrder:
    """Take it, or say again that one is at it."""
    return msgspec.convert(send_json(url, f"/api/v1/work/{number}/take", {"worker": worker}), WorkOrder)


def finish_order(url: str, number: int, worker: str, *, is_done: bool, result: str) -> WorkOrder:
    """Say what came of it."""
    body = {"worker": worker, "is_done": is_done, "result": result}
    return msgspec.convert(send_json(url, f"/api/v1/work/{number}/finish", body), WorkOrder)


@contextmanager
def kept(url: str, number: int, worker: str, *, period_s: float = RENEW_S) -> Iterator[None]:
    """Keep an order for as long as the block runs."""
    halt = threading.Event()

    def renew() -> None:
        while not halt.wait(period_s):
            try:
                take_order(url, number, worker)
            except EdgekitError as error:
                logger.warning("event=order_not_renewed order=%d error=%r", number, error.message)

    thread = threading.Thread(target=renew, name=f"order-{number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        halt.set()
        thread.join(timeout=15)


def read_samples(
    url: str, model: str, *, since_ms: int, limit: int, on_progress: Callable[[str, float], None]
) -> Iterator[FieldSample]:
    """Samples page by page, at most ``limit``.

    Raises:
        EnvironmentFault: ``fleet.refused`` when the server answers something else.
    """
    after, count = "", 0
    while count < limit:
        page_size = min(PAGE, limit - count)
        query = urllib.parse.urlencode({"model": model, "since_ms": since_ms, "after": after, "limit": page_size})
        data = send_bytes(url, f"/api/v1/samples?{query}", None, timeout_s=60.0)
        try:
            page = msgspec.msgpack.decode(data, type=SamplePage)
        except msgspec.DecodeError as error:
            raise EnvironmentFault("fleet.refused", f"{url}: the page of samples cannot be read: {error}.") from error
        yield from page.samples
        count += len(page.samples)
        on_progress(f"{count} field samples", min(0.95, count / limit))
        after = page.next
        if not after:
            return


def begin_rollout(url: str, body: dict[str, Any]) -> int:
    """Begin a rollout; its number."""
    return int(send_json(url, "/api/v1/rollouts", body)["id"])
