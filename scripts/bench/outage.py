#!/usr/bin/env python3
"""An hour without a broker, in the time of a minute: is every message stored once, and are live data held up by the backlog?

Real parts: Mosquitto, the fleet's ingest and store (SQLite), and the telemetry side of the agent (journal, spool, courier) as a
process of its own that is killed (SIGKILL) again and again. One message is one window of 0.1 s, so a simulated hour at 10 a
second is 36,000 of them. ``--speed`` is how much faster than the clock the outage passes; before and after it time is real.

    before   live, some seconds
    outage   first half the line is cut and the broker killed; then the broker is up, but the line swallows what comes back
             (a partition in which nothing is ever confirmed); the device is killed N times, evenly
    after    live at 10 a second of real time, while the backlog drains at the default pace

    python scripts/bench/outage.py --speed 60 --kills 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from edgekit.agent.config import AgentConfig
from edgekit.agent.courier import Courier
from edgekit.agent.journal import Journal
from edgekit.agent.link import Figures
from edgekit.agent.merging import merge_payloads
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts
from edgekit.agent.vitals import CpuMeter
from edgekit.agent.windows import Surroundings, measure_window
from edgekit.fleet.config import BrokerAddress
from edgekit.fleet.ingest import Ingest
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Fault, Received
from edgekit.schema.message import WindowBatch
from edgekit.telemetry.codec import unpack_values
from edgekit.telemetry.histogram import LatencyHistogram

PERIOD_S = 0.1
TRUTH = struct.Struct("<QQ")
CLOSED_PORT = 1


def run_device(folder: Path, port: int, outage: Path, speed: float, cap: int) -> None:
    """The device: a window every 0.1 s, faster while the file ``outage`` is there; what was stored is noted in ``truth``."""
    facts = DeviceFacts(arch="x", cpu="", isa=(), cores=1, ram_mb=1, os="", runtimes={})
    outbox = Outbox(folder / "outbox.db", max_bytes=cap, merge=merge_payloads)
    journal = Journal(outbox, AgentConfig(device="d", site="lab", broker=f"mqtt://127.0.0.1:{port}", drain_per_s=20.0), "0")
    courier = Courier(outbox, journal, lambda: journal.birth(facts, runtime="", runtime_version=""))
    journal.on_stored = courier.pump
    truth = os.open(folder / "truth", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    latency = LatencyHistogram()
    latency.add(1.5)
    figures = Figures(requests=1, samples=1, latency=latency.encode(), inference=latency.encode())

    async def live() -> None:
        courier.start()
        cpu, due = CpuMeter(), time.monotonic()
        while True:
            around = Surroundings(
                pids=(os.getpid(),),
                state_dir=folder,
                outbox_messages=outbox.count,
                outbox_bytes=outbox.size_bytes,
                worker_restarts=0,
                uptime_s=0.0,
            )
            start_ms = time.time_ns() // 1_000_000
            measured = measure_window((figures,), around, cpu)
            journal.window(start_ms=start_ms, duration_ms=100, measured=measured, model_digest="ab" * 6)
            os.write(truth, TRUTH.pack(journal.boot, journal.seq))
            due = max(time.monotonic() - 1.0, due + PERIOD_S / (speed if outage.exists() else 1.0))  # noqa: ASYNC240 - no wait
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    asyncio.run(live())


class Broker:
    """Mosquitto on loopback."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.config = folder / "mosquitto.conf"
        self.config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_dest none\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self.process = subprocess.Popen([command, "-c", str(self.config)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        sys.exit("mosquitto did not start")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Line:
    """The device's line to the broker: open, cut, or deaf (nothing comes back)."""

    def __init__(self, behind: int) -> None:
        self.behind, self.is_open, self.is_deaf = behind, True, False
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            outer, _ = self.listener.accept()
            try:
                inner = socket.create_connection(("127.0.0.1", self.behind if self.is_open else CLOSED_PORT))
            except OSError:
                outer.close()
                continue
            self.sockets += [outer, inner]
            threading.Thread(target=self._pump, args=(outer, inner, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(inner, outer, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_downlink: bool) -> None:  # noqa: FBT001 - a thread's argument
        try:
            while data := source.recv(65536):
                if not (is_downlink and self.is_deaf):
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()

    def cut(self) -> None:
        """End every connection."""
        for end in self.sockets:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.sockets.clear()


class Device:
    """The device's process."""

    def __init__(self, folder: Path, port: int, speed: float, cap: int) -> None:
        self.folder, self.outage = folder, folder / "outage"
        self.command = [sys.executable, __file__, "--device", str(folder), str(port), str(self.outage), str(speed), str(cap)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with (self.folder / "device.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    @property
    def stored(self) -> dict[int, set[int]]:
        """What the device had stored, by boot."""
        data = (self.folder / "truth").read_bytes() if (self.folder / "truth").exists() else b""
        found: dict[int, set[int]] = {}
        for at in range(0, len(data) - TRUTH.size + 1, TRUTH.size):
            boot, seq = TRUTH.unpack_from(data, at)
            found.setdefault(boot, set()).add(seq)
        return found


@dataclass(frozen=True)
class Books:
    """What the device stored, and what the server has of it; every window counts one request."""

    sent: int
    rows: int
    merged_rows: int
    requests: int
    lost: int
    doubled: int


def compare(database: Path, truth: dict[int, set[int]]) -> Books:
    """Read the server's database."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("select boot, seq, vector, merged from windows").fetchall()
    seen: dict[tuple[int, int], int] = {}
    for boot, seq, _vector, merged in rows:
        ends = msgspec.msgpack.decode(merged, type=tuple[int, ...]) if merged else (seq, seq)
        for at in range(0, len(ends), 2):
            for each in range(ends[at], ends[at + 1] + 1):
                seen[boot, each] = seen.get((boot, each), 0) + 1
    wanted = {(boot, seq) for boot, seqs in truth.items() for seq in seqs}
    return Books(
        sent=len(wanted),
        rows=len(rows),
        merged_rows=sum(bool(row[3]) for row in rows),
        requests=sum(int(unpack_values(row[2])[0]) for row in rows),
        lost=len(wanted - seen.keys()),
        doubled=sum(number > 1 and key in wanted for key, number in seen.items()),
    )


class WatchedStore(Store):
    """The fleet's store, with a note of how long each live window took from the device's clock to the commit."""

    live: list[tuple[float, float]]

    def apply(self, batch: Sequence[Received], faults: Sequence[Fault] = ()) -> None:
        """Write a batch."""
        super().apply(batch, faults)
        now_ms = time.time_ns() / 1e6
        for item in batch:
            if isinstance(item.message, WindowBatch) and not item.message.is_late:
                self.live += [(time.monotonic(), now_ms - window.start_ms) for window in item.message.windows]


class Story:
    """The scene and what happens on it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.database = folder / "fleet.db"
        self.store = WatchedStore(str(self.database))
        self.store.live = []
        self.broker = Broker(folder)
        self.broker.start()
        self.line = Line(self.broker.port)
        address = BrokerAddress(host="127.0.0.1", port=self.broker.port, is_tls=False)
        self.ingest = Ingest(self.store, address, client_id="server")
        self.ingest.start()
        self.device = Device(folder, self.line.port, options.speed, options.cap)
        self.device.start()
        time.sleep(self.options.live)

    def outage(self) -> None:
        """The hour without a broker, and the kills."""
        options, real_s = self.options, self.options.outage / self.options.speed
        self.line.is_open = False
        self.line.cut()
        time.sleep(0.3)  # what the broker confirmed is on its way to the server
        self.broker.kill()
        self.device.outage.touch()
        begun = time.monotonic()
        for number in range(options.kills):
            time.sleep(max(0.0, begun + real_s * (number + 0.5) / options.kills - time.monotonic()))
            self.device.kill()
            if number == options.kills // 2:
                self.broker.start()
                self.line.is_open = self.line.is_deaf = True
            self.device.start()
        time.sleep(max(0.0, begun + real_s - time.monotonic()))
        self.device.outage.unlink()
        self.line.is_open, self.line.is_deaf = True, False
        if self.broker.process is None:
            self.broker.start()
        self.line.cut()

    def _wait(self, seconds: float, most_lost: int) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and compare(self.database, self.device.stored).lost > most_lost:
            time.sleep(1.0)

    def drain(self) -> tuple[float, list[float]]:
        """Back again: seconds until the backlog is gone, and how long live windows took meanwhile, ms, sorted."""
        back = time.monotonic()
        self._wait(600, 20)  # a device that goes on has always some that are not here yet
        drained = time.monotonic()
        time.sleep(self.options.live)
        self.device.kill()
        self.device.start()  # what the last kill left in the spool
        self._wait(60, 20)
        self.device.kill()
        self.line.cut()
        time.sleep(1.0)
        return drained - back, sorted(wait for at, wait in self.store.live if back + 2.0 < at < drained)

    def end(self) -> None:
        """Stop everything."""
        self.device.kill()
        self.ingest.stop()
        self.broker.kill()
        self.store.close()


def main() -> int:
    """Run the story and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed", type=float, default=60.0, help="how much faster than the clock the outage passes")
    parser.add_argument("--outage", type=float, default=3600.0, help="simulated seconds without a broker")
    parser.add_argument("--kills", type=int, default=20, help="how often the device is killed")
    parser.add_argument("--live", type=float, default=5.0, help="seconds before and after")
    parser.add_argument("--cap", type=int, default=32 << 20, help="bytes of the spool")
    parser.add_argument("--most-late-s", type=float, default=5.0, help="the answer is no when a live message takes longer")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="edgekit-outage-"))
    story = Story(folder, options)
    try:
        story.outage()
        drained_s, waits = story.drain()
        gaps = story.store.device("lab", "d", 0)
    finally:
        story.end()
    truth = story.device.stored
    left = spooled(folder / "outbox.db")
    books = compare(story.database, {boot: seqs - left.get(boot, set()) for boot, seqs in truth.items()})
    print(
        f"simulated outage       {options.outage:.0f} s at 10 messages/s, {options.speed:g} times as fast; {len(truth)} boots"
    )
    print(f"windows                {books.sent} stored on the device; lost {books.lost}, doubled {books.doubled}")
    print(
        f"server                 {books.rows} rows, {books.merged_rows} of them merged; {books.requests} requests, one a window"
    )
    if gaps is not None:
        found = gaps.gaps
        print(
            f"its own books          received {found.received}, late {found.late}, lost {found.lost}, missing {found.missing}"
        )
    print(f"still in the spool     {sum(map(len, left.values()))} when the device was killed for the last time")
    print(f"backlog drained in     {drained_s:.1f} s of real time at the default pace")
    if waits:
        middle, high = waits[len(waits) // 2], waits[int(len(waits) * 0.99)]
        print(f"live windows meanwhile {len(waits)}, ms to the commit: p50 {middle:.0f}, p99 {high:.0f}, worst {waits[-1]:.0f}")
    shutil.rmtree(folder, ignore_errors=True)
    is_exact = not books.lost and not books.doubled and 0 <= books.requests - books.sent <= options.kills + 5
    return 0 if is_exact and (not waits or waits[-1] < options.most_late_s * 1000) else 1


def spooled(path: Path) -> dict[int, set[int]]:
    """What the device still had to send when it was killed for the last time."""
    found: dict[int, set[int]] = {}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for boot, seq in connection.execute("select boot, seq from spool"):
            found.setdefault(boot, set()).add(seq)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--device"]:
        run_device(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6]))
    else:
        sys.exit(main())
