"""What clients of the Open Inference Protocol's extensions ask beside inference: a model's configuration, and its statistics.

Both in the form of Triton's model configuration and statistics extensions, as far as it says something here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from edgekit.agent.meter import Meter
    from edgekit.agent.serve import Predictor
    from edgekit.schema.tensor import TensorSpec

_TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
_NS_PER_MS = 1_000_000


def model_config(predictor: Predictor) -> bytes:
    """The configuration as JSON. ``max_batch_size`` is 0 where the batch axis is one of the shape, as it always is here."""
    model, session = predictor.model, predictor.session
    return msgspec.json.encode(
        {
            "name": model.manifest.name,
            "platform": f"{session.runtime}_{model.variant.format}",
            "backend": session.runtime,
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": 0,
            "input": [_tensor(spec) for spec in session.inputs],
            "output": [_tensor(spec) for spec in session.outputs],
            "dynamic_batching": {"max_batch": predictor.max_batch},
        }
    )


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _TYPES.get(spec.dtype, f"TYPE_{spec.dtype.upper()}"),
        "dims": [-1 if isinstance(axis, str) else axis for axis in spec.shape],
    }


def model_stats(predictor: Predictor) -> bytes:
    """The statistics since the worker's start as JSON."""
    meter: Meter = predictor.meter
    timed = {name: (bins.count, int(total_ms * _NS_PER_MS)) for name, (bins, total_ms) in meter.durations().items()}
    failed = meter.total_errors + meter.total_rejected
    entry = {
        "name": predictor.model.manifest.name,
        "version": predictor.model.manifest.version,
        "inference_count": meter.total_samples,
        "execution_count": timed["inference"][0],
        "inference_stats": {
            "success": _duration(meter.total_requests - failed, timed["request"][1]),
            "fail": _duration(failed, 0),
            "queue": _duration(*timed["queue"]),
            "compute_infer": _duration(*timed["inference"]),
        },
    }
    return msgspec.json.encode({"model_stats": [entry]})


def _duration(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}
