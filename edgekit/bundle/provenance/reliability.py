"""Do a classifier's probabilities mean what they say? Measured when a release is packed, on labelled data.

The expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks"): samples are put into bins of equal
width by the probability of the answer; the error is the mean distance of a bin's accuracy from its mean probability, weighted
by its samples. It is biased upwards where samples are few, so the number of samples always goes with it.

The runtime is an argument, as for golden samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle.sampling import ModelOpener
from edgekit.schema.contract import Contract

Array = NDArray[Any]
BINS = 15
MAX_SAMPLES = 2000
BATCH_SIZE = 64
_SUM_TOLERANCE = 1e-3


class LabelledSamples(Protocol):
    """What is needed of a data set (``edgekit.dataset.data.Dataset`` has it)."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """The inputs; axis 0 is the sample."""

    @property
    def labels(self) -> Array | None:
        """Class indices, or something else, or nothing."""

    @property
    def digest(self) -> str:
        """Of the content."""

    @property
    def source(self) -> str:
        """What the user gave."""

    def __len__(self) -> int:
        """The number of samples."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bin of probabilities, ``low`` exclusive but for the first, ``high`` inclusive."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What was measured on one variant's answers."""

    data: str
    """Digest of the data set."""
    source: str
    samples: int
    of: int
    """Samples that the data set has."""
    accuracy: float
    confidence: float
    """The mean probability of the answer."""
    error: float
    """The expected calibration error."""
    bins: tuple[Bin, ...]
    is_softmax: bool
    """Whether the outputs were scores that were made probabilities here."""
    class_counts: tuple[int, ...]
    """Samples that were answered, by their class."""


@dataclass(frozen=True)
class Unmeasured:
    """Why there is no figure."""

    reason: str


def measure_reliability(
    open_model: ModelOpener, contract: Contract, data: LabelledSamples | None, *, max_samples: int = MAX_SAMPLES
) -> Reliability | Unmeasured:
    """Run the model over labelled data.

    Args:
        open_model: opens the model.
        contract: says whether it is a classifier.
        data: samples by the names of the contract's inputs.
        max_samples: of a larger set so many are taken, evenly spread.
    """
    if contract.task != "classification" or len(contract.outputs) < 1:
        return Unmeasured("the model is not a classifier")
    if data is None or data.labels is None:
        return Unmeasured("no labelled data was given when the release was packed (--data)")
    labels = np.asarray(data.labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        return Unmeasured("the labels of the data are not class indices")
    chosen = np.unique(np.linspace(0, len(labels) - 1, num=min(max_samples, len(labels))).round().astype(int))
    session = open_model(threads=1, is_optimized=True)
    try:
        scores = _answers(session, contract, {name: array[chosen] for name, array in data.inputs.items()})
    finally:
        session.close()
    labels = labels[chosen]
    if scores.ndim != 2 or scores.shape[1] < 2:
        return Unmeasured(f"the first output has shape {list(scores.shape)}, not one score for each class")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        return Unmeasured("the labels of the data do not fit the model's classes")
    return judge(scores, labels, data=data.digest, source=data.source, of=len(data))


def _answers(session: Any, contract: Contract, inputs: Mapping[str, Array]) -> Array:
    """The first output for every sample; a fixed batch is filled with its last sample."""
    first = contract.inputs[0].shape[0] if contract.inputs[0].shape else 1
    fixed = first if isinstance(first, int) and first > 0 else None
    size, name = fixed or BATCH_SIZE, contract.outputs[0].name
    total, parts = len(next(iter(inputs.values()))), []
    for start in range(0, total, size):
        feeds = {key: np.ascontiguousarray(array[start : start + size]) for key, array in inputs.items()}
        count = len(next(iter(feeds.values())))
        if fixed is not None and count < fixed:
            feeds = {key: np.concatenate([array, np.repeat(array[-1:], fixed - count, axis=0)]) for key, array in feeds.items()}
        answers = session.run(feeds)
        parts.append(np.array(answers.get(name, next(iter(answers.values())))[:count], dtype=np.float64))
    return np.concatenate(parts)


def judge(scores: Array, labels: Array, *, data: str = "", source: str = "", of: int = 0) -> Reliability:
    """The figures of answers that are there already.

    Args:
        scores: float [N, C], probabilities, or scores that softmax makes probabilities.
        labels: int [N], 0..C-1.
        data: digest of the data set, for the record.
        source: where it came from.
        of: how many samples it has; 0 is N.
    """
    is_softmax = not ((scores >= 0).all() and (np.abs(scores.sum(axis=1) - 1) <= _SUM_TOLERANCE).all())
    if is_softmax:
        raised = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = raised / raised.sum(axis=1, keepdims=True)
    confidence, is_right = scores.max(axis=1), scores.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = tuple(_bin(index, confidence[place == index], is_right[place == index]) for index in range(BINS))
    error = sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / len(labels)
    return Reliability(
        data=data,
        source=source,
        samples=len(labels),
        of=of or len(labels),
        accuracy=float(is_right.mean()),
        confidence=float(confidence.mean()),
        error=float(error),
        bins=bins,
        is_softmax=is_softmax,
        class_counts=tuple(int(count) for count in np.bincount(labels, minlength=scores.shape[1])),
    )


def _bin(index: int, confidence: Array, is_right: Array) -> Bin:
    count = len(confidence)
    return Bin(
        low=index / BINS,
        high=(index + 1) / BINS,
        count=count,
        confidence=float(confidence.mean()) if count else 0.0,
        accuracy=float(is_right.mean()) if count else 0.0,
    )
