"""A table of raw columns by name, as it is in the file: what features are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekit.dataset.data import Array, suggest
from edgekit.errors import DataError


def read_table(path: Path) -> dict[str, Array]:
    """Read every column.

    Args:
        path: ``.csv`` (an empty cell is NaN), ``.parquet``, or ``.npz`` with one array for each column.

    Raises:
        DataError: ``data.not_found``, ``data.unsupported``, ``data.unreadable`` or ``data.shape``.
    """
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError("data.not_found", f"{path}: no such file.", hint=suggest(path.name, names))
    match path.suffix.lower():
        case ".csv":
            from edgekit.dataset.tabular import csv_columns  # noqa: PLC0415 - readers are loaded when they are used

            columns = csv_columns(path)
        case ".parquet" | ".pq":
            from edgekit.dataset.tabular import parquet_columns  # noqa: PLC0415

            columns = {name: _plain(array) for name, array in parquet_columns(path).items()}
        case ".npz":
            from edgekit.dataset.npz import read_npz  # noqa: PLC0415

            raw = read_npz(path, ())
            columns = dict(raw.arrays) | ({} if raw.labels is None else {"labels": raw.labels})
        case _:
            raise DataError("data.unsupported", f"{path}: no table.", hint="Give .csv, .parquet or .npz.")
    lengths = {len(array) for array in columns.values() if array.ndim}
    if len(lengths) > 1 or not columns:
        raise DataError("data.shape", f"{path}: its columns have different lengths: {sorted(lengths)}.")
    return columns


def _plain(array: Array) -> Array:
    """A date column as seconds since 1970; anything else as it is."""
    return array.astype("datetime64[ns]").astype(np.int64) / 1e9 if array.dtype.kind == "M" else array
