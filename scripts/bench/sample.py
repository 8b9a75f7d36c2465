#!/usr/bin/env python3
"""Measure optimized candidates of the sample model on all 10,000 Fashion-MNIST test images.

    python scripts/bench/sample.py edgekit-out/model-host edgekit-out/task-host [--data FOLDER] [--threads N]

For each output folder of ``edgekit optimize``: top-1 of fp32 and of the chosen candidate on all 10,000 test images, size, and
the interleaved latency ratio to fp32 with its 95 % interval and the noise floor. The data is Debian's package
dataset-fashion-mnist, or any folder with the IDX files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from edgekit.benchmark.latency import measure
from edgekit.cli.console import table
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Session, SessionOptions
from edgekit.schema.base import decode_json
from edgekit.schema.candidate import Candidate

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "sample_models" / "fashion-mnist"
sys.path.insert(0, str(SAMPLE))
from train import DEBIAN_FOLDER, as_input, load_images


def top1(session: Session, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 accuracy, 0..1."""
    name, output = session.inputs[0].name, session.outputs[0].name
    correct = 0
    for start in range(0, len(images), 500):
        logits = session.run({name: images[start : start + 500]})[output]
        correct += int((logits.argmax(-1) == labels[start : start + 500]).sum())
    return correct / len(images)


def main() -> None:
    """Print one row a candidate."""
    parser = argparse.ArgumentParser(description="Figures of the sample model on all test images.")
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of edgekit optimize")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent per model")
    arguments = parser.parse_args()
    raw, labels = load_images(arguments.data, "t10k")
    images = as_input(raw)
    options = SessionOptions(threads=arguments.threads)
    sessions = {"fp32 (as given)": open_session(SAMPLE / "model.onnx", options=options)}
    sizes = {"fp32 (as given)": (SAMPLE / "model.onnx").stat().st_size}
    for folder in arguments.folders:
        candidate = decode_json((folder / "candidate.json").read_bytes(), Candidate, name=str(folder))
        assert candidate.artifact is not None
        name = f"{folder.name}: {candidate.name}"
        sessions[name] = open_session(folder / candidate.artifact.path, options=options)
        sizes[name] = candidate.artifact.size_bytes
    feeds = {sessions["fp32 (as given)"].inputs[0].name: images[:1]}
    reports = measure(
        sessions,
        feeds,
        baseline="fp32 (as given)",
        is_on_target=True,
        threads=arguments.threads,
        seconds=arguments.seconds,
    )
    rows = []
    for name, session in sessions.items():
        report = reports[name]
        interval = f"{report.ratio_low:.3f}..{report.ratio_high:.3f}" if report.ratio_low is not None else ""
        ratio = f"{report.ratio:.3f}" if report.ratio is not None else ""
        accuracy, size = f"{top1(session, images, labels):.4f}", f"{sizes[name] / 1000:.1f}"
        rows.append([name, accuracy, size, f"{report.p50_ms:.4f}", ratio, interval, f"{report.noise:.3f}"])
    headers = ["model", "top-1 (10,000)", "size kB", "p50 ms", "ratio", "95 % interval", "noise"]
    print(table(headers, rows, right=[1, 2, 3, 4, 5, 6]))


if __name__ == "__main__":
    main()
