#!/usr/bin/env python3
"""The dashboard over ten thousand devices: how long the server takes for a page, and when a browser has painted it.

A database is filled with devices in twenty sites, each with a birth, a report, windows and some events; then ``edgekit fleet
serve`` runs over it as a process of its own. The server's time is from the request to the last byte, over loopback, one request
after the other; meanwhile nothing is ingested unless ``--writes`` says how many windows a second are. First contentful paint
and weight are those of headless Chromium with an empty cache.

    asked for: p95 <= 100 ms, first contentful paint <= 1 s, weight <= 120 kB

    python scripts/bench/dashboard.py --devices 10000 --requests 100 --json figures.json
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received
from edgekit.schema.base import Record, encode_json
from edgekit.schema.message import Birth, Death, Event, MetricSpec, Reported, SketchSpec, SlotReport, Window, WindowBatch
from edgekit.telemetry.codec import pack_values, schema_crc
from edgekit.telemetry.histogram import BINS, LatencyHistogram

P95_MS, PAINT_MS, WEIGHT_KB = 100.0, 1000.0, 120.0
PAGES = {
    "overview": "/",
    "table": "/devices",
    "table, sorted": "/devices?sort=latency_p99&desc=1",
    "table, searched": "/devices?search=cam-0042",
    "table, selected": "/devices?selector=label.camera%3Ddome%2Carch%3Daarch64",
    "cells": "/grid",
    "device": "/devices/site-03/cam-00003",
}
PAINTED = ("overview", "table", "device")
METRICS = (
    MetricSpec(name="requests", kind="count"),
    MetricSpec(name="errors", kind="count"),
    MetricSpec(name="latency_p50_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p90_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p99_ms", unit="ms", kind="quantile"),
    MetricSpec(name="cpu_percent", unit="%"),
    MetricSpec(name="rss_mb", unit="MB"),
)
SKETCHES = (SketchSpec(name="latency_ms", unit="ms", bins=BINS),)
SCHEMA = schema_crc(METRICS, SKETCHES)
SITES = 20
BATCH = 2000


class PageFigures(Record, frozen=True, kw_only=True):
    """One page, as it was measured."""

    page: str
    p50_ms: float
    p95_ms: float
    longest_ms: float
    packed_kb: float
    paint_ms: float | None = None
    weight_kb: float | None = None


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def place(number: int) -> tuple[str, str]:
    """A device's site and name."""
    return f"site-{number % SITES:02}", f"cam-{number:05}"


def make_window(number: int, seq: int, start_ms: int) -> Window:
    """One window of a device."""
    base = 3.0 + number % 17 / 4
    bins = LatencyHistogram()
    bins.add(base, 300)
    values = pack_values([300.0, float(number % 50 == 0), base, base * 1.4, base * 2.0, 20.0 + number % 30, 110.0])
    digest = f"{1 + number % 3:02x}" * 6
    return Window(seq=seq, start_ms=start_ms, duration_ms=30_000, values=values, model_digest=digest, sketches=(bins.encode(),))


def open_device(number: int, now: int) -> list[Received]:
    """What a device has said so far."""
    site, device = place(number)
    version = 1 + number % 3
    slot = SlotReport(
        name="a",
        status="active",
        model="kws",
        version=f"{version}.0.0",
        counter=version,
        model_digest="sha256:" + f"{version:02x}" * 32,
        manifest_digest="sha256:" + f"{version:02x}" * 32,
    )
    labels = {"camera": "dome" if number % 2 else "bullet", "line": str(number % 12)}
    arch = "aarch64" if number % 4 else "x86_64"
    windows = tuple(make_window(number, 3 + at, now - (6 - at) * 30_000) for at in range(6))
    messages = [
        Birth(boot=7, seq=1, time_ms=now, metrics=METRICS, sketches=SKETCHES, arch=arch, cpu="Cortex-A76", labels=labels),
        Reported(boot=7, seq=2, time_ms=now, slots=(slot,), active="a"),
        WindowBatch(boot=7, windows=windows, schema=SCHEMA),
    ]
    if number % 40 == 0:
        kind = "install_refused" if number % 80 else "messages_dropped"
        messages.append(
            Event(boot=7, seq=9, time_ms=now, kind=kind, code="selftest.mismatch", model="kws", version="3.0.0", counter=3)
        )
    if number % 25 == 0:
        messages.append(Death(boot=7))
    return [Received(site=site, device=device, message=message, received_ms=now) for message in messages]


