"""Requests that wait for a slow model are answered together, where that was measured to pay. A lone request never waits.

While the model runs, requests queue up; when it is done, those that fit together go into one batch. Nothing is held back in the
hope of company. Whether a batch pays is measured once, when the model is loaded, on its golden samples: a batch of four must
take less than ``PAYS_BELOW`` of four runs, and every answer in it must be the one that the sample gets alone, within the golden
samples' own tolerance. Models whose quantization looks at the whole batch (dynamic int8) fail that, or are left out by name.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekit.schema.manifest import GoldenSet
from edgekit.schema.tensor import TensorSpec

Array = NDArray[Any]
Feeds = Mapping[str, Array]
TRIED = 4
MAX_BATCH = 8
PAYS_BELOW = 0.75
ROUNDS = 3


class Runnable(Protocol):
    """What is needed of a session."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs."""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Every output by name."""


def largest_batch(session: Runnable, golden: GoldenSet, samples: Sequence[Feeds], *, precision: str) -> int:
    """How many requests may share a run: ``MAX_BATCH`` where it pays and changes no answer, else 1.

    Args:
        session: the loaded model.
        golden: has the tolerance.
        samples: inputs of some golden samples, each with a batch axis of 1.
        precision: of the variant.
    """
    has_axis = all(spec.shape and isinstance(spec.shape[0], str) for spec in (*session.inputs, *session.outputs))
    singles = [feeds for feeds in samples if all(array.ndim and array.shape[0] == 1 for array in feeds.values())]
    if not has_axis or "dynamic" in precision or not singles:
        return 1
    chosen = [singles[index % len(singles)] for index in range(TRIED)]
    if not can_share(chosen):
        return 1
    try:
        alone = [session.run(feeds) for feeds in chosen]
        together = split(session.run(join(chosen)), [1] * TRIED)
        if not all(_is_alike(left, right, golden) for left, right in zip(alone, together, strict=True)):
            return 1
        one, many = (
            min(_timed(session, chosen[0]) for _ in range(ROUNDS)),
            min(_timed(session, join(chosen)) for _ in range(ROUNDS)),
        )
    except Exception:  # noqa: BLE001 - a runtime may raise anything; then it is not done
        return 1
    return MAX_BATCH if many < PAYS_BELOW * TRIED * one else 1


def _timed(session: Runnable, feeds: Feeds) -> float:
    started = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - started


def _is_alike(left: Mapping[str, Array], right: Mapping[str, Array], golden: GoldenSet) -> bool:
    return all(np.allclose(left[name], right[name], rtol=golden.rtol, atol=golden.atol) for name in left)


def can_share(parts: Sequence[Feeds]) -> bool:
    """Whether requests fit into one batch: the same inputs, types and shapes behind the batch axis."""
    first = _form(parts[0])
    return all(_form(part) == first for part in parts[1:])


def _form(feeds: Feeds) -> dict[str, tuple[Any, ...]]:
    return {name: (array.dtype.str, *array.shape[1:]) for name, array in feeds.items()}


def join(parts: Sequence[Feeds]) -> dict[str, Array]:
    """One feed of all, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split(outputs: Mapping[str, Array], sizes: Sequence[int]) -> list[dict[str, Array]]:
    """The outputs of each, by its number of samples."""
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    return [{name: array[start:end] for name, array in outputs.items()} for start, end in zip(starts, ends, strict=True)]


@dataclass
class Waiting:
    """Requests that wait for one model, first come first served. Used under the caller's lock or from one thread."""

    max_batch: int
    _queue: deque[Any] = field(default_factory=deque)

    def put(self, job: Any) -> None:
        """One more."""
        self._queue.append(job)

    def take(self, feeds_of: Callable[[Any], Feeds | None]) -> list[Any]:
        """The next batch: the oldest, and those directly behind it that can share a run; empty when nobody waits.

        Args:
            feeds_of: a job's inputs; None for one that must run alone.
        """
        if not self._queue:
            return []
        batch = [self._queue.popleft()]
        first = feeds_of(batch[0])
        total = _samples(first) if first is not None else self.max_batch
        while self._queue and first is not None:
            more = feeds_of(self._queue[0])
            if more is None or total + _samples(more) > self.max_batch or not can_share([first, more]):
                break
            batch.append(self._queue.popleft())
            total += _samples(more)
        return batch


def _samples(feeds: Feeds) -> int:
    return max((array.shape[0] for array in feeds.values() if array.ndim), default=1)
