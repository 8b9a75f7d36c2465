"""Load data by what the user wrote: ``.npz``, a folder of images, ``.csv``, ``.parquet``, or the user's own function.

    >>> from edgekit.dataset.load import load_dataset
    >>> data = load_dataset("calibration.npz", session.inputs, limit=200)   # doctest: +SKIP
    >>> len(data), data.digest                                              # doctest: +SKIP

Whatever the source, the result is checked against the model's inputs: see :mod:`edgekit.dataset.fitting`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from edgekit.dataset.data import Dataset, spread_indices, suggest
from edgekit.dataset.fitting import RawData, fit
from edgekit.dataset.function import is_function_spec, read_function
from edgekit.errors import DataError
from edgekit.schema.tensor import TensorSpec

_LOG = logging.getLogger(__name__)
_KINDS = "an .npz, .csv or .parquet file, a folder of images by class, package.module:function or file.py:function"


def load_dataset(
    spec: str,
    inputs: Sequence[TensorSpec],
    *,
    limit: int | None = None,
    class_names: Sequence[str] = (),
    is_missing_allowed: bool = False,
) -> Dataset:
    """Load samples for a model.

    Args:
        spec: a path, ``package.module:function`` or ``file.py:function``.
        inputs: the model's inputs; axis 0 of each is the sample.
        limit: keep at most this many samples, evenly spaced over the data, the same ones every time.
        class_names: the model's classes in order, where they are known; labels written as text are matched to them.
        is_missing_allowed: NaN in the inputs is kept.

    Raises:
        DataError: ``data.not_found``, ``data.unreadable``, ``data.unsupported``, and what
            :func:`edgekit.dataset.fitting.fit` raises.
        UsageError: ``data.limit`` when the limit is below 1.
        EnvironmentFault: when Pillow or pyarrow is needed and not installed.
    """
    spread_indices(0, limit)
    if not inputs:
        raise DataError("data.shape", f"{spec}: the model has no inputs to feed.")
    raw, is_limited = _read(spec, inputs, limit)
    data = fit(
        raw,
        inputs,
        source=spec,
        limit=None if is_limited else limit,
        class_names=class_names,
        is_missing_allowed=is_missing_allowed,
    )
    _LOG.debug("loaded source=%s samples=%d digest=%s notes=%s", spec, len(data), data.digest, "; ".join(data.notes))
    return data


def _read(spec: str, inputs: Sequence[TensorSpec], limit: int | None) -> tuple[RawData, bool]:
    """The raw data, and whether the limit was applied while reading."""
    path = Path(spec)
    if not path.exists():
        if is_function_spec(spec):
            return read_function(spec, inputs), False
        raise DataError("data.not_found", f"{spec}: no such file or folder.", hint=_not_found_hint(path))
    if path.is_dir():
        from edgekit.dataset.images import read_images  # noqa: PLC0415 - readers are loaded when they are used

        return read_images(path, inputs, limit=limit), True
    match path.suffix.lower():
        case ".npz":
            from edgekit.dataset.npz import read_npz  # noqa: PLC0415

            return read_npz(path, inputs), False
        case ".csv":
            from edgekit.dataset.tabular import read_csv  # noqa: PLC0415

            return read_csv(path, inputs), False
        case ".parquet" | ".pq":
            from edgekit.dataset.tabular import read_parquet  # noqa: PLC0415

            return read_parquet(path, inputs), False
        case _:
            raise DataError("data.unsupported", f"{spec}: not a kind of data that edgekit reads.", hint=f"Give {_KINDS}.")


def _not_found_hint(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return suggest(path.name, names, otherwise=f"Give {_KINDS}.")
