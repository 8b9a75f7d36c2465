"""Ranges of activations, from any number of samples in constant memory.

The model runs once over the samples for the true minimum and maximum of every activation, and once more where a method needs
a histogram, whose fixed edges lie between them: memory does not grow with the number of samples, and the result does not depend
on the order or the size of the batches. Samples run in batches whose activations stay below a fixed number of bytes.

    >>> ranges = collect_ranges(proto, calibration, method="minmax")   # doctest: +SKIP
    >>> ranges["relu_3"]                                               # doctest: +SKIP
    (0.0, 5.81)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.graph import encode, open_plain
from edgekit.dataset.data import Dataset
from edgekit.errors import ArtifactError, DataError
from edgekit.runtime.parallel import in_order

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
Ranges = dict[str, tuple[float, float]]
BINS = 2048
PERCENTILE = 99.99
"""Of all values of a tensor, kept between the two ends."""
SHRINKS = np.linspace(0.4, 1.0, 61)
"""Shares of the full range that the searches of the clipping methods try."""
BATCH_SIZE = 16
BATCH_BYTES = 192 * 2**20
"""Activations of one batch stay below this."""
COUNTED = 16_384
"""Values per tensor and sample that go into its histogram; larger tensors are taken at regular places. Ends are exact."""
STEPS = 255


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of one activation: exact ends (zero lies within) and counts [BINS] between them."""

    low: float
    high: float
    counts: NDArray[np.int64]

    def range_by(self, method: Method) -> tuple[float, float]:
        """Low and high end by a method; zero lies within."""
        if method == "minmax" or self.high <= self.low or not self.counts.any():
            return self.low, self.high
        chosen = {"percentile": _clip_percentile, "mse": _clip_mse, "entropy": _clip_entropy}[method]
        low, high = chosen(self.counts, self.low, self.high)
        return float(low), float(high)

    def sqnr_db(self, low: float, high: float) -> float:
        """SQNR of the values on 8 bits between ``low`` and ``high``, in dB; 200 where nothing is lost."""
        centers = self._centers()
        signal = float(np.dot(self.counts, centers**2))
        noise = float(np.dot(self.counts, (centers - _rounded(centers, low, high)) ** 2))
        return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else 200.0

    def clipped(self, low: float, high: float) -> float:
        """Share of the values outside, 0..1."""
        centers = self._centers()
        return float(self.counts[(centers < low) | (centers > high)].sum() / max(1, self.counts.sum()))

    def _centers(self) -> NDArray[np.float64]:
        edges = np.linspace(self.low, self.high, BINS + 1)
        return np.asarray((edges[:-1] + edges[1:]) / 2)


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
            squared error of 8-bit values; ``entropy``: the range with the least Kullback-Leibler divergence of the histogram
            from its 8-bit form (after Migacz, "8-bit inference with TensorRT", 2017).
        batch_size: samples at a time; the model's own where its batch axis is fixed.
        on_progress: called with the fraction done.

    Raises:
        DataError: ``data.empty`` without samples; ``data.batch`` with fewer samples than the model's fixed batch.
        ArtifactError: ``quantization.no_activations`` when the main graph has no float activation.
    """
    if method == "minmax":
        key = hashlib.sha256(encode(proto) + data.digest.encode()).hexdigest()
        if key not in _recent_ends:
            while len(_recent_ends) >= REMEMBERED_ENDS:
                del _recent_ends[next(iter(_recent_ends))]
            _recent_ends[key] = _collect(proto, data, None, batch_size, on_progress, has_counts=False)[0]
        return dict(_recent_ends[key])
    found = collect_statistics(proto, data, batch_size=batch_size, on_progress=on_progress)
    return {name: item.range_by(method) for name, item in found.items()}


REMEMBERED_ENDS = 4
"""Models whose ends are at hand: those of one target's search serve the next target's."""
_recent_ends: dict[str, Ranges] = {}
_recent: dict[str, dict[str, Statistics]] = {}
"""The last statistics by content: candidates that differ in the method alone share them."""


def collect_statistics(
    proto: ModelProto,
    data: Dataset,
    *,
    tensors: Iterable[str] | None = None,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[float], None] = lambda _done: None,
) -> dict[str, Statistics]:
    """Ends and histogram of every float activation, or of the ``tensors`` named; two runs over the data.

    Raises:
        DataError: as :func:`collect_ranges`.
        ArtifactError: as :func:`collect_ranges`.
    """
    wanted = None if tensors is None else tuple(sorted(tensors))
    key = hashlib.sha256(encode(proto) + f"{data.digest} {wanted}".encode()).hexdigest()
    if key not in _recent:
        ends, counts = _collect(proto, data, wanted, batch_size, on_progress, has_counts=True)
        _recent.clear()
        _recent[key] = {name: Statistics(*ends[name], counts[name]) for name in ends}
    return _recent[key]


def _collect(
    proto: ModelProto,
    data: Dataset,
    wanted: tuple[str, ...] | None,
    batch_size: int,
    on_progress: Callable[[float], None],
    *,
    has_counts: bool,
) -> tuple[Ranges, dict[str, NDArray[np.int64]]]:
    names = tuple(name for name in _activations(proto) if wanted is None or name in wanted)
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
    if not probe.is_fixed:
        size = min(size, max(1, BATCH_BYTES // probe.bytes_per_sample(data)))
    passes = 2 if has_counts else 1
    ends = _collect_ends(probe, data, size, lambda done: on_progress(done / passes))
    if not has_counts:
        return ends, {}
    return ends, _collect_histograms(probe, data, size, ends, lambda done: on_progress(0.5 + done / 2))


def affordable_batch(proto: ModelProto, data: Dataset, *, limit: int, most: int) -> int:
    """How many samples at a time keep all activations below ``limit`` bytes; the model's own where its batch is fixed."""
    if fixed := fixed_batch(proto):
        return fixed
    return max(1, min(most, limit // _Probe(proto, _activations(proto)).bytes_per_sample(data)))


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
        self._session = open_plain(encode(probed), level="all")  # the outputs stay what they are; blocked layouts are faster

    def bytes_per_sample(self, data: Dataset) -> int:
        """Bytes of all activations of one sample."""
        feeds = {name: array[:1] for name, array in data.inputs.items()}
        return max(1, sum(int(values.nbytes) for values in self._session.run(self._outputs, feeds)))

    def run(self, feeds: dict[str, Array], *, counted: int | None = None) -> Iterator[tuple[str, Array]]:
        """Values of every activation by name; at most about ``counted`` of each sample."""
        values = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        samples = len(next(iter(feeds.values())))
        for name in self.names:
            array = values.get(name, feeds.get(name))
            assert array is not None
            flat = _thinned(array, samples, counted) if counted else array.reshape(-1)
            yield name, flat


def _finite_ends(values: Array) -> tuple[float, float] | None:
    """The least and the largest finite value; None where there is none."""
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if np.isfinite(low) and np.isfinite(high):
        return low, high
    return _finite_ends(values[np.isfinite(values)])


def _thinned(array: Array, samples: int, counted: int) -> Array:
    """Values at regular places of each sample, so that the result does not depend on the batch."""
    if array.ndim == 0 or len(array) != samples:
        return array.reshape(-1)
    rows = array.reshape(samples, -1)
    step = -(-rows.shape[1] // counted)
    if step > 1:
        step += 1 - step % 2  # odd: an even step would meet the same columns of an even-sized image again and again
    return rows[:, ::step].reshape(-1)


def _collect_ends(probe: _Probe, data: Dataset, size: int, on_progress: Callable[[float], None]) -> Ranges:
    low = dict.fromkeys(probe.names, 0.0)
    high = dict.fromkeys(probe.names, 0.0)

    def ends_of(batch: tuple[int, dict[str, Array]]) -> tuple[int, Ranges]:
        done, feeds = batch
        return done, {name: ends for name, values in probe.run(feeds) if (ends := _finite_ends(values))}

    for done, found in in_order(ends_of, whole_batches(data, size, is_fixed=probe.is_fixed)):
        for name, (bottom, top) in found.items():
            low[name], high[name] = min(low[name], bottom), max(high[name], top)
        on_progress(done / len(data))
    return {name: (low[name], high[name]) for name in probe.names}


def _collect_histograms(
    probe: _Probe, data: Dataset, size: int, ends: Ranges, on_progress: Callable[[float], None]
) -> dict[str, NDArray[np.int64]]:
    counts = {name: np.zeros(BINS, np.int64) for name in probe.names}

    def counts_of(batch: tuple[int, dict[str, Array]]) -> tuple[int, dict[str, Array]]:
        done, feeds = batch
        return done, {
            name: np.histogram(values, bins=BINS, range=ends[name])[0]
            for name, values in probe.run(feeds, counted=COUNTED)
            if ends[name][1] > ends[name][0]
        }

    for done, found in in_order(counts_of, whole_batches(data, size, is_fixed=probe.is_fixed)):
        for name, more in found.items():
            counts[name] += more
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


def _rounded(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """The nearest 8-bit values between low and high."""
    if high <= low:
        return np.zeros_like(values)
    scale = (high - low) / STEPS
    return np.asarray(np.clip(np.round((values - low) / scale), 0, STEPS) * scale + low)


def _clip_mse(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The shrunken range whose 8-bit values are nearest to the histogram's, in the sum of squares."""
    edges = np.linspace(low, high, BINS + 1)
    centers = (edges[:-1] + edges[1:]) / 2
    best, chosen = np.inf, (low, high)
    for share in SHRINKS[::-1]:
        bottom, top = low * share, high * share
        error = float(np.dot(counts, (centers - _rounded(centers, bottom, top)) ** 2))
        if error < best:
            best, chosen = error, (bottom, top)
    return chosen


def _clip_entropy(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The shrunken range whose 8-bit histogram is nearest to the histogram's, in Kullback-Leibler divergence."""
    edges = np.linspace(low, high, BINS + 1)
    centers = (edges[:-1] + edges[1:]) / 2
    total = counts.sum()
    best, chosen = np.inf, (low, high)
    for share in SHRINKS[::-1]:
        bottom, top = low * share, high * share
        inside = (centers >= bottom) & (centers <= top)
        reference = np.where(inside, counts, 0).astype(np.float64)
        first, last = int(np.argmax(inside)), BINS - 1 - int(np.argmax(inside[::-1]))
        reference[first] += counts[:first].sum()
        reference[last] += counts[last + 1 :].sum()
        places = np.clip(np.round((centers - bottom) / ((top - bottom) / STEPS)), 0, STEPS).astype(np.intp)
        filled = inside & (counts > 0)
        levels = np.bincount(places[filled], weights=counts[filled], minlength=STEPS + 1)
        width = np.bincount(places[filled], minlength=STEPS + 1)
        spread = np.where(filled, levels[places] / np.maximum(1, width[places]), 0.0)
        used = reference > 0
        p = reference[used] / total
        q = np.maximum(spread[used] / max(1.0, spread.sum()), 1e-9)
        divergence = float(np.sum(p * np.log(p / q)))
        if divergence < best - 1e-12:
            best, chosen = divergence, (bottom, top)
    return chosen
