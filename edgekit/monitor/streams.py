"""What is watched of a reference profile: histograms that mean one thing each, made of the sketches that devices send.

A numeric stream is watched as its bins and the missing ones; a classifier's table of answers as two streams, the predicted
class (prediction drift) and the confidence. Of very many classes the rare ones are watched together.

>>> from edgekit.schema.baseline import ReferenceProfile, StreamProfile
>>> stream = StreamProfile(name="x", kind="input", tensor="x", edges=(0.0,), counts=(1, 2))
>>> watched_streams(ReferenceProfile(samples=3, streams=(stream,)))[0].reference.counts
(1.0, 2.0, 0.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ArtifactError
from edgekit.monitor.compare import Comparison, compare
from edgekit.monitor.detector import Reference
from edgekit.monitor.performance import CONFIDENCE_BINS
from edgekit.monitor.sketch import cells_of, decode_counts
from edgekit.schema.base import Record
from edgekit.schema.baseline import ReferenceProfile, StreamProfile

Kind = Literal["input", "output", "class", "confidence", "saturation"]
MAX_CLASS_BINS = 40
MISSING_RISE = 0.02
_CONTINUES = 0x80
_BITS = 7
_MAX_BYTES = 8


class Watched(Record, frozen=True, kw_only=True):
    """One watched histogram: ``source`` is the place of the profile's stream that it is made of."""

    name: str
    kind: Kind
    source: int
    reference: Reference
    edges: tuple[float, ...] = ()
    """Inner edges of ordered bins; empty for classes."""
    classes: tuple[int, ...] = ()
    """Kind ``class``: the bin of each class."""
    labels: tuple[str, ...] = ()
    """Kind ``class``: what each bin is, for people."""

    def read(self, cells: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
        """The histogram [..., B] in a sketch [..., cells]."""
        values = np.asarray(cells, dtype=np.float64)
        if self.kind not in {"class", "confidence"}:
            return values
        table = values.reshape(*values.shape[:-1], -1, CONFIDENCE_BINS)
        if self.kind == "confidence":
            return np.asarray(table.sum(axis=-2))
        by_class, bins = table.sum(axis=-1), np.asarray(self.classes)
        found = np.zeros((*by_class.shape[:-1], len(self.labels)))
        for bin_ in range(len(self.labels)):
            found[..., bin_] = by_class[..., bins == bin_].sum(axis=-1)
        return found


def watched_streams(profile: ReferenceProfile, class_names: Sequence[str] = ()) -> tuple[Watched, ...]:
    """What is watched of a profile, in its order.

    Args:
        profile: of the release.
        class_names: of the model's classes, in their order.
    """
    found: list[Watched] = []
    for source, stream in enumerate(profile.streams):
        found += _of_classes(source, stream, class_names) if stream.kind == "classes" else [_of_values(source, stream)]
    return tuple(found)


def _of_values(source: int, stream: StreamProfile) -> Watched:
    counts = (*map(float, stream.counts), float(stream.missing))
    kind: Kind = "saturation" if stream.summary == "outside" else "output" if stream.kind == "output" else "input"
    reference = Reference(counts=counts, has_missing=True)
    return Watched(name=stream.name, kind=kind, source=source, reference=reference, edges=stream.edges)


def _of_classes(source: int, stream: StreamProfile, class_names: Sequence[str]) -> list[Watched]:
    table = np.asarray(stream.counts, dtype=np.float64).reshape(-1, CONFIDENCE_BINS)
    edges = tuple(np.linspace(0, 1, CONFIDENCE_BINS + 1)[1:-1].tolist())
    confidence = Reference(counts=tuple(table.sum(axis=0).tolist()))
    found = [Watched(name=f"{stream.tensor}.confidence", kind="confidence", source=source, reference=confidence, edges=edges)]
    if table.shape[0] > 1:
        bins, labels = _class_bins(table.sum(axis=1), class_names)
        counts = np.bincount(bins, weights=table.sum(axis=1), minlength=len(labels))
        reference = Reference(counts=tuple(counts.tolist()), is_ordered=False)
        name = f"{stream.tensor}.class"
        found.append(
            Watched(name=name, kind="class", source=source, reference=reference, classes=tuple(bins), labels=tuple(labels))
        )
    return found


def _class_bins(answered: NDArray[np.float64], class_names: Sequence[str]) -> tuple[list[int], list[str]]:
    """The bin of each class; beyond ``MAX_CLASS_BINS`` classes the rarest share one."""
    names = [class_names[at] if len(class_names) == len(answered) else str(at) for at in range(len(answered))]
    if len(names) <= MAX_CLASS_BINS:
        return list(range(len(names))), names
    own = sorted(np.argsort(-answered, kind="stable")[: MAX_CLASS_BINS - 1].tolist())
    place = {number: at for at, number in enumerate(own)}
    labels = [*(names[number] for number in own), f"{len(names) - len(own)} others"]
    return [place.get(at, len(own)) for at in range(len(names))], labels


def compare_watched(watched: Watched, counts: NDArray[np.float64], *, design_effect: float = 1.0) -> Comparison:
    """A watched histogram against its reference; the Wasserstein distance is over the values that are there."""
    reference = np.asarray(watched.reference.counts)
    found = compare(reference, counts, design_effect=design_effect)
    if not watched.edges or not watched.reference.has_missing:
        return found if not watched.edges else compare(reference, counts, edges=watched.edges, design_effect=design_effect)
    present = compare(reference[:-1], counts[:-1], edges=watched.edges, design_effect=design_effect)
    return Comparison(**{name: getattr(found, name) for name in found.__struct_fields__} | {"wasserstein": present.wasserstein})


def bin_middles(watched: Watched) -> NDArray[np.float64]:
    """A value for each bin of a number: its middle, its inner edge where it is open; empty for classes."""
    if not watched.edges:
        return np.zeros(0)
    edges = np.asarray(watched.edges)
    if watched.kind == "saturation":  # a share: the first bin is none
        return np.asarray([0.0, *((edges[1:] + edges[:-1]) / 2), edges[-1]])
    return np.asarray([edges[0], *((edges[1:] + edges[:-1]) / 2), edges[-1]])


def mean_of(watched: Watched, counts: NDArray[np.float64]) -> float | None:
    """The mean as far as bins tell it; None for classes and for nothing."""
    middles = bin_middles(watched)
    present = counts[: middles.size]
    return float((middles * present).sum() / present.sum()) if middles.size and present.sum() else None


def describe_change(watched: Watched, counts: NDArray[np.float64]) -> tuple[str, bool]:
    """What changed most, for people, and whether that is missing values.

    Args:
        watched: the stream.
        counts: of the recent windows, at least one sample.
    """
    reference = np.asarray(watched.reference.counts)
    now, before = counts / counts.sum(), reference / max(reference.sum(), 1.0)
    if watched.reference.has_missing and now[-1] - before[-1] > MISSING_RISE:
        return f"missing {now[-1]:.1%}, in the reference {before[-1]:.1%}", True
    if watched.kind == "class":
        at = int(np.argmax(np.abs(now - before)))
        return f"{watched.labels[at]}: {now[at]:.1%} of the answers, in the reference {before[at]:.1%}", False
    mean, was = mean_of(watched, counts), mean_of(watched, reference)
    if mean is None or was is None:
        return "", False
    beyond = float(now[0] + now[len(watched.edges)]) if watched.kind == "input" else 0.0
    outside = f"; {beyond:.1%} beyond its range" if beyond > MISSING_RISE else ""
    return f"mean about {mean:.4g}, in the reference {was:.4g}{outside}", False


def decode_many(parts: Sequence[bytes], *, cells: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The counts in many sketches of one stream, in one pass of numpy.

    Args:
        parts: as :func:`edgekit.monitor.sketch.encode_counts` writes them.
        cells: of each.

    Returns:
        Counts [N, cells], and which could be read; the others are zeros.
    """
    try:
        return _decode_joined(parts, cells), np.ones(len(parts), dtype=np.bool_)
    except ArtifactError:
        pass
    found, is_read = np.zeros((len(parts), cells), dtype=np.int64), np.ones(len(parts), dtype=np.bool_)
    for at, part in enumerate(parts):
        try:
            found[at] = decode_counts(part, cells=cells)
        except ArtifactError:
            is_read[at] = False
    return found, is_read


def _decode_joined(parts: Sequence[bytes], cells: int) -> NDArray[np.int64]:
    found = np.zeros((len(parts), cells), dtype=np.int64)
    data = np.frombuffer(b"".join(parts), dtype=np.uint8)
    if not data.size:
        return found
    lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
    is_last = data < _CONTINUES
    bounds = np.cumsum(lengths)[lengths > 0] - 1
    if not is_last[bounds].all():
        raise _malformed("a number is not complete")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if int((ends - starts).max()) >= _MAX_BYTES:
        raise _malformed("a number is too long")
    place = np.arange(data.size) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((data & (_CONTINUES - 1)).astype(np.int64) << (_BITS * place), starts)
    owner = np.repeat(np.arange(len(parts)), lengths)[ends]
    return _place(found, values, owner, cells)


def _place(found: NDArray[np.int64], values: NDArray[np.int64], owner: NDArray[np.int64], cells: int) -> NDArray[np.int64]:
    """Put numbers where they belong: a zero is followed by how many more zeros follow it."""
    is_zero = values == 0
    follows_zero = np.zeros(values.size, dtype=np.bool_)
    follows_zero[1:] = is_zero[:-1] & (owner[1:] == owner[:-1])
    third = np.zeros(values.size, dtype=np.bool_)
    third[2:] = is_zero[2:] & follows_zero[2:] & follows_zero[1:-1]
    begins = is_zero & ~follows_zero
    is_run = np.zeros(values.size, dtype=np.bool_)
    is_run[1:] = begins[:-1] & (owner[1:] == owner[:-1])
    ends_open = begins & np.concatenate([owner[1:] != owner[:-1], [True]])
    if third.any() or ends_open.any():
        raise _malformed("a run of zeros without its length")
    width = np.where(is_run, values, 1)
    if int(width.max()) > cells:
        raise _malformed("too many bins")
    after = np.cumsum(width)
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    base = np.repeat((after - width)[first], np.diff(np.concatenate([np.flatnonzero(first), [values.size]])))
    position = after - width - base
    is_count = ~is_zero & ~is_run
    if is_count.any() and int(position[is_count].max()) >= cells:
        raise _malformed("too many bins")
    found[owner[is_count], position[is_count]] = values[is_count]
    return found


def _malformed(why: str) -> ArtifactError:
    return ArtifactError("telemetry.malformed", f"sketches: {why}.")


def sketch_widths(profile: ReferenceProfile) -> tuple[int, ...]:
    """How many cells each sketch of a profile has."""
    return tuple(cells_of(stream) for stream in profile.streams)
