#!/usr/bin/env python3
"""What telemetry costs: bytes a minute and a sketch on the wire, microseconds an inference on the device.

A vision model (3 x 224 x 224; 10, 100 or 1,000 classes) answers 10 times a second; a window is a minute, a heartbeat 30 s. The
bytes are those of real messages: payload and topic; beside them the fixed MQTT 5 overhead of a QoS 1 publish (header, topic
length, packet id, empty properties, and the PUBACK that comes back).

    python scripts/bench/telemetry.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from edgekit.agent.feedback import Feedback
from edgekit.agent.link import Model
from edgekit.agent.meter import Meter
from edgekit.agent.vitals import CpuMeter
from edgekit.agent.windows import SCHEMA, Surroundings, measure_window
from edgekit.monitor.sketch import build_profile
from edgekit.schema.message import Heartbeat, Window, WindowBatch
from edgekit.telemetry.codec import compress, encode
from edgekit.telemetry.topics import topic
from tests.agent.world import build_manifest

PUBLISH_BYTES = 2 + 2 + 2 + 1
"""Fixed header, topic length, packet id, property length; payloads above 127 B have one byte more."""
PUBACK_BYTES = 4
REFERENCE = 6000
RATE = 10
SECONDS = 60


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [N, C]."""
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)


def make_images(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Images of different brightness and contrast: float32 [N, 3, H, W], 0..1."""
    base = rng.uniform(0.2, 0.8, (count, 3, 1, 1)) + rng.uniform(0.05, 0.2, (count, 1, 1, 1)) * rng.normal(
        size=(count, 3, size, size)
    )
    return np.clip(base, 0, 1).astype(np.float32)


def make_scores(rng: np.random.Generator, count: int, classes: int) -> np.ndarray:
    """A confident classifier's answers; a few classes are frequent."""
    logits = rng.normal(size=(count, classes))
    favourite = rng.zipf(1.6, count) % classes
    logits[np.arange(count), favourite] += rng.uniform(2, 10, count)
    return softmax(logits)


def window_of(meter: Meter, minute: int, rng: np.random.Generator, images: np.ndarray, scores: np.ndarray) -> Window:
    """A minute of inferences as one window."""
    for _ in range(RATE * SECONDS):
        place = rng.integers(len(images))
        latency = float(rng.lognormal(3.0, 0.15))
        meter.count(latency_ms=latency + 0.4, bytes_in=150_528, is_error=False, is_rejected=False)
        meter.count_run(inference_ms=latency, queue_ms=0.2, samples=1, out_of_range=0)
        meter.count_confidence(float(scores[place].max()), 1)
        meter._since -= 1 / RATE  # noqa: SLF001 - the budget counts by the clock, which does not pass here
        meter.observe({"image": images[place : place + 1]}, {"scores": scores[place : place + 1]})
    around = Surroundings(
        pids=(os.getpid(),),
        state_dir=Path(tempfile.gettempdir()),
        outbox_messages=1,
        outbox_bytes=900,
        worker_restarts=0,
        uptime_s=1e5,
    )
    measured = measure_window([meter.take()], around, CpuMeter())
    start_ms = 1_790_000_000_000 + minute * 60_000
    return Window(
        seq=100_000 + minute,
        start_ms=start_ms,
        duration_ms=60_000,
        values=measured.values,
        model_digest="ab" * 6,
        sketches=measured.sketches,
        models=measured.models,
    )


def report_bytes(classes: int) -> int:
    """Print the bytes a minute; returns them."""
    rng = np.random.default_rng(0)
    images, scores = make_images(rng, REFERENCE, 32), make_scores(rng, REFERENCE, classes)
    profile = build_profile({"image": images}, {"scores": scores}, scores="scores")
    meter = Meter(model_digest="sha256:" + "ab" * 32, profile=profile, profile_crc=zlib.crc32(b"profile"))
    windows = [window_of(meter, minute, rng, images, scores) for minute in range(30)]
    boot = (1 << 62) + 12345
    plain = encode(WindowBatch(boot=boot, windows=tuple(windows[:1]), schema=SCHEMA))
    batch = compress(plain)
    where = len(topic("plant-2", "cam-7-front", "w"))
    beat = encode(Heartbeat(boot=boot, seq=100_000, time_ms=1_790_000_000_000, outbox=1))
    beats = 2 * (len(beat) + len(topic("plant-2", "cam-7-front", "hb")))
    window = windows[0]
    model = window.models[0]
    total = len(batch) + where + beats
    print(f"{classes} classes, {len(profile.streams)} streams, {RATE}/s, {model.sketched} of {model.samples} samples sketched")
    print(f"  a minute: {total} B = window {len(batch)} B ({len(plain)} B before zlib), its topic {where} B,", end="")
    print(f" two heartbeats with topics {beats} B")
    print(f"  on the wire with MQTT and PUBACK: {total + PUBLISH_BYTES + 1 + PUBACK_BYTES + 2 * PUBLISH_BYTES} B")
    print(
        f"  of the window: metric vector {len(window.values)} B, latency sketches {[len(part) for part in window.sketches]} B"
    )
    inputs = [len(part) for part in model.sketches[:-1]]
    print(f"  sketches of inputs {inputs} B (mean {np.mean(inputs):.0f} B a feature), of answers {len(model.sketches[-1])} B")
    together = encode(WindowBatch(boot=boot, windows=tuple(windows), schema=SCHEMA, is_late=True))
    packed = compress(together)
    print(f"  30 windows in one message: {len(packed)} B, {len(packed) / 30:.0f} B each ({len(together)} B before zlib)")
    one, many = per_call_us(lambda: compress(plain)), per_call_us(lambda: compress(together))
    print(f"  compressing takes {one:.0f} us a window, {many:.0f} us for 30")
    return total


def per_call_us(call: Callable[[], object], *, seconds: float = 1.0) -> float:
    """Median microseconds of a call, of blocks of 20."""
    blocks = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        for _ in range(20):
            call()
        blocks.append((time.perf_counter() - begun) / 20 * 1e6)
    return float(np.median(blocks))


def report_cost(size: int) -> None:
    """Print the microseconds an inference."""
    rng = np.random.default_rng(0)
    scores = make_scores(rng, REFERENCE, 10)
    cases = {
        f"image 3 x {size} x {size}": make_images(rng, 300, size),
        "image 3 x 32 x 32": make_images(rng, 300, 32),
        "table of 4 columns": rng.normal(size=(300, 4)).astype(np.float32),
        "table of 32 columns": rng.normal(size=(300, 32)).astype(np.float32),
        "signal of 16,000": rng.normal(size=(300, 16_000)).astype(np.float32),
    }
    print("microseconds an inference, median of blocks, after the answer was written:")
    for name, inputs in cases.items():
        profile = build_profile({"x": inputs}, {"y": scores[:300]}, scores="y")
        meter = Meter(profile=profile)
        sketcher = meter._sketcher  # noqa: SLF001 - the cost without the budget
        assert sketcher is not None
        one, answer = {"x": inputs[:1]}, {"y": scores[:1]}
        print(f"  {name:22} {len(profile.streams):3} streams  {per_call_us(lambda: sketcher.observe(one, answer)):8.1f}")  # noqa: B023 - called at once
    meter = Meter()

    def count() -> None:
        meter.count(latency_ms=1.0, bytes_in=1, is_error=False, is_rejected=False)
        meter.count_run(inference_ms=1.0, queue_ms=0.1, samples=1, out_of_range=0)

    print(f"  counters and latencies              {per_call_us(count):8.1f}")
    manifest = build_manifest()
    model = Model(manifest=manifest, variant=manifest.variants[0], blob_dir="/")
    feedback = Feedback(model=model, meter=meter, send=lambda _frame: None)
    answer, numbers = {"y": scores[:1, :3]}, iter(range(1 << 40))
    print(f"  memory of predictions for labels    {per_call_us(lambda: feedback.note(str(next(numbers)), {}, answer)):8.1f}")


def main() -> int:
    """Print everything; the answer is no when a minute costs more than 1 kB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="width and height of the image")
    parser.add_argument("--most", type=int, default=1000, help="bytes that a minute may take")
    options = parser.parse_args()
    totals = [report_bytes(classes) for classes in (10, 100, 1000)]
    report_cost(options.size)
    return 0 if max(totals) <= options.most else 1


if __name__ == "__main__":
    sys.exit(main())
