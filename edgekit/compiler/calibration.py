"""Ranges of activations, from any number of samples in constant memory.

The model runs once over the samples for the true minimum and maximum of every activation; methods that clip outliers run it
once more and fill a histogram of fixed edges between them, so that memory does not grow with the number of samples and the
result does not depend on the order or the size of the batches.

    >>> ranges = collect_ranges(proto, calibration, method="minmax")   # doctest: +SKIP
    >>> ranges["relu_3"]                                               # doctest: +SKIP
    (0.0, 5.81)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.graph import encode, open_plain
from edgekit.dataset.data import Dataset
from edgekit.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
Method = Literal["minmax", "percentile", "mse"]
Ranges = dict[str, tuple[float, float]]
BINS = 2048
PERCENTILE = 99.99
"""Of all values of a tensor, kept between the two ends."""
SHRINKS = np.linspace(0.4, 1.0, 61)
"""Shares of the full range that the MSE search tries."""
BATCH_SIZE = 16
STEPS = 255


def collect_ranges(
    proto: ModelProto,
    data: Dataset,
    *,
    method: Method = "minmax",
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[float], None] = lambda _done: None,
) -> Ranges:
    """Low and high end of every float activation of the main graph, inputs and outputs included; zero lies within.

    Args:
        proto: the fp32 model.
        data: calibration samples.
        method: ``minmax``: what was seen; ``percentile``: without the outermost 0.01 %; ``mse``: the range with the least
            squared error of 8-bit values.
        batch_size: samples at a time; the model's own where its batch axis is fixed.
        on_progress: called with the fraction done.

    Raises:
        DataError: ``data.empty`` without samples; ``data.batch`` with fewer samples than the model's fixed batch.
        ArtifactError: ``quantization.no_activations`` when the main graph has no float activation.
    """
    names = _activations(proto)
    if not names:
        raise ArtifactError(
            "quantization.no_activations",
            "the main graph has no float32 activations.",
            hint="Is the network inside an If or Loop subgraph? Export it without control flow.",
        )
    size = fixed_batch(proto) or batch_size
    if len(data) == 0:
        raise DataError("data.empty", f"{data.source}: no samples to calibrate with.")
    if len(data) < size and fixed_batch(proto):
        raise DataError("data.batch", f"{data.source}: {len(data)} samples, the model takes batches of {size}.")
    probe = _Probe(proto, names)
    passes = 1 if method == "minmax" else 2
    ends = _collect_ends(probe, data, size, lambda done: on_progress(done / passes))
    if method == "minmax":
        return ends
    counts = _collect_histograms(probe, data, size, ends, lambda done: on_progress(0.5 + done / 2))
    chosen = _clip_percentile if method == "percentile" else _clip_mse
    return {name: chosen(counts[name], *ends[name]) for name in names}


def fixed_batch(proto: ModelProto) -> int | None:
    """The batch size that the model insists on, or None when its first axis is free."""
    initializers = {item.name for item in proto.graph.initializer}
    for item in proto.graph.input:
        dims = item.type.tensor_type.shape.dim
        if item.name not in initializers and dims and dims[0].HasField("dim_value") and dims[0].dim_value > 0:
            return int(dims[0].dim_value)
    return None


def whole_batches(data: Dataset, size: int, *, is_fixed: bool) -> Iterator[tuple[int, dict[str, Array]]]:
    """Feeds with the number of samples done; a fixed batch leaves out a smaller last one."""
    done = 0
    for feeds, _labels in data.batches(size):
        count = len(next(iter(feeds.values())))
        if is_fixed and count < size:
            return
        done += count
        yield done, feeds


def _activations(proto: ModelProto) -> tuple[str, ...]:
    """Names of float32 tensors that are computed or fed, in graph order."""
    from onnx import TensorProto, shape_inference

    graph = shape_inference.infer_shapes(proto).graph
    floats = {
        item.name
        for item in (*graph.input, *graph.value_info, *graph.output)
        if item.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    weights = {item.name for item in graph.initializer}
    names = [item.name for item in graph.input if item.name not in weights]
    names += [name for node in graph.node for name in node.output]
    return tuple(dict.fromkeys(name for name in names if name in floats))


class _Probe:
    """The model with every activation as an output."""

    def __init__(self, proto: ModelProto, names: tuple[str, ...]) -> None:
        import onnx
        from onnx import TensorProto, helper

        probed = onnx.ModelProto()
        probed.CopyFrom(proto)
        inputs = {item.name for item in probed.graph.input}
        known = {item.name for item in probed.graph.output}
        wanted = [name for name in names if name not in inputs and name not in known]
        probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
        self.is_fixed = fixed_batch(proto) is not None
        self.names = names
        self._outputs = [name for name in names if name not in inputs]
        self._session = open_plain(encode(probed))

    def run(self, feeds: dict[str, Array]) -> Iterator[tuple[str, Array]]:
        """Finite values of every activation by name."""
        values = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        for name in self.names:
            array = values.get(name, feeds.get(name))
            assert array is not None
            flat = array.reshape(-1)
            yield name, flat if np.isfinite(flat).all() else flat[np.isfinite(flat)]


def _collect_ends(probe: _Probe, data: Dataset, size: int, on_progress: Callable[[float], None]) -> Ranges:
    low = dict.fromkeys(probe.names, 0.0)
    high = dict.fromkeys(probe.names, 0.0)
    for done, feeds in whole_batches(data, size, is_fixed=probe.is_fixed):
        for name, values in probe.run(feeds):
            if values.size:
                low[name] = min(low[name], float(values.min()))
                high[name] = max(high[name], float(values.max()))
        on_progress(done / len(data))
    return {name: (low[name], high[name]) for name in probe.names}


def _collect_histograms(
    probe: _Probe, data: Dataset, size: int, ends: Ranges, on_progress: Callable[[float], None]
) -> dict[str, NDArray[np.int64]]:
    counts = {name: np.zeros(BINS, np.int64) for name in probe.names}
    for done, feeds in whole_batches(data, size, is_fixed=probe.is_fixed):
        for name, values in probe.run(feeds):
            low, high = ends[name]
            if values.size and high > low:
                counts[name] += np.histogram(values, bins=BINS, range=(low, high))[0]
        on_progress(done / len(data))
    return counts


def _clip_percentile(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The outermost values go, half of them on each side; an end that is zero stays."""
    total = int(counts.sum())
    if total == 0:
        return low, high
    outside = total * (100 - PERCENTILE) / 100 / (2 if low < 0 < high else 1)
    edges = np.linspace(low, high, BINS + 1)
    sums = np.cumsum(counts)
    first = int(np.searchsorted(sums, outside, side="right")) if low < 0 else 0
    last = int(np.searchsorted(sums, total - outside, side="left")) if high > 0 else BINS - 1
    return min(0.0, float(edges[min(first, BINS - 1)])), max(0.0, float(edges[min(last, BINS - 1) + 1]))


def _clip_mse(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The shrunken range whose 8-bit values are nearest to the histogram's, in the sum of squares."""
    if int(counts.sum()) == 0:
        return low, high
    edges = np.linspace(low, high, BINS + 1)
    centers = (edges[:-1] + edges[1:]) / 2
    best, chosen = np.inf, (low, high)
    for share in SHRINKS[::-1]:
        bottom, top = low * share, high * share
        scale = (top - bottom) / STEPS
        nearest = np.clip(np.round((centers - bottom) / scale), 0, STEPS) * scale + bottom
        error = float(np.dot(counts, (centers - nearest) ** 2))
        if error < best:
            best, chosen = error, (bottom, top)
    return chosen
