"""What devices see and answer: distributions around a reference profile, one device unlike another.

Each stream of the profile is taken as a standard normal variable seen through the reference's bins. A device has an offset and
a spread of its own on each stream, constant over the run, as cameras at different doors have; drift moves the offset. Answers
come from the profile's table of class and confidence; whether one is right is drawn with the table's own share, so that labels,
realised and estimated quality agree until a concept drifts.

>>> profile = make_profile()
>>> profile.classes, len(profile.streams), profile.samples
(4, 9, 10000)
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgekit.counts import encode_counts
from edgekit.monitor.sketch import CONFIDENCE_BINS, build_profile, table_rows
from edgekit.schema.base import encode_json
from edgekit.schema.baseline import ReferenceProfile, StreamProfile

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
FEATURES = 8
CLASSES = 4
PROFILE_SAMPLES = 10_000
DEVICE_OFFSET = 0.12
"""Standard deviation of the devices' offsets, in standard deviations of the stream."""
DEVICE_SPREAD = 0.05
PRIOR = 0.5
"""Samples that a bin that the reference never saw is taken to have."""
TILT = 1.6
"""How much a shift of one standard deviation moves answers to lower confidence."""
MISSING_SHARE = 0.33


@lru_cache(maxsize=1)
def make_profile() -> ReferenceProfile:
    """The built-in profile: a classifier of sensor readings, eight features and four classes."""
    rng = np.random.default_rng(20_260_101)
    features = rng.normal(size=(PROFILE_SAMPLES, FEATURES))
    features[:, 1] = np.exp(features[:, 1] * 0.5)
    features[:, 2] = np.abs(features[:, 2])
    features[:, 3] = np.round(features[:, 3] * 2)
    weights = rng.normal(size=(FEATURES, CLASSES))
    logits = 1.3 * (features - features.mean(axis=0)) / features.std(axis=0) @ weights
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(CLASSES, p=row) for row in scores])
    columns = ("temperature", "vibration", "current", "speed", "pressure", "humidity", "tilt", "sound")
    return build_profile(
        {"readings": features.astype(np.float32)},
        {"scores": scores.astype(np.float32)},
        columns={"readings": columns},
        scores="scores",
        labels=labels,
        source="edgekit's simulator",
    )


@dataclass(frozen=True, kw_only=True)
class Trait:
    """What is a device's own: offset and spread of each stream, in standard deviations."""

    offset: Floats
    spread: Floats


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a window's samples became: sketches in the profile's order, and the labels that came."""

    sketches: tuple[bytes, ...]
    sketched: int
    confidence: float
    labelled: int
    right: int


@dataclass(frozen=True, kw_only=True)
class DrawnAnswer:
    """One answer: predicted class and true class, by index, and its confidence."""

    predicted: int
    truth: int
    confidence: float


@dataclass(frozen=True)
class _Stream:
    """An input stream, ready to be shifted: the bins' upper bounds as standard normal quantiles."""

    bounds: tuple[float, ...]
    missing: float


def _quantile(share: float) -> float:
    """The standard normal quantile, by bisection: it is needed once a bin."""
    low, high = -8.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _normal(middle) < share else (low, middle)
    return (low + high) / 2


