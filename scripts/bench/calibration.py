"""Peak memory of calibration with few and many samples: each in a process of its own, the samples themselves taken off.

python scripts/bench/calibration.py [--model MODEL.onnx --data SAMPLES.npz] [--samples 100 500 2000]
"""

# ruff: noqa: PLC0415  the measuring process alone loads the compiler

from __future__ import annotations

import argparse
import inspect
import resource
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[2] / "sample_models/fashion-mnist"


def measure(model: Path, data: Path, count: int) -> None:
    """Calibrate once with ``count`` samples (drawn again where there are fewer) and print MB."""
    import numpy as np

    from edgekit.compiler.calibration import collect_statistics
    from edgekit.compiler.graph import read_onnx
    from edgekit.dataset.data import make_dataset

    proto = read_onnx(model)
    with np.load(data) as arrays:
        inputs = {item.name: np.resize(arrays[item.name], (count, *arrays[item.name].shape[1:])) for item in proto.graph.input}
    samples = make_dataset(inputs, source=str(data))
    held = sum(array.nbytes for array in samples.inputs.values())
    found = collect_statistics(proto, samples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{count:6d} samples  {len(found)} tensors  peak {(peak - held) / 1e6:.0f} MB beside {held / 1e6:.0f} MB of samples")


def main() -> None:
    """One process for each number of samples."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--model", type=Path, default=SAMPLE / "model.onnx")
    parser.add_argument("--data", type=Path, default=SAMPLE / "calibration.npz")
    parser.add_argument("--samples", type=int, nargs="*", default=[100, 500, 2000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.model, arguments.data, arguments.one)
        return
    for count in arguments.samples:
        command = [sys.executable, __file__, "--model", arguments.model, "--data", arguments.data, "--one", str(count)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
