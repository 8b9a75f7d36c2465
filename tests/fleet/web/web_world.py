"""A fleet as people see it: real releases, real windows with sketches, a rollout that halts, drift, alerts, and a browser."""

from __future__ import annotations

import sys
import threading
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import uvicorn
from sqlalchemy import select

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "agent"))
from fleet_world import free_port, wait_until
from world import World

from edgekit.fleet import assembly, tables
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.rollout.experiments import ExperimentRequest
from edgekit.fleet.rollout.requests import RolloutRequest, make_spec
from edgekit.fleet.rollout.tables import experiment_devices
from edgekit.fleet.server import make_app
from edgekit.fleet.store import Store
from edgekit.fleet.watch.views import Budget
from edgekit.fleet.writing import Received
from edgekit.monitor.sketch import Sketcher, build_profile
from edgekit.schema.base import encode_json
from edgekit.schema.message import (
    Birth,
    Death,
    Event,
    Heartbeat,
    MetricSpec,
    ModelWindow,
    Reported,
    SketchSpec,
    SlotReport,
    Window,
    WindowBatch,
)
from edgekit.telemetry.codec import pack_values, schema_crc
from edgekit.telemetry.histogram import BINS, LatencyHistogram
from edgekit.trust.desired_signer import sign_desired
from edgekit.trust.signer import generate_signer

METRICS = (
    MetricSpec(name="requests", kind="count"),
    MetricSpec(name="errors", kind="count"),
    MetricSpec(name="latency_p50_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p90_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p99_ms", unit="ms", kind="quantile"),
    MetricSpec(name="cpu_percent", unit="%"),
    MetricSpec(name="rss_mb", unit="MB"),
    MetricSpec(name="outbox_messages"),
)
SKETCHES = (SketchSpec(name="latency_ms", unit="ms", bins=BINS),)
SCHEMA = schema_crc(METRICS, SKETCHES)
SITES = ("bergen", "lab", "oslo", "yard-west")
INTERVAL_MS = 600_000
HOSTILE = '"><script>alert(1)</script>'


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def answers(inputs, rng):
    logits = 2.0 * inputs[:, :3]
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    return scores, np.array([rng.choice(3, p=row) for row in scores])