def _normal(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _prepare(stream: StreamProfile) -> _Stream:
    counts = np.asarray(stream.counts, dtype=np.float64)
    counts = np.where(counts > 0, counts, PRIOR)
    shares = np.cumsum(counts) / counts.sum()
    bounds = tuple(_quantile(share) for share in shares[:-1].tolist())
    return _Stream(bounds=bounds, missing=stream.missing / max(1, stream.missing + int(sum(stream.counts))))


class Population:
    """Draws what devices see, from one profile."""

    def __init__(self, profile: ReferenceProfile | None = None, *, data: bytes | None = None, crc: int | None = None) -> None:
        """Prepare a profile.

        Args:
            profile: the release's; None is the built-in one.
            data: its bytes as they travel in the bundle; their CRC-32 is what windows name it by. None: its canonical JSON.
            crc: that number, where it is known.
        """
        self.profile = make_profile() if profile is None else profile
        self.crc = zlib.crc32(encode_json(self.profile) if data is None else data) if crc is None else crc
        self._streams = [None if stream.kind == "classes" else _prepare(stream) for stream in self.profile.streams]
        self._table = next((stream for stream in self.profile.streams if stream.kind == "classes"), None)
        self.inputs = sum(stream is not None for stream in self._streams)
        if self._table is not None:
            self._prepare_answers(self._table)

    def _prepare_answers(self, stream: StreamProfile) -> None:
        self._rows = max(1, table_rows(self.profile.classes))
        answered = np.asarray(stream.counts, dtype=np.float64)
        if answered.sum() <= 0:
            answered = np.ones_like(answered)
        self._answered = answered / answered.sum()
        bins = np.tile((np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS, self._rows)
        self._confidence = bins
        right = np.asarray(stream.right, dtype=np.float64) if stream.right else bins * np.asarray(stream.counts)
        self._right = np.where(np.asarray(stream.counts) > 0, right / np.maximum(1.0, np.asarray(stream.counts)), bins)

    def trait(self, rng: np.random.Generator) -> Trait:
        """One device's own offsets and spreads."""
        offset = rng.normal(0.0, DEVICE_OFFSET, self.inputs)
        return Trait(offset=offset, spread=np.exp(rng.normal(0.0, DEVICE_SPREAD, self.inputs)))

    def input_shares(self, trait: Trait, shift: float) -> list[Floats]:
        """The probabilities of each input stream's bins; every second one is shifted.

        Args:
            trait: of the device.
            shift: drift, in standard deviations.
        """
        found = []
        for number, stream in enumerate(stream for stream in self._streams if stream is not None):
            offset = float(trait.offset[number]) + (shift if number % 2 == 0 else 0.0)
            spread = float(trait.spread[number])
            below = [0.0, *(_normal((bound - offset) / spread) for bound in stream.bounds), 1.0]
            found.append(np.diff(np.asarray(below)))
        return found

    def answer_shares(self, shift: float) -> Floats:
        """The probabilities of the cells of the table of answers; a shift makes them less sure."""
        if self._table is None:
            return np.zeros(0)
        tilted = self._answered * np.exp(-TILT * abs(shift) * self._confidence)
        return np.asarray(tilted / tilted.sum())

    def observe(
        self,
        rng: np.random.Generator,
        inputs: list[Floats],
        answers: Floats,
        *,
        samples: int,
        labelled: float,
        concept: float = 0.0,
        missing_stream: int = -1,
    ) -> Answers:
        """Draw a window's samples.

        Args:
            rng: the device's.
            inputs: of :meth:`input_shares`.
            answers: of :meth:`answer_shares`.
            samples: how many the sketches see.
            labelled: share of them whose label comes.
            concept: share of the right answers that are wrong now.
            missing_stream: an input stream that is missing in a third of the samples; -1 for none.
        """
        sketches: list[bytes] = []
        number = confidence_sum = 0.0
        hits = labels = 0
        place = 0
        for stream in self._streams:
            if stream is None:
                counts = rng.multinomial(samples, answers)
                sketches.append(encode_counts(counts.tolist()))
                confidence_sum, number = float(counts @ self._confidence), float(samples)
                labels = int(rng.binomial(samples, labelled)) if labelled else 0
                share_right = float(counts @ self._right) / max(1, samples) * (1 - concept)
                hits = int(rng.binomial(labels, min(1.0, share_right))) if labels else 0
                continue
            share = MISSING_SHARE if place == missing_stream else stream.missing
            missing = int(rng.binomial(samples, share)) if share else 0
            cells = rng.multinomial(samples - missing, inputs[place]).tolist()
            sketches.append(encode_counts([*cells, missing]))
            place += 1
        confidence = confidence_sum / number if number else math.nan
        return Answers(sketches=tuple(sketches), sketched=samples, confidence=confidence, labelled=labels, right=hits)

    def draw_answer(self, rng: np.random.Generator, answers: Floats, concept: float) -> DrawnAnswer | None:
        """One answer with its truth; None where the model is no classifier."""
        if self._table is None or self.profile.classes < 2:
            return None
        cell = int(rng.choice(answers.size, p=answers))
        row = cell // CONFIDENCE_BINS if self._rows > 1 else int(rng.integers(self.profile.classes))
        is_right = rng.random() < float(self._right[cell]) * (1 - concept)
        truth = row if is_right else int((row + 1 + rng.integers(self.profile.classes - 1)) % self.profile.classes)
        confidence = (cell % CONFIDENCE_BINS + float(rng.random())) / CONFIDENCE_BINS
        return DrawnAnswer(predicted=row, truth=truth, confidence=confidence)

    def draw_row(self, rng: np.random.Generator, inputs: list[Floats]) -> tuple[str, Floats] | None:
        """One input of a table: the tensor's name and a row; None where the streams are no columns of one table."""
        streams = [stream for stream in self.profile.streams if stream.kind == "input"]
        names = {stream.tensor for stream in streams}
        is_table = [stream.axis for stream in streams] == [f"f{place}" for place in range(len(streams))]
        if len(names) != 1 or not is_table or any(stream.summary != "value" for stream in streams):
            return None
        values = []
        for stream, shares in zip(streams, inputs, strict=True):
            cell = int(rng.choice(shares.size, p=shares / shares.sum()))
            edges = stream.edges
            margin = stream.std or 1.0
            low = edges[cell - 1] if cell else edges[0] - margin
            high = edges[cell] if cell < len(edges) else edges[-1] + margin
            values.append(float(rng.uniform(low, high)))
        return names.pop(), np.asarray(values)
