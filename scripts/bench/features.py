#!/usr/bin/env python
"""What the input contract and streaming features cost, and that a stream gives the bits of the batch.

    python scripts/bench/features.py                             # generated vibration and sound
    python scripts/bench/features.py --watch watch_dataset.npy   # and 140 real recordings of a smart watch

The watch data come with the package seglearn (BSD; ``seglearn/data/watch_dataset.npy``): 6 axes at 50 Hz, 7 exercises of 10
people. A classifier is trained on 7 people's windows and judged on the other 3.
"""

# ruff: noqa: PLC0415  torch is loaded only with --watch

from __future__ import annotations

import argparse
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.dataset.contract import check_feeds
from edgekit.dataset.guarding import Guard
from edgekit.evaluation.feature_parity import push_in_chunks
from edgekit.features.compute import compute
from edgekit.features.program import Program
from edgekit.features.stream import StreamWindows
from edgekit.schema.contract import ColumnSpec, Contract, InputSpec
from edgekit.schema.features import FeatureSet, LogMel, StreamColumn, StreamSpec, WindowFeatures, WindowPart, WindowSpec

FIGURES = (
    "mean",
    "std",
    "min",
    "max",
    "rms",
    "peak_to_peak",
    "slope",
    "zero_crossings",
    "quantile(0.9)",
    "energy(0, 10)",
)
TEST_SUBJECTS = (8, 9, 10)
STEPS = 300


def microseconds(call: Callable[[], Any], count: int = 5000) -> float:
    """The best of several runs."""
    return min(timeit.repeat(call, number=count, repeat=7)) / count * 1e6


def bench_guard() -> None:
    """The guard on what is right, and on what is wrong."""
    random = np.random.default_rng(0)
    shape = ("batch", 1, 28, 28)
    image = Contract(inputs=(InputSpec(name="x", dtype="float32", shape=shape, minimum=0, maximum=1),), outputs=())
    pixels = random.random((1, 1, 28, 28)).astype(np.float32)
    columns = tuple(
        ColumnSpec(name=f"c{place}", minimum=-1 - place / 64, maximum=1 + place / 64, missing="impute", fill=0)
        for place in range(64)
    )
    spec = InputSpec(name="x", dtype="float32", shape=("batch", 64), columns=columns, out_of_range="clip")
    table = Contract(inputs=(spec,), outputs=())
    row = (random.random((1, 64)) * 2 - 1).astype(np.float32)
    wrong = row.copy()
    wrong[0, 3], wrong[0, 5] = 9, np.nan
    print("guard, microseconds a request")
    for label, contract, array in (
        ("3 kB image, all right", image, pixels),
        ("64 columns, all right", table, row),
        ("64 columns, one clipped, one imputed", table, wrong),
    ):
        guard, feeds = Guard(contract), {"x": array}
        print(f"  {label:40}{microseconds(lambda guard=guard, feeds=feeds: guard.apply(feeds)):8.1f}")
    print(f"  {'(types, shapes and NaN only, image)':40}{microseconds(lambda: check_feeds(image, {'x': pixels})):8.1f}")


def imu(rate_hz: float = 100.0, *, length: int = 256, hop: int = 128) -> FeatureSet:
    """Six axes, ten figures each."""
    return FeatureSet(
        stream=StreamSpec(
            name="imu", rate_hz=rate_hz, time="t", columns=tuple(StreamColumn(name=f"c{place}") for place in range(6))
        ),
        windows=(WindowSpec(name="w", length=length, hop=hop),),
        inputs=(WindowFeatures(name="x", parts=(WindowPart(window="w", aggregates=FIGURES),)),),
    )


def sound() -> FeatureSet:
    """A second at 16 kHz, every half second."""
    return FeatureSet(
        stream=StreamSpec(name="mic", rate_hz=16000, columns=(StreamColumn(name="pcm"),)),
        windows=(WindowSpec(name="w", length_s=1, hop_s=0.5),),
        inputs=(LogMel(name="x", window="w", column="pcm", fft=512, frame_hop=160, bands=40),),
    )


