"""Read ``.csv`` (standard library, so that a device can) and ``.parquet`` (pyarrow): one sample a row.

An input is one column of its name (in Parquet also a column of lists), or the columns ``name_0`` .. ``name_k`` in row-major
order; a single input [batch, k] also takes all numeric columns in their order when there are exactly k. The labels are the
column ``labels`` or ``label``. Other columns are left out, and noted.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.dataset.data import Array, suggest
from edgekit.dataset.fitting import RawData, describe_shape
from edgekit.errors import DataError, EnvironmentFault
from edgekit.schema.tensor import TensorSpec

_LABEL_COLUMNS = ("labels", "label")
Columns = dict[str, Array]


def read_csv(path: Path, inputs: Sequence[TensorSpec]) -> RawData:
    """Read a CSV file with a header row, UTF-8, separated by commas.

    Raises:
        DataError: ``data.unreadable``, ``data.empty``, ``data.missing_input`` or ``data.dtype``.
    """
    return _assign(csv_columns(path), inputs, str(path))


def csv_columns(path: Path) -> Columns:
    """Every column of a CSV file by its name: int64, float64 (an empty cell is NaN), or text.

    Raises:
        DataError: ``data.unreadable`` or ``data.empty``.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("data.unreadable", f"{path}: not a readable CSV file: {error}.") from error
    rows = [row for row in rows if row]
    if not rows:
        raise DataError("data.empty", f"{path}: the file is empty.", hint="Write a header row, then one row a sample.")
    header = [name.strip() for name in rows[0]]
    _check_header(header, path)
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            text = f"{path}: sample {number} has {len(row)} columns, the header has {len(header)}."
            raise DataError("data.unreadable", text, hint="Every row needs one value per column.")
    return {name: _parse_column([row[i].strip() for row in rows[1:]]) for i, name in enumerate(header)}


def read_parquet(path: Path, inputs: Sequence[TensorSpec]) -> RawData:
    """Read a Parquet file.

    Raises:
        DataError: ``data.unreadable``, ``data.missing_input`` or ``data.dtype``.
        EnvironmentFault: ``pyarrow.missing``.
    """
    return _assign(parquet_columns(path), inputs, str(path))


