"""Sketches of live data over the reference profile's bins: what a device counts, exactly mergeable by addition.

One code makes the profile and counts on the device, so that both see the same numbers. A stream is one number a sample:

- a tensor [N, F] with at most ``MAX_COLUMNS`` columns gives one stream a column;
- an image [N, C, H, W] or [N, H, W, C] gives mean and standard deviation of each channel;
- anything else gives mean, standard deviation and peak of each sample;
- both give the share of a sample's elements outside the reference's range, which a quantized model clips; of a table's columns
  the bins below and above all others say it;
- a classifier gives its answers by predicted class and bin of confidence, with more than ``MAX_CLASSES`` by confidence alone.

A sketch is a vector of counts: the bins of the profile, then the missing ones. Encoded it takes a byte a bin below 128 samples
a bin, two above; runs of empty bins take two.

    >>> import numpy as np
    >>> profile = build_profile({"x": np.arange(4000.0).reshape(-1, 1)})
    >>> sketcher = Sketcher(profile)
    >>> sketcher.observe({"x": np.array([[1.0], [np.nan], [9999.0]])}, {})
    >>> counts = decode_counts(sketcher.take()[0], cells=cells_of(profile.streams[0]))
    >>> int(counts.sum()), int(counts[-1]), int(counts[-2])
    (3, 1, 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import counts
from edgekit.errors import ArtifactError
from edgekit.schema.baseline import ReferenceProfile, StreamProfile, Summary
from edgekit.schema.contract import Contract

Array = NDArray[Any]
BINS = 32
CONFIDENCE_BINS = 20
MAX_COLUMNS = 64
MAX_CHANNELS = 4
MAX_CLASSES = 256
MIN_SAMPLES = 5000
IMAGE_RANK = 4
OUTSIDE_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
"""Of a share of elements: below a ten-thousandth it counts as none."""
_PROBABILITY_TOLERANCE = 1e-3


# --- from tensors to numbers ------------------------------------------------------------------------------------------------


def stream_values(stream: StreamProfile, tensor: Array) -> NDArray[np.float64]:
    """One number a sample [N]; NaN where it is missing.

    Args:
        stream: of kind ``input`` or ``output``.
        tensor: [N, ...].
    """
    part = _part(stream, tensor)
    if stream.summary == "outside":
        flat = part.reshape(part.shape[0], -1)
        return np.asarray(((flat < stream.low) | (flat > stream.high)).mean(axis=1), dtype=np.float64)
    rows = part.reshape(part.shape[0], -1) if part.ndim > 1 else part.reshape(-1, 1)
    if rows.dtype.kind != "f" or rows.dtype.itemsize < 8:
        rows = rows.astype(np.float64)
    match stream.summary:
        case "value":
            values = rows[:, 0]
        case "mean":
            values = rows.mean(axis=1)
        case "std":
            values = rows.std(axis=1)
        case "rms":
            values = np.sqrt(np.square(rows).mean(axis=1))
        case "peak":
            values = np.abs(rows).max(axis=1)
    return np.asarray(values, dtype=np.float64)


def _part(stream: StreamProfile, tensor: Array) -> Array:
    if not stream.axis:
        return tensor
    index = int(stream.axis[1:])
    if stream.axis[0] == "f":
        return tensor.reshape(tensor.shape[0], -1)[:, index : index + 1]
    if stream.axis[0] == "c":
        return tensor[:, index]
    return tensor[..., index]  # "l": channels last


def confidence_cells(scores: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """Predicted class and bin of confidence of each sample; None where the tensor holds no class scores.

    Args:
        scores: probabilities or logits [N, C]; logits go through a softmax. Rows with a value that is not finite are left out.
    """
    if scores.ndim < 2 or scores.dtype.kind != "f" or scores.shape[-1] < 2:
        return None
    rows = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if rows.size and (rows.min() < 0 or abs(float(rows.sum(axis=1).max()) - 1.0) > _PROBABILITY_TOLERANCE):
        rows = np.exp(rows - rows.max(axis=1, keepdims=True))
        rows /= rows.sum(axis=1, keepdims=True)
    predicted = rows.argmax(axis=1) if rows.size else np.zeros(0, dtype=np.intp)
    best = rows[np.arange(rows.shape[0]), predicted]
    return predicted, np.minimum((best * CONFIDENCE_BINS).astype(np.intp), CONFIDENCE_BINS - 1)


def table_rows(classes: int) -> int:
    """Rows of the table of answers: one a class, or one for all where there are more than ``MAX_CLASSES``."""
    return classes if classes <= MAX_CLASSES else 1


# --- the profile ------------------------------------------------------------------------------------------------------------


def choose_streams(name: str, tensor: Array, columns: Sequence[str] = ()) -> tuple[StreamProfile, ...]:
    """Which streams a tensor [N, ...] gives, without edges yet."""
    if tensor.ndim == 2 and tensor.shape[1] <= MAX_COLUMNS:
        names = list(columns) if len(columns) == tensor.shape[1] else [f"{name}[{i}]" for i in range(tensor.shape[1])]
        return tuple(StreamProfile(name=label, kind="input", tensor=name, axis=f"f{i}") for i, label in enumerate(names))
    axes: Sequence[str] = ("",)
    if tensor.ndim == IMAGE_RANK and tensor.shape[1] <= MAX_CHANNELS:
        axes = [f"c{i}" for i in range(tensor.shape[1])]
    elif tensor.ndim == IMAGE_RANK and tensor.shape[3] <= MAX_CHANNELS:
        axes = [f"l{i}" for i in range(tensor.shape[3])]
    summaries: Sequence[Summary] = ("mean", "std") if tensor.ndim == IMAGE_RANK else ("mean", "std", "peak")
    label = {axis: f"{name}{f'[{axis[1:]}]' if len(axes) > 1 else ''}" for axis in axes}
    streams = tuple(
        StreamProfile(name=f"{label[axis]}.{summary}", kind="input", tensor=name, summary=summary, axis=axis)
        for axis in axes
        for summary in summaries
    )
    return (*streams, StreamProfile(name=f"{name}.outside", kind="input", tensor=name, summary="outside"))


def cut_edges(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Edges at the quantiles of finite values: a bin below the least, about 32 between, one above the largest.

    Few distinct values (a category, a switch) get a bin each, cut half-way between them.
    """
    finite = np.sort(values[np.isfinite(values)])
    if not finite.size:
        return (0.0,)
    distinct = np.unique(finite)
    if distinct.size <= BINS:
        half = (distinct[1:] + distinct[:-1]) / 2
        margin = float(np.diff(distinct).min()) / 2 if distinct.size > 1 else max(1.0, abs(float(distinct[0]))) / 2
        return (float(distinct[0] - margin), *map(float, half), float(distinct[-1] + margin))
    inner = np.quantile(finite, np.linspace(0, 1, BINS + 1))
    return tuple(np.unique(inner).tolist())