class WebWorld:
    """The parts of a server over a database that a small fleet has filled."""

    def __init__(self, folder: Path, *, devices: int = 60, intervals: int = 24, is_empty: bool = False) -> None:
        self.rng = np.random.default_rng(7)
        self.repository = World(folder)
        self.folder, self.count, self.intervals = folder, devices, intervals
        inputs = self.rng.normal(size=(6000, 4))
        scores, labels = answers(inputs, self.rng)
        self.profile = build_profile({"x": inputs}, {"y": scores}, scores="y", labels=labels, source="the yard")
        self.crc = zlib.crc32(encode_json(self.profile))
        if not is_empty:
            for seed, version in enumerate(("1.0", "2.0"), 1):
                self.repository.publish(version, seed=seed, baseline=encode_json(self.profile), padding=900_000 * seed)
        config = FleetConfig(
            database=str(folder / "fleet.db"), repository=self.repository.url, repository_root=str(self.repository.root)
        )
        signer = generate_signer()
        self.store = Store(config.database)
        self.services = assembly.assemble(config, self.store, sign_desired=lambda state: sign_desired(state, [signer]))
        self.services.catalog.refresh(datetime.now(UTC))
        self.now = now_ms()
        self.seq: dict[str, int] = {}
        self.server: Served | None = None
        if not is_empty:
            self.fill()

    def close(self) -> None:
        if self.server:
            self.server.stop()
        self.store.close()
        self.repository.stop()

    # devices

    def place(self, number: int) -> tuple[str, str]:
        return SITES[number % len(SITES)], f"cam-{number:03}"

    def say(self, number: int, *messages) -> None:
        site, name = self.place(number)
        self.store.apply([Received(site=site, device=name, message=message, received_ms=now_ms()) for message in messages])

    def next(self, number: int) -> int:
        self.seq[number] = self.seq.get(number, 0) + 1
        return self.seq[number]

    def release(self, version: str):
        return next(each for each in self.services.catalog.releases(model="m") if each.info.version == version)

    def slot(self, version: str) -> SlotReport:
        release = self.release(version)
        digest = self.services.catalog.manifest(release).variants[0].model
        return SlotReport(
            name="a",
            status="active",
            model="m",
            version=version,
            counter=release.info.counter,
            model_digest=digest,
            manifest_digest=release.manifest_digest,
        )

    def begin(self, number: int) -> None:
        labels = {"camera": "dome" if number % 2 else "bullet", "room": HOSTILE if number == 1 else "hall"}
        birth = Birth(
            boot=7, seq=self.next(number), time_ms=self.now, metrics=METRICS, sketches=SKETCHES, agent_version="0.2.0",
            arch="aarch64" if number % 3 else "x86_64", cpu="Cortex-A76", isa=("neon", "dotprod"), cores=4, ram_mb=3900.0,
            os="Linux 6.12", runtime="onnxruntime", runtime_version="1.24.1", clock="ntp", labels=labels,
        )  # fmt: skip
        trouble = {"last_error": f"self-test differs {HOSTILE}", "last_error_code": "selftest.mismatch"} if number == 1 else {}
        report = Reported(
            boot=7, seq=self.next(number), time_ms=self.now, slots=(self.slot("1.0"), SlotReport(name="b", status="empty")),
            active="a", **trouble,
        )  # fmt: skip
        self.say(number, birth, report)

    def window(
        self, number: int, start_ms: int, *, shift: float = 0.0, version: str = "1.0", span_ms: int = INTERVAL_MS
    ) -> Window:
        inputs = self.rng.normal(size=(60, 4))
        inputs[:, 0] += shift
        scores, truth = answers(inputs, self.rng)
        sketcher = Sketcher(self.profile)
        sketcher.observe({"x": inputs}, {"y": scores})
        latency = LatencyHistogram()
        base = 4.0 + number % 5 + (0.6 if version == "2.0" else 0.0) + self.rng.normal(0, 0.2)
        for value in self.rng.gamma(9.0, base / 9.0, size=60):
            latency.add(float(max(value, 0.2)), 1)
        values = pack_values(
            [60.0, float(number % 20 == 3), base, base * 1.4, base * 2.1, 20 + 10 * self.rng.random(), 118.0, 0.0]
        )
        model = ModelWindow(
            model_digest=self.slot(version).model_digest.removeprefix("sha256:")[:12], profile=self.crc,
            requests=60, samples=60, sketched=60, sketches=sketcher.take(), latency=latency.encode(), labelled=12,
            right=int((scores.argmax(axis=1) == truth)[:12].sum()), verdicts={"clip x[2]": 2} if number % 10 == 1 else {},
        )  # fmt: skip
        return Window(
            seq=self.next(number), start_ms=start_ms, duration_ms=span_ms, values=values,
            model_digest=model.model_digest, sketches=(latency.encode(),), models=(model,),
        )  # fmt: skip

    def event(self, number: int, kind: str, *, version: str = "", **fields) -> None:
        counter = self.release(version).info.counter if version else 0
        model = "m" if version else ""
        told = Event(
            boot=7, seq=self.next(number), time_ms=now_ms(), kind=kind, model=model, version=version, counter=counter, **fields
        )
        self.say(number, told)

    def fill(self) -> None:
        for number in range(self.count):
            self.begin(number)
        self.services.watch.set_budget("m", Budget(interval_s=INTERVAL_MS // 1000), actor="operator", now_ms=self.now)
        first = self.now - self.now % INTERVAL_MS - self.intervals * INTERVAL_MS
        for number in range(0, self.count, 4):
            windows = [
                self.window(number, first + at * INTERVAL_MS, shift=0.9 if at > self.intervals * 0.6 else 0.0)
                for at in range(self.intervals)
            ]
            self.say(number, WindowBatch(boot=7, windows=tuple(windows), schema=SCHEMA))
        for number in range(self.count):
            recent = range(20 if number < 12 else 1, 0, -1)
            windows = [self.window(number, self.now - at * 20_000, span_ms=20_000) for at in recent]
            self.say(number, WindowBatch(boot=7, windows=tuple(windows), schema=SCHEMA))
        self.services.watch.run(self.now)
        self.services.watch.run(self.now)
        self.compare()
        self.roll_out()
        for number in range(2, self.count, 9):
            self.say(number, Death(boot=7))
        self.event(1, "install_refused", version="2.0", detail=f"the self-test differs {HOSTILE}", code="selftest.mismatch")
        self.event(5, "messages_dropped", detail="12 of the oldest, the disk is full")
        self.event(6, "command_finished", detail="ping: 12 ms")
        self.event(7, "contract_violated", detail="x[2]: 4.1 is above 3.0")
        for minutes in (30, 20, 10, 0):
            self.services.alerts.turn(self.now - minutes * 60_000)
        self.services.alerts.deliver(self.now)

    def compare(self) -> None:
        """An experiment that was ended by a person, every device back on the champion."""
        found = self.services.experiments
        request = ExperimentRequest(model="m", champion="1.0", challenger="2.0", split=0.3, metric="accuracy", margin=0.05)
        releases = {"champion": self.release("1.0"), "challenger": self.release("2.0")}
        self.experiment = found.start(request, actor="operator", now_ms=self.now - 3 * 3_600_000, **releases)
        arm = select(tables.devices.c.device).join(experiment_devices).where(experiment_devices.c.arm == "challenger")
        with self.store.read() as connection:
            challengers = [int(name.removeprefix("cam-")) for name in connection.execute(arm).scalars()]
        for number in challengers:
            window = self.window(number, self.now - 600_000, version="2.0", span_ms=60_000)
            report = Reported(boot=7, seq=self.next(number), time_ms=self.now, slots=(self.slot("2.0"),), active="a")
            self.say(number, report, WindowBatch(boot=7, windows=(window,), schema=SCHEMA))
        found.turn(self.now)
        found.stop(self.experiment, keep="champion", actor="operator", reason="no better, and slower", now_ms=self.now)
        for number in challengers:
            report = Reported(boot=7, seq=self.next(number), time_ms=self.now, slots=(self.slot("1.0"),), active="a")
            self.say(number, report)

    def roll_out(self) -> None:
        service = self.services.rollouts
        request = RolloutRequest(
            model="m", version="2.0", waves="canary:6,25%,100%", soak_min=0.0, max_failed=0.1, is_rolled_back_on_halt=False
        )
        number = service.start(
            make_spec(request, self.release("2.0")),
            actor="operator",
            now_ms=self.now - 60_000,
            reason="faster on the new cameras",
        )
        for step in range(2):
            service.turn(self.now - 50_000 + step * 10_000)
            for item in service.devices(number, stage="asked", limit=100).devices:
                device = int(item.device.removeprefix("cam-"))
                if device % 11 == 5:
                    self.event(
                        device, "install_refused", version="2.0", detail="the self-test differs", code="selftest.mismatch"
                    )
                elif device % 7:
                    self.event(device, "install_finished", version="2.0")
                    self.say(
                        device,
                        Reported(
                            boot=7,
                            seq=self.next(device),
                            time_ms=now_ms(),
                            slots=(self.slot("2.0"),),
                            active="a",
                            desired_seq=1,
                        ),
                        WindowBatch(
                            boot=7,
                            windows=(self.window(device, self.now - 15_000, version="2.0", span_ms=10_000),),
                            schema=SCHEMA,
                        ),
                    )
        service.turn(self.now)
        service.turn(self.now + 1)
        self.rollout = number

    def beat(self, number: int) -> None:
        """A device shows that it lives, with one more window."""
        window = self.window(number, now_ms() - 10_000, span_ms=10_000)
        self.say(
            number,
            WindowBatch(boot=7, windows=(window,), schema=SCHEMA),
            Heartbeat(boot=7, seq=self.seq[number], time_ms=now_ms()),
        )

    def serve(self, **options) -> str:
        self.server = Served(make_app(self.store, None, services=self.services, **options))
        return self.server.url


class Served:
    """An application on a port of loopback, in a thread."""

    def __init__(self, app) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