def parquet_columns(path: Path) -> Columns:
    """Every column of a Parquet file by its name, [N] or [N, k] for lists of one length.

    Raises:
        DataError: ``data.unreadable`` or ``data.shape``.
        EnvironmentFault: ``pyarrow.missing``.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - only Parquet needs it
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        hint = "pip install pyarrow, or use .npz or .csv."
        raise EnvironmentFault("pyarrow.missing", f"{path}: reading Parquet needs pyarrow.", hint=hint) from error
    try:
        table = pq.read_table(path)
        columns: Columns = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
            columns[name] = _arrow_column(column, name, path, pa.types)
    except (OSError, pa.ArrowException) as error:
        raise DataError("data.unreadable", f"{path}: not a readable Parquet file: {error}.") from error
    return columns


def _arrow_column(values: Any, name: str, path: Path, types: Any) -> Array:
    """An Arrow array as [N], or as [N, k] for lists of one length."""
    count = len(values)
    is_nested = False
    while types.is_list(values.type) or types.is_large_list(values.type) or types.is_fixed_size_list(values.type):
        is_nested, values = True, values.flatten()
    flat = np.asarray(values.to_numpy(zero_copy_only=False))
    if not is_nested:
        return flat
    if count == 0 or len(flat) % count:
        text = (
            f'{path}: the lists of column "{name}" hold {len(flat)} values for {count} samples; expected lists of one length.'
        )
        raise DataError("data.shape", text, hint="Pad or crop them to one length.")
    return flat.reshape(count, -1)


def _check_header(header: Sequence[str], path: Path) -> None:
    def is_number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    if all(is_number(name) for name in header):
        text = f"{path}: the first row holds numbers; expected a header row with column names."
        raise DataError("data.unreadable", text, hint="Write the columns' names in the first row.")
    for name in header:
        if header.count(name) > 1:
            raise DataError("data.unreadable", f'{path}: two columns are called "{name}".', hint="Give each its own name.")


def _parse_column(cells: list[str]) -> Array:
    """int64, else float64 with empty cells as NaN, else text."""
    for convert, dtype in ((int, np.int64), (lambda cell: float(cell) if cell else math.nan, np.float64)):
        try:
            return np.array([convert(cell) for cell in cells], dtype=dtype)
        except (ValueError, OverflowError):
            continue
    return np.array(cells, dtype=object)


def _assign(columns: Columns, inputs: Sequence[TensorSpec], source: str) -> RawData:
    wanted = {spec.name for spec in inputs}
    label_columns = [name for name in _LABEL_COLUMNS if name in columns and name not in wanted]
    labels = columns[label_columns[0]] if label_columns else None
    features = {name: array for name, array in columns.items() if name not in label_columns}
    used: set[str] = set()
    arrays: Columns = {}
    made_of: dict[str, tuple[str, ...]] = {}
    for spec in inputs:
        names = _columns_of(spec, features, is_single=len(inputs) == 1, source=source)
        used.update(names)
        made_of[spec.name] = tuple(names)
        arrays[spec.name] = _stack(spec, [_numeric(features, name, spec, source) for name in names])
    unused = [name for name in features if name not in used]
    notes = (f"columns left out: {', '.join(unused[:8])}{' ...' if len(unused) > 8 else ''}",) if unused else ()
    return RawData(arrays=arrays, labels=labels, notes=notes, columns=made_of)


def _columns_of(spec: TensorSpec, features: Columns, *, is_single: bool, source: str) -> list[str]:
    """The columns that make up an input, in order."""
    if spec.name in features:
        return [spec.name]
    numbered: list[str] = []
    while f"{spec.name}_{len(numbered)}" in features:
        numbered.append(f"{spec.name}_{len(numbered)}")
    if numbered:
        return numbered
    numeric = [name for name, array in features.items() if array.dtype.kind in "biuf" and array.ndim == 1]
    if is_single and numeric and len(spec.shape) == 2 and (isinstance(spec.shape[1], str) or spec.shape[1] == len(numeric)):
        return numeric
    expected = f'a column "{spec.name}" or columns "{spec.name}_0", "{spec.name}_1", ...'
    if is_single and len(spec.shape) == 2:
        expected += f", or exactly {spec.shape[1]} numeric columns"
    text = [name for name in features if name not in numeric]
    unread = f" ({', '.join(text[:8])} {'is' if len(text) == 1 else 'are'} not)" if text and numeric else ""
    raise DataError(
        "data.missing_input",
        f'{source}: no data for the model\'s input "{spec.name}" {describe_shape(spec.shape)}: expected {expected}; '
        f"found {len(features)} columns, {len(numeric)} of them numeric{unread}.",
        hint=suggest(spec.name, list(features), otherwise="Rename the columns after the model's inputs."),
    )


def _numeric(features: Columns, name: str, spec: TensorSpec, source: str) -> Array:
    array = features[name]
    if array.dtype.kind in "biuf":
        return array
    for index, value in enumerate(array.tolist()):
        try:
            float(value)
        except (TypeError, ValueError):
            text = f'{source}: column "{name}", sample {index}: {value!r} is not a number; input "{spec.name}" is {spec.dtype}.'
            raise DataError("data.dtype", text, hint="Encode it as in training.") from None
    return array.astype(np.float64)


def _stack(spec: TensorSpec, columns: list[Array]) -> Array:
    """[N, *shape] when the number of values fits the input's fixed shape, else [N, k] for the shape check to refuse."""
    values = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
    tail = [axis for axis in spec.shape[1:] if isinstance(axis, int)]
    if len(tail) == len(spec.shape) - 1 and math.prod(tail) == math.prod(values.shape[1:]):
        return values.reshape(len(values), *tail)
    if len(columns) == 1 and values.ndim == 1 and len(spec.shape) == 2:
        return values[:, None]
    return values