def bench_stream(label: str, declared: FeatureSet, samples: int, chunk: int) -> None:
    """Cost by sample and by window, and the values that differ from the batch."""
    program, random = Program(declared), np.random.default_rng(0)
    columns = {name: random.normal(size=samples) for name in program.columns}
    if program.stream is not None and program.stream.time:
        columns["t"] = 1e6 + np.arange(samples) / program.stream.rate_hz
    best = np.inf
    for _ in range(3):
        started = time.perf_counter()
        windows = push_in_chunks(StreamWindows(program), columns, (chunk,))
        best = min(best, time.perf_counter() - started)
    batch = compute(columns, program).inputs["x"]
    stream = np.concatenate([window.inputs["x"] for window in windows])
    differing = int(np.count_nonzero(stream.view("u4") != batch.view("u4")))
    cost = f"{best / samples * 1e6:8.2f} µs a sample{best / len(windows) * 1e6:8.0f} µs a window"
    print(f"  {label:34} chunks of {chunk:4}{cost}{differing:4} of {batch.size} values differ")


def bench_watch(path: Path) -> None:
    """Real recordings: parity of every one in drawn chunks, and a classifier on its features."""
    data = np.load(path, allow_pickle=True).item()  # the package's own file
    series = [np.asarray(each, np.float64) for each in data["X"]]
    lengths = [len(each) for each in series]
    columns = {f"c{place}": np.concatenate([each[:, place] for each in series]) for place in range(6)}
    columns["t"] = np.concatenate([np.arange(count) / 50 for count in lengths])
    recording = np.repeat(np.arange(len(series)), lengths)
    program = Program(imu(50, length=200, hop=100))
    labels, subjects = np.repeat(data["y"], lengths), np.repeat(data["subject"], lengths)
    table = compute(columns, program, labels=labels, groups=recording)
    random, differing, seconds = np.random.default_rng(0), 0, 0.0
    for number in range(len(series)):
        part = {name: array[recording == number] for name, array in columns.items()}
        sizes = tuple(int(size) for size in random.integers(1, 200, 20))
        started = time.perf_counter()
        windows = push_in_chunks(StreamWindows(program), part, sizes)
        seconds += time.perf_counter() - started
        batch = table.inputs["x"][table.groups == number]
        stream = np.concatenate([window.inputs["x"] for window in windows]) if windows else batch[:0]
        differing += int(np.count_nonzero(stream.view("u4") != batch.view("u4"))) if len(stream) == len(batch) else batch.size
    print(f"watch: {len(series)} recordings, {len(recording)} samples, {len(table)} windows of 4 s, 60 figures each")
    print(f"  {differing} of {table.inputs['x'].size} values of the streams, in drawn chunks, differ from the batch")
    print(f"  {seconds / len(recording) * 1e6:.2f} µs a sample, {seconds / len(table) * 1e6:.0f} µs a window")
    of_recording = {int(number): int(subjects[recording == number][0]) for number in range(len(series))}
    is_test = np.isin([of_recording[int(number)] for number in table.groups], TEST_SUBJECTS)
    print(
        f"  accuracy on windows of {len(TEST_SUBJECTS)} unseen people: {_train(table.inputs['x'], table.labels, is_test):.3f}"
    )


def _train(features: np.ndarray, labels: np.ndarray, is_test: np.ndarray) -> float:
    import torch

    torch.manual_seed(0)
    mean, std = features[~is_test].mean(0), features[~is_test].std(0) + 1e-6
    x, y = torch.tensor((features - mean) / std), torch.tensor(labels, dtype=torch.long)
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 32), torch.nn.ReLU(), torch.nn.Linear(32, int(y.max()) + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    train = torch.tensor(~is_test)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[train]), y[train]).backward()
        optimizer.step()
    return float((model(x[~train]).argmax(1) == y[~train]).float().mean())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watch", type=Path, help="watch_dataset.npy of the package seglearn")
    options = parser.parse_args()
    bench_guard()
    print("streams")
    for chunk in (1, 10, 128):
        bench_stream("6 axes, 100 Hz, 256/128, 60 figures", imu(), 12_800, chunk)
    bench_stream("sound, 16 kHz, 1 s / 0.5 s, log-mel", sound(), 160_000, 1600)
    if options.watch:
        bench_watch(options.watch)


if __name__ == "__main__":
    main()