def count_values(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts [E + 2]: the bins that E edges cut, then what is not a number. A value on an edge belongs to the bin below."""
    is_missing = np.isnan(values)
    present = values[~is_missing] if is_missing.any() else values
    cells = np.zeros(edges.size + 2, dtype=np.int64)
    bins = np.searchsorted(edges, present, side="left")
    bins[present == edges[0]] = 1  # the least value of the reference is no underflow
    np.add.at(cells, bins, 1)
    cells[-1] = int(is_missing.sum())
    return cells


def build_profile(
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array] | None = None,
    *,
    columns: Mapping[str, Sequence[str]] | None = None,
    scores: str = "",
    labels: Array | None = None,
    data: str | None = None,
    source: str = "",
) -> ReferenceProfile:
    """The reference profile of some samples.

    Args:
        inputs: tensors [N, ...] by name, as the model is fed.
        outputs: the model's answers [N, ...] by name.
        columns: names of a tensor's columns.
        scores: the output that holds class scores [N, C]; empty for none.
        labels: true classes [N], for the calibration of confidence.
        data: digest of the data.
        source: where the data came from, for people.

    Raises:
        ArtifactError: ``baseline.empty`` when there is no sample.
    """
    samples = min((array.shape[0] for array in inputs.values()), default=0)
    if not samples:
        raise ArtifactError("baseline.empty", "the reference profile has no samples.", hint="Give validation data.")
    streams = [
        _profiled(stream, tensor)
        for name, tensor in inputs.items()
        for stream in choose_streams(name, tensor, (columns or {}).get(name, ()))
    ]
    classes = 0
    table = confidence_cells((outputs or {})[scores]) if scores and outputs else None
    if table is not None:
        classes = int((outputs or {})[scores].shape[-1])
        streams.append(_class_stream(scores, table, classes, labels))
    return ReferenceProfile(samples=samples, streams=tuple(streams), classes=classes, data=data, source=source)


def _profiled(stream: StreamProfile, tensor: Array) -> StreamProfile:
    if stream.summary == "outside":
        known = tensor[np.isfinite(tensor)] if tensor.dtype.kind == "f" else tensor
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        stream = StreamProfile(name=stream.name, kind="input", tensor=stream.tensor, summary="outside", low=low, high=high)
    values = stream_values(stream, tensor)
    finite = values[np.isfinite(values)]
    edges = OUTSIDE_EDGES if stream.summary == "outside" else cut_edges(values)
    cells = count_values(values, np.asarray(edges))
    return StreamProfile(
        name=stream.name,
        kind=stream.kind,
        tensor=stream.tensor,
        summary=stream.summary,
        axis=stream.axis,
        edges=edges,
        counts=tuple(cells[:-1].tolist()),
        missing=int(cells[-1]),
        mean=float(finite.mean()) if finite.size else 0.0,
        std=float(finite.std()) if finite.size else 0.0,
        low=stream.low,
        high=stream.high,
    )


def _class_stream(
    scores: str, table: tuple[NDArray[np.intp], NDArray[np.intp]], classes: int, labels: Array | None
) -> StreamProfile:
    predicted, bins = table
    count = table_rows(classes)
    rows = predicted if count > 1 else np.zeros_like(predicted)
    answered = np.zeros((count, CONFIDENCE_BINS), dtype=np.int64)
    np.add.at(answered, (rows, bins), 1)
    right: tuple[int, ...] = ()
    if labels is not None and len(labels) == len(predicted):
        hits = np.zeros_like(answered)
        is_right = predicted == np.asarray(labels)
        np.add.at(hits, (rows[is_right], bins[is_right]), 1)
        right = tuple(hits.ravel().tolist())
    return StreamProfile(
        name=f"{scores}.confidence", kind="classes", tensor=scores, counts=tuple(answered.ravel().tolist()), right=right
    )


def bare_profile(contract: Contract) -> ReferenceProfile | None:
    """What can be counted without a reference: a classifier's answers by class and confidence; None for anything else."""
    last = contract.outputs[0].shape[-1] if contract.task == "classification" and contract.outputs[:1] else 0
    classes = last if isinstance(last, int) and last > 0 else len(contract.labels)
    if classes < 2:
        return None
    scores = contract.outputs[0].name
    cells = (0,) * (table_rows(classes) * CONFIDENCE_BINS)
    stream = StreamProfile(name=f"{scores}.confidence", kind="classes", tensor=scores, counts=cells)
    return ReferenceProfile(samples=0, streams=(stream,), classes=classes)


# --- counting ---------------------------------------------------------------------------------------------------------------


def cells_of(stream: StreamProfile) -> int:
    """How many numbers a stream's sketch has: its bins, and the missing ones (none for classes)."""
    return len(stream.counts) if stream.kind == "classes" else len(stream.edges) + 2


class Sketcher:
    """Counts live samples over a profile's bins. One thread; the model's tensors are not kept."""

    def __init__(self, profile: ReferenceProfile) -> None:
        self.profile = profile
        self._edges = [np.asarray(stream.edges, dtype=np.float64) for stream in profile.streams]
        self._counts = [np.zeros(cells_of(stream), dtype=np.int64) for stream in profile.streams]

    def observe(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Count one answer's samples; a tensor that is not there, or has another rank than the profile's, counts nothing."""
        for number, stream in enumerate(self.profile.streams):
            tensor = (feeds if stream.kind == "input" else outputs).get(stream.tensor)
            if tensor is None or not tensor.size:
                continue
            if stream.kind == "classes":
                self._count_classes(number, tensor)
            else:
                try:
                    values = stream_values(stream, tensor)
                except IndexError:
                    continue
                self._counts[number] += count_values(values, self._edges[number])

    def _count_classes(self, number: int, scores: Array) -> None:
        cells = confidence_cells(scores)
        count = table_rows(scores.shape[-1])
        if cells is None or count * CONFIDENCE_BINS != self._counts[number].size:
            return
        np.add.at(self._counts[number], (cells[0] * CONFIDENCE_BINS if count > 1 else 0) + cells[1], 1)

    def take(self) -> tuple[bytes, ...]:
        """The encoded sketches since the last call, in the profile's order; they begin again from nothing."""
        found = tuple(encode_counts(cells) for cells in self._counts)
        for cells in self._counts:
            cells[:] = 0
        return found


# --- on the wire ------------------------------------------------------------------------------------------------------------


def encode_counts(values: NDArray[np.int64] | Sequence[int]) -> bytes:
    """Counts in their one form on the wire; see :mod:`edgekit.counts`."""
    return counts.encode_counts(np.asarray(values, dtype=np.int64).tolist())


def decode_counts(data: bytes, *, cells: int) -> NDArray[np.int64]:
    """The counts [cells] in some bytes.

    Raises:
        ArtifactError: ``telemetry.malformed`` for anything that :func:`encode_counts` does not write.
    """
    return np.asarray(counts.decode_counts(data, cells=cells), dtype=np.int64)
