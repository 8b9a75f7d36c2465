"""What ONNX Runtime really runs for a model on this host, after its own optimization, with the time of each node.

>>> graph, times = run_kernels(proto, feeds, threads=1)     # doctest: +SKIP
>>> sum(times.values())                                     # doctest: +SKIP
0.071
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.runtime.ort import load_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
WARMUP_RUNS = 5
RUNS, MAX_RUNS, SECONDS = 30, 60, 0.5
SUFFIX = "_kernel_time"


def run_kernels(
    model: ModelProto | Path, feeds: Mapping[str, Array], *, threads: int, runs: int | None = None
) -> tuple[ModelProto, dict[str, float]]:
    """The graph that really runs, and milliseconds per run of every node in it by name (a trimmed mean over the runs).

    Args:
        model: an ONNX model or its file.
        feeds: one request.
        threads: of the session.
        runs: how many runs count, after a few that do not; by default as many as fit half a second, within bounds.
    """
    import onnx

    from edgekit.compiler.graph import encode

    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="edgekit-kernels-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "ran.onnx")
        options.profile_file_prefix = str(Path(folder) / "profile")
        source = str(model) if isinstance(model, Path) else encode(model)
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        started = time.perf_counter()
        for _ in range(WARMUP_RUNS):
            session.run(None, dict(feeds))
        each = (time.perf_counter() - started) / WARMUP_RUNS
        for _ in range(runs or int(min(MAX_RUNS, max(RUNS, SECONDS / each)))):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(Path(folder) / "ran.onnx")
    return graph, _median_times(events)


def _median_times(events: list[dict[str, Any]]) -> dict[str, float]:
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    first = starts[WARMUP_RUNS] if len(starts) > WARMUP_RUNS else 0
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(SUFFIX) and event["ts"] >= first:
            times.setdefault(event["name"].removesuffix(SUFFIX), []).append(event["dur"] / 1000)
    return {name: float(np.mean(_middle(values))) for name, values in times.items()}


def _middle(values: list[float]) -> list[float]:
    """Without the slowest tenth; a mean, since the profiler counts whole microseconds and a median would be too coarse."""
    ordered = sorted(values)
    return ordered[: len(ordered) - len(ordered) // 10]
