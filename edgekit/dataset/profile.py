"""What the data looks like: one line of figures per input, and how many samples each class has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekit.dataset.data import Array, Dataset

_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class InputProfile:
    """One input: moments over all values, and the fraction of values that are exactly 0."""

    name: str
    mean: float
    std: float
    minimum: float
    maximum: float
    zero_fraction: float


@dataclass(frozen=True, kw_only=True)
class DataProfile:
    """The whole data set. ``class_counts`` by class name (or index) for integer labels, else empty."""

    samples: int
    inputs: tuple[InputProfile, ...]
    class_counts: dict[str, int]
    notes: tuple[str, ...]


def describe(data: Dataset) -> DataProfile:
    """Profile a data set, in chunks, in double precision."""
    return DataProfile(
        samples=len(data),
        inputs=tuple(_profile(name, array) for name, array in data.inputs.items()),
        class_counts=_class_counts(data),
        notes=data.notes,
    )


def _profile(name: str, array: Array) -> InputProfile:
    flat = array.reshape(-1)
    count = flat.size
    chunks = [flat[start : start + _CHUNK_VALUES] for start in range(0, count, _CHUNK_VALUES)]
    mean = sum(float(chunk.sum(dtype=np.float64)) for chunk in chunks) / count
    square = sum(float(np.square(chunk.astype(np.float64) - mean).sum()) for chunk in chunks)
    return InputProfile(
        name=name,
        mean=mean,
        std=float(np.sqrt(square / count)),
        minimum=float(flat.min()),
        maximum=float(flat.max()),
        zero_fraction=1.0 - int(np.count_nonzero(flat)) / count,
    )


def _class_counts(data: Dataset) -> dict[str, int]:
    if data.labels is None or data.labels.dtype.kind != "i" or data.labels.ndim != 1:
        return {}
    values, counts = np.unique(data.labels, return_counts=True)
    names = data.class_names

    def name_of(index: int) -> str:
        return names[index] if 0 <= index < len(names) else str(index)

    found = {name_of(int(value)): int(count) for value, count in zip(values, counts, strict=True)}
    return dict.fromkeys(names, 0) | found
