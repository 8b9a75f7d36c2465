"""``Dataset``: the samples a model is calibrated on, evaluated on or run on, in memory.

Every array's axis 0 is the sample. The digest names the content (names, types, shapes, bytes), not the file it came from: the
same samples in an ``.npz`` and in a ``.parquet`` have one digest.

    >>> import numpy as np
    >>> data = make_dataset({"x": np.zeros((4, 2), np.float32)}, labels=np.array([0, 1, 0, 1]), source="made here")
    >>> len(data), [len(labels) for _feeds, labels in data.batches(3)]
    (4, [3, 1])
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UsageError

Array = NDArray[Any]
_DIGEST_FORMAT = b"edgekit dataset 1\n"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples with optional labels.

    ``inputs`` are C-contiguous, of the model's declared types, [N, ...]. ``labels`` are int64 [N] for classes, else floats
    [N, ...]. ``class_names`` has the name of class i at place i, or is empty. ``source`` is what the user gave; ``notes`` say
    what was done to the data on the way in (casts, columns left out). ``columns`` names the places on the last axis of an
    input that was made of a table's columns.
    """

    inputs: dict[str, Array]
    labels: Array | None
    class_names: tuple[str, ...]
    digest: str
    source: str
    notes: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def select(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Dataset:
        """The samples at these indices, in this order, with a digest of their own."""
        chosen = np.asarray(indices, dtype=np.intp)
        return make_dataset(
            {name: array[chosen] for name, array in self.inputs.items()},
            labels=None if self.labels is None else self.labels[chosen],
            class_names=self.class_names,
            source=self.source,
            notes=self.notes,
            columns=self.columns,
        )

    def batches(self, size: int) -> Iterator[tuple[dict[str, Array], Array | None]]:
        """Feeds and labels of up to ``size`` samples at a time, in order; the arrays are views."""
        if size < 1:
            raise UsageError("data.batch_size", f"a batch of {size} samples: expected 1 or more.")
        for start in range(0, len(self), size):
            stop = start + size
            feeds = {name: array[start:stop] for name, array in self.inputs.items()}
            yield feeds, None if self.labels is None else self.labels[start:stop]


def make_dataset(
    inputs: Mapping[str, Array],
    *,
    labels: Array | None = None,
    class_names: Sequence[str] = (),
    source: str,
    notes: Sequence[str] = (),
    columns: Mapping[str, tuple[str, ...]] | None = None,
) -> Dataset:
    """A data set of arrays that are known to be good, with its digest."""
    arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    kept = None if labels is None else np.ascontiguousarray(labels)
    return Dataset(
        inputs=arrays,
        labels=kept,
        class_names=tuple(class_names),
        digest=digest_arrays(arrays, kept),
        source=source,
        notes=tuple(notes),
        columns=dict(columns or {}),
    )


def digest_arrays(inputs: Mapping[str, Array], labels: Array | None) -> str:
    """SHA-256 over names, types, shapes and little-endian bytes; the order of the names does not matter."""
    state = hashlib.sha256(_DIGEST_FORMAT)
    parts: list[tuple[str, str, Array]] = [("input", name, inputs[name]) for name in sorted(inputs)]
    if labels is not None:
        parts.append(("labels", "", labels))
    for role, name, array in parts:
        ordered = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        header = json.dumps([role, name, ordered.dtype.name, list(array.shape)])
        state.update(f"{len(header)}:{header}".encode())
        state.update(ordered.reshape(-1).view(np.uint8).data)
    return "sha256:" + state.hexdigest()


def spread_indices(count: int, limit: int | None) -> NDArray[np.intp]:
    """Up to ``limit`` of ``count`` indices, evenly spaced and increasing: the same ones every time.

    >>> spread_indices(10, 4).tolist()
    [0, 2, 5, 7]

    Raises:
        UsageError: ``data.limit`` when the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError("data.limit", f"a limit of {limit} samples: expected 1 or more.")
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.intp)
    return (np.arange(limit, dtype=np.intp) * count) // limit


def suggest(name: str, known: Sequence[str], *, otherwise: str = "") -> str:
    """A hint that names the nearest known name, or the other hint when none is near.

    >>> suggest("imgae", ["image", "mask"])
    'Did you mean "image"?'
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f'Did you mean "{near[0]}"?' if near else otherwise
