"""A small fleet whose devices see what a test says, with real sketches, through the real ingest."""

from __future__ import annotations

import zlib

import numpy as np

from edgekit.agent.windows import DIGEST_DIGITS
from edgekit.fleet.store import Store
from edgekit.fleet.watch.service import Watch
from edgekit.fleet.watch.views import Budget
from edgekit.fleet.writing import Received
from edgekit.monitor.sketch import Sketcher, build_profile
from edgekit.schema.base import encode_json
from edgekit.schema.message import Birth, ModelWindow, Reported, SlotReport, Window, WindowBatch
from edgekit.telemetry.codec import pack_values
from edgekit.telemetry.histogram import LatencyHistogram

T0 = 1_790_000_400_000
INTERVAL_MS = 60_000
MODEL = "kws"
DIGEST = "sha256:" + "cd" * 32
SHORT = "cd" * (DIGEST_DIGITS // 2)
BUDGET = Budget(alarms=1.0, days=30.0, interval_s=INTERVAL_MS // 1000)


def answers(inputs, rng):
    """Scores of three classes, and true classes that follow them."""
    logits = 2.0 * np.nan_to_num(inputs[:, :3])
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(3, p=row) for row in scores])
    return scores, labels


class WatchWorld:
    """A store, a watch, and devices."""

    def __init__(self, url: str, *, devices: int = 6, reference: int = 6000, seed: int = 1) -> None:
        self.store = Store(url)
        self.watch = Watch(self.store)
        self.rng = np.random.default_rng(seed)
        inputs = self.rng.normal(size=(reference, 4))
        scores, labels = answers(inputs, self.rng)
        self.profile = build_profile({"x": inputs}, {"y": scores}, scores="y", labels=labels, source="the yard")
        self.crc = zlib.crc32(encode_json(self.profile))
        self.names = [f"cam-{number}" for number in range(devices)]
        self.seq = dict.fromkeys(self.names, 2)
        for number, name in enumerate(self.names):
            self.give(name, *self.opening(number))

    def site(self, name):
        return "north" if self.names.index(name) % 2 else "south"

    def opening(self, number):
        slot = SlotReport(
            name="a", status="active", model=MODEL, version="1.0.0", counter=1, model_digest=DIGEST, manifest_digest=DIGEST
        )
        arch = "aarch64" if number % 3 else "x86_64"
        return (
            Birth(boot=7, seq=1, time_ms=T0, metrics=(), arch=arch, labels={"camera": "dome"}),
            Reported(boot=7, seq=2, time_ms=T0, slots=(slot,), active="a"),
        )

    def give(self, name, *messages):
        batch = [Received(site=self.site(name), device=name, message=each, received_ms=T0) for each in messages]
        self.store.apply(batch)

    def window(self, name, start_ms, inputs, *, wrong=0.0, labelled=0, merged=(), seq=0, verdicts=None):
        """One window of one device that saw these inputs; ``wrong`` of the right answers are made wrong."""
        sketcher = Sketcher(self.profile)
        scores, labels = answers(inputs, self.rng)
        sketcher.observe({"x": inputs}, {"y": scores})
        is_right = (scores.argmax(axis=1) == labels) & (self.rng.random(len(inputs)) >= wrong)
        latency = LatencyHistogram()
        latency.add(4.0, len(inputs))
        if not seq:
            self.seq[name] += 1
            seq = self.seq[name]
        model = ModelWindow(
            model_digest=SHORT,
            profile=self.crc,
            requests=len(inputs),
            samples=len(inputs),
            sketched=len(inputs),
            sketches=sketcher.take(),
            latency=latency.encode(),
            labelled=labelled,
            right=int(is_right[:labelled].sum()),
            verdicts=verdicts or {},
        )
        return Window(
            seq=seq, start_ms=start_ms, duration_ms=INTERVAL_MS, values=pack_values([]), models=(model,), merged=merged
        )

    def send(self, name, *windows, is_late=False):
        self.give(name, WindowBatch(boot=7, windows=windows, is_late=is_late))

    def inputs(self, shift=0.0, count=60):
        found = self.rng.normal(size=(count, 4))
        found[:, 0] += shift
        return found

    def minute(self, number, *, shift=0.0, skip=(), wrong=0.0, labelled=0):
        """Every device sends its window of one interval."""
        start_ms = T0 + number * INTERVAL_MS
        for name in self.names:
            if name not in skip:
                window = self.window(name, start_ms, self.inputs(shift), wrong=wrong, labelled=labelled)
                self.send(name, window)

    def know(self):
        self.watch.add_profile(
            self.profile, crc=self.crc, model_digest=DIGEST, model=MODEL, now_ms=T0, version="1.0.0", labels=("a", "b", "c")
        )
        self.watch.set_budget(MODEL, BUDGET, actor="operator", now_ms=T0)

    @staticmethod
    def after(number):
        """A moment at which the intervals before ``number`` can be judged."""
        return T0 + number * INTERVAL_MS + 121_000

    def run(self, number):
        return self.watch.run(self.after(number))