def fill(database: str, devices: int) -> None:
    """Fill a new database."""
    store, now, batch = Store(database), now_ms(), []
    for number in range(devices):
        batch += open_device(number, now)
        if len(batch) >= BATCH:
            store.apply(batch)
            batch = []
    store.apply(batch)
    store.close()


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``edgekit fleet serve`` as a process."""

    def __init__(self, folder: Path, database: str) -> None:
        self.port = free_port()
        self.log = (folder / "server.log").open("wb")
        arguments = ("--port", str(self.port), "--broker-port", str(free_port()), "--db", database)
        command = [sys.executable, "-m", "edgekit", "fleet", "serve", *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log, env=os.environ | {"NO_COLOR": "1"})
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.5).close()
                break
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise SystemExit(f"the server did not start: {folder / 'server.log'}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


def ask(port: int, path: str) -> tuple[float, int]:
    """How long a page takes, and its bytes on the wire."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    begin = time.perf_counter()
    connection.request("GET", path, headers={"Accept": "text/html", "Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    data = answer.read()
    elapsed = time.perf_counter() - begin
    connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise SystemExit(f"{path} answers {answer.status}: {data[:300]!r}")
    if answer.headers["content-encoding"] == "gzip":
        gzip.decompress(data)
    return elapsed, len(data)


def quantile(values: list[float], share: float) -> float:
    """A quantile by rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(server: Server, requests: int) -> list[PageFigures]:
    """The server's time for each page; the pages take turns, so that none has the machine's best moment."""
    times: dict[str, list[float]] = {name: [] for name in PAGES}
    sizes = dict.fromkeys(PAGES, 0)
    for path in PAGES.values():
        ask(server.port, path)
    for _ in range(requests):
        for name, path in PAGES.items():
            elapsed, sizes[name] = ask(server.port, path)
            times[name].append(1000 * elapsed)
    return [
        PageFigures(
            page=name,
            p50_ms=statistics.median(times[name]),
            p95_ms=quantile(times[name], 0.95),
            longest_ms=max(times[name]),
            packed_kb=sizes[name] / 1000,
        )
        for name in PAGES
    ]


def paint(server: Server, turns: int) -> dict[str, tuple[float, float]]:
    """First contentful paint in ms, the median of some turns, and the weight in kB; nothing without Chromium."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        print("Chromium is not installed: no paint is measured", file=sys.stderr)
        return {}
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - figures of the server need no browser

    found = {}
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=path, args=flags)
        for name in PAINTED:
            paints, weights = [], []
            for _ in range(turns):
                context = browser.new_context(viewport={"width": 1280, "height": 900})
                page = context.new_page()
                weight: list[int] = []
                page.on("requestfinished", lambda request, weight=weight: weight.append(request.sizes()["responseBodySize"]))
                page.goto(f"http://127.0.0.1:{server.port}{PAGES[name]}")
                page.wait_for_timeout(600)
                entries = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
                paints.append(page.evaluate(entries))
                weights.append(sum(weight) / 1000)
                context.close()
            found[name] = (statistics.median(paints), max(weights))
        browser.close()
    return found


def write_on(database: str, devices: int, rate: float, is_over: threading.Event) -> None:
    """Windows go on to come in: by another process's store, as from another server of a group."""
    store, at = Store(database), 0
    while not is_over.is_set():
        count, now = max(1, round(rate / 2)), now_ms()
        batch = []
        for number in range(at, at + count):
            site, device = place(number % devices)
            window = make_window(number % devices, 100 + number // devices, now - 30_000)
            message = WindowBatch(boot=7, windows=(window,), schema=SCHEMA)
            batch.append(Received(site=site, device=device, message=message, received_ms=now))
        store.apply(batch)
        at += count
        is_over.wait(0.5)
    store.close()


def show(figures: list[PageFigures]) -> bool:
    """Print the figures; whether all is as asked."""
    print(f"{'page':18}{'p50 ms':>9}{'p95 ms':>9}{'longest':>9}{'packed kB':>11}{'paint ms':>10}{'weight kB':>11}")
    for item in figures:
        painted = f"{item.paint_ms:10.0f}{item.weight_kb:11.1f}" if item.paint_ms is not None else ""
        print(f"{item.page:18}{item.p50_ms:9.1f}{item.p95_ms:9.1f}{item.longest_ms:9.1f}{item.packed_kb:11.1f}{painted}")
    return all(
        item.p95_ms <= P95_MS and (item.paint_ms or 0) <= PAINT_MS and (item.weight_kb or 0) <= WEIGHT_KB for item in figures
    )


def main() -> int:
    """Fill, serve, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=100, help="of each page")
    parser.add_argument("--paints", type=int, default=5, help="turns in the browser for each page")
    parser.add_argument("--writes", type=float, default=0.0, help="windows a second that are written meanwhile")
    parser.add_argument("--database", default="", help="a SQLAlchemy URL of an empty database; a new SQLite file by default")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        database = given.database or str(folder / "fleet.db")
        begin = time.monotonic()
        fill(database, given.devices)
        print(f"{given.devices} devices in {time.monotonic() - begin:.1f} s", file=sys.stderr)
        server, is_over = Server(folder, database), threading.Event()
        writer = threading.Thread(target=write_on, args=(database, given.devices, given.writes, is_over), daemon=True)
        if given.writes:
            writer.start()
        try:
            figures = measure(server, given.requests)
            painted = paint(server, given.paints)
        finally:
            is_over.set()
            if given.writes:
                writer.join(10)
            server.stop()
    figures = [
        msgspec.structs.replace(item, paint_ms=painted[item.page][0], weight_kb=painted[item.page][1])
        if item.page in painted
        else item
        for item in figures
    ]
    if given.json:
        given.json.write_bytes(encode_json(figures))
    return 0 if show(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
