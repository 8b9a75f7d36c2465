"""Where the time goes: milliseconds by kind of operator, from ONNX Runtime's own profiler on this host."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgekit.compiler.result import OpLatency
from edgekit.runtime.ort import load_onnxruntime

RUNS = 30
WARMUP_RUNS = 5


def profile_operators(path: Path, feeds: Mapping[str, NDArray[Any]], *, threads: int) -> tuple[OpLatency, ...]:
    """Time by operator per run, slowest first; what the runtime really ran, after its own fusions."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="edgekit-profile-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(WARMUP_RUNS + RUNS):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    return _summarize(events)


def _summarize(events: list[dict[str, Any]]) -> tuple[OpLatency, ...]:
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    first = starts[WARMUP_RUNS] if len(starts) > WARMUP_RUNS else 0
    kernels = [event for event in kernels if event["ts"] >= first]
    spent: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in kernels:
        kind = event["args"]["op_name"]
        spent[kind] += event["dur"]
        counts[kind] += 1
    total = sum(spent.values()) or 1
    return tuple(
        OpLatency(op_type=kind, count=round(counts[kind] / RUNS), ms=value / RUNS / 1000, share=value / total)
        for kind, value in spent.most_common()
    )
