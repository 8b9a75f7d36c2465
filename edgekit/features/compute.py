"""Features of a whole table at once: training, evaluation and batch scoring.

There is no second implementation: the table is pushed through :class:`edgekit.features.stream.StreamWindows` in blocks, as a
device pushes its samples.

    >>> from edgekit.schema.features import FeatureSet, StreamColumn, StreamSpec, WindowFeatures, WindowPart, WindowSpec
    >>> declared = FeatureSet(
    ...     stream=StreamSpec(name="motor", rate_hz=10, columns=(StreamColumn(name="a"),)),
    ...     windows=(WindowSpec(name="w", length=4, hop=2),),
    ...     inputs=(WindowFeatures(name="x", parts=(WindowPart(window="w", aggregates=("mean",)),)),),
    ... )
    >>> compute({"a": np.arange(8)}, declared).inputs["x"].ravel().tolist()
    [1.5, 3.5, 5.5]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.features.program import Program
from edgekit.features.stream import FeatureWindow, StreamCounters, StreamWindows
from edgekit.schema.features import FeatureSet

Array = NDArray[Any]
BLOCK = 8192
"""Samples pushed at once; any other number gives the same."""


@dataclass(frozen=True)
class FeatureTable:
    """The model's inputs [N, ...]; of a stream also where each window lies (seconds), its label and its group."""

    inputs: dict[str, Array]
    start_s: Array | None = None
    end_s: Array | None = None
    labels: Array | None = None
    groups: Array | None = None
    mixed_labels: int = 0
    """Windows that closed with another label than the sample before had."""
    counters: StreamCounters = field(default_factory=StreamCounters)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def compute(
    columns: Mapping[str, Array],
    features: FeatureSet | Program,
    *,
    labels: Array | None = None,
    groups: Array | None = None,
    chunks: Sequence[int] | None = None,
) -> FeatureTable:
    """Compute every feature of a table.

    Args:
        columns: raw columns [N] by name, of a stream oldest first; images [N, height, width, channels].
        features: the declaration.
        labels: one for each row; a window's is that of the sample that closed it.
        groups: one for each row: every value is a stream of its own (a recording, a device).
        chunks: numbers of samples to push at once, repeated; to prove that they do not matter.

    Raises:
        UsageError: ``features.*`` when the declaration does not fit together.
        DataError: when the table does not fit the declaration, ``data.empty`` when it makes no window.
    """
    program = features if isinstance(features, Program) else Program(features)
    if not program.is_streamed:
        return FeatureTable(program.of_request(columns), labels=labels, groups=groups)
    rows = _rows(columns, program)
    parts = _parts(groups, rows)
    found: list[FeatureWindow] = []
    origins: list[int] = []
    counters = StreamCounters()
    for indices in parts:
        stream, start = StreamWindows(program), 0
        for size in _sizes(len(indices), chunks):
            block = indices[start : start + size]
            for window in stream.push({name: columns[name][block] for name in program.raw_columns}):
                found.append(window)
                origins.append(int(block[window.last]))
            start += size
        counters = counters + stream.counters
    if not found:
        text = (
            f"{rows} samples make no window: {counters.incomplete} were incomplete, the longest has {program.length} samples."
        )
        raise DataError("data.empty", text, hint="Check the rate and the time column; max_missing allows gaps.")
    at = np.array(origins)
    return FeatureTable(
        inputs={name: np.concatenate([window.inputs[name] for window in found]) for name in found[0].inputs},
        start_s=np.array([window.start_s for window in found]),
        end_s=np.array([window.end_s for window in found]),
        labels=None if labels is None else labels[at],
        groups=None if groups is None else groups[at],
        mixed_labels=0 if labels is None else _mixed(labels, at, program.length),
        counters=counters,
    )


def _rows(columns: Mapping[str, Array], program: Program) -> int:
    for name in program.raw_columns:
        if name not in columns:
            text = f'column "{name}" is missing; the declaration takes {", ".join(program.raw_columns)}.'
            raise DataError("data.missing_input", text, hint=f"The data has {', '.join(list(columns)[:12])}.")
    return len(columns[program.raw_columns[0]])


def _parts(groups: Array | None, rows: int) -> list[Array]:
    """Indices of each stream, streams in the order in which they begin."""
    if groups is None:
        return [np.arange(rows)]
    _values, first, places = np.unique(groups, return_index=True, return_inverse=True)
    return [np.flatnonzero(places == place) for place in np.argsort(first, kind="stable")]


def _sizes(count: int, chunks: Sequence[int] | None) -> list[int]:
    if not chunks:
        return [BLOCK] * -(-count // BLOCK)
    whole = max(1, sum(chunks))
    return [*chunks] * -(-count // whole)


def _mixed(labels: Array, at: Array, length: int) -> int:
    """Windows whose samples, by their places in the table, do not all have one label."""
    changes = np.concatenate([[0], np.cumsum(labels[1:] != labels[:-1])])
    return int(np.count_nonzero(changes[at] != changes[np.maximum(at - length + 1, 0)]))
