"""The model's contract: inferred from data once, checked on every request for ever.

:func:`check_feeds` refuses what no contract allows: names, types, shapes, NaN. What a contract declares beyond that (reactions
by input and column) is done by :mod:`edgekit.dataset.guarding`, on the device for each request. A value outside the range that
was seen in calibration is not an error, since that is what drift looks like: :func:`count_out_of_range` counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from edgekit.dataset.data import Array, Dataset, suggest
from edgekit.dataset.fitting import describe_shape
from edgekit.errors import DataError
from edgekit.schema.contract import ColumnSpec, Contract, InputSpec, Task
from edgekit.schema.tensor import TensorSpec

_NOT_CLASSES = ("embed", "feature", "reconstruct", "decoded")
MAX_COLUMNS = 256
"""More places on the last axis than this are no table."""
MAX_CATEGORIES = 16
SAMPLES_PER_CATEGORY = 10
"""Fewer of each on average, and a column of whole numbers is a quantity, not a code."""


def infer_contract(
    data: Dataset,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    labels: tuple[str, ...] = (),
    *,
    is_each_column: bool = False,
) -> Contract:
    """The contract of a model that was calibrated on this data.

    Args:
        data: calibration data; its range per input becomes the contract's, and per column where a table named them. NaN is
            missing.
        inputs: the model's inputs.
        outputs: the model's outputs; the first one holds the classes of a classifier on its last axis.
        labels: names of the classes in order; the data's own when empty.
        is_each_column: every input [batch, k] is learned column by column, by number where there is no name.

    Raises:
        DataError: ``data.class_count`` when the names do not fit the number of classes.
    """
    names = labels or data.class_names
    task = infer_task(data, inputs, outputs, names)
    if task == "classification":
        _check_class_count(names, outputs[0], data.source)
    return Contract(
        inputs=tuple(_input_spec(spec, data, is_each_column=is_each_column) for spec in inputs),
        outputs=tuple(outputs),
        task=task,
        labels=names if task == "classification" else (),
    )


def infer_task(data: Dataset, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], labels: Sequence[str] = ()) -> Task:
    """Whether the model is a classifier: its first output is float [batch, 2 or more].

    With class names or integer labels that is enough; float labels say it is not. Without either it is taken for one unless
    the output has the shape of an input (an auto-encoder) or is named like an embedding: ``--metric`` decides otherwise.
    """
    if not outputs or len(outputs[0].shape) != 2 or outputs[0].dtype not in ("float32", "float16", "float64"):
        return "other"
    classes = outputs[0].shape[1]
    if classes == 1:
        return "other"
    if labels:
        return "classification"
    if data.labels is not None:
        return "classification" if data.labels.ndim == 1 and data.labels.dtype.kind == "i" else "other"
    if any(spec.shape[1:] == outputs[0].shape[1:] for spec in inputs):
        return "other"
    name = outputs[0].name.lower()
    return "other" if any(word in name for word in _NOT_CLASSES) else "classification"


def _check_class_count(names: tuple[str, ...], output: TensorSpec, source: str) -> None:
    classes = output.shape[-1]
    if names and isinstance(classes, int) and len(names) != classes:
        raise DataError(
            "data.class_count",
            f'{source}: {len(names)} class names, the output "{output.name}" has {classes} classes.',
            hint="Name every class of the model in its order; a folder of images needs a sub-folder per class, empty or not.",
        )


def _input_spec(spec: TensorSpec, data: Dataset, *, is_each_column: bool) -> InputSpec:
    array = data.inputs[spec.name]
    names = data.columns.get(spec.name, ())
    if not names and is_each_column and array.ndim == 2:
        names = tuple(str(place) for place in range(array.shape[1]))
    is_tabular = array.ndim == 2 and 0 < len(names) == array.shape[1] <= MAX_COLUMNS
    columns = tuple(_column_spec(name, array[:, place]) for place, name in enumerate(names)) if is_tabular else ()
    low, high, missing = _range(array)
    return InputSpec(
        name=spec.name, dtype=spec.dtype, shape=spec.shape, minimum=low, maximum=high, missing_share=missing, columns=columns
    )


def learn_columns(contract: Contract, data: Dataset, names: Mapping[str, tuple[str, ...]]) -> Contract:
    """The contract with columns of these names, learned from data, for inputs [batch, k] that have none yet.

    Args:
        contract: of the model.
        data: its inputs; missing inputs are left alone.
        names: by input, the k names in order.
    """
    inputs = []
    for spec in contract.inputs:
        array, known = data.inputs.get(spec.name), names.get(spec.name, ())
        if spec.columns or array is None or array.ndim != 2 or array.shape[1] != len(known) or len(known) > MAX_COLUMNS:
            inputs.append(spec)
            continue
        columns = tuple(_column_spec(name, array[:, place]) for place, name in enumerate(known))
        inputs.append(msgspec.structs.replace(spec, columns=columns))
    return msgspec.structs.replace(contract, inputs=tuple(inputs))


def _column_spec(name: str, values: Array) -> ColumnSpec:
    low, high, missing = _range(values)
    return ColumnSpec(name=name, minimum=low, maximum=high, missing_share=missing, categories=_categories(values))


def _range(array: Array) -> tuple[float | None, float | None, float]:
    """Minimum, maximum and the share of NaN; no range where nothing is there."""
    if array.dtype.kind != "f" or not (is_missing := np.isnan(array)).any():
        return float(array.min()), float(array.max()), 0.0
    known = array[~is_missing]
    low, high = (float(known.min()), float(known.max())) if known.size else (None, None)
    return low, high, round(1.0 - known.size / array.size, 6)


def _categories(values: Array) -> tuple[float, ...]:
    """The values of a column that holds codes: whole numbers, few of them, each of them often."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    found = np.unique(known)
    is_coded = 2 <= len(found) <= MAX_CATEGORIES and len(known) >= SAMPLES_PER_CATEGORY * len(found)
    is_coded = is_coded and bool((found == np.round(found)).all())
    return tuple(float(value) for value in found) if is_coded else ()


def check_feeds(contract: Contract, feeds: Mapping[str, Array]) -> None:
    """Check one request against the contract: names, types, shapes with their dynamic axes, finite values.

    Raises:
        DataError: ``data.missing_input``, ``data.unknown_input``, ``data.dtype``, ``data.shape``, ``data.empty`` or
            ``data.not_finite``.
    """
    check_structure(contract, feeds)
    for spec in contract.inputs:
        array = feeds[spec.name]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))
            raise DataError(
                "data.not_finite",
                f'input "{spec.name}" has {len(bad)} NaN or infinite values, the first at {describe_shape(bad[0].tolist())}.',
            )


def check_structure(contract: Contract, feeds: Mapping[str, Array]) -> None:
    """Check names, types and shapes, not the values.

    Raises:
        DataError: as :func:`check_feeds`, but for ``data.not_finite``.
    """
    _check_names(contract, feeds)
    sizes: dict[str, tuple[int, str]] = {}
    for spec in contract.inputs:
        array = feeds[spec.name]
        if array.dtype != spec.dtype:
            raise DataError("data.dtype", f'input "{spec.name}" is {array.dtype.name}, expected {spec.dtype}.')
        _check_feed_shape(spec, array, sizes)


def _check_names(contract: Contract, feeds: Mapping[str, Array]) -> None:
    wanted = [spec.name for spec in contract.inputs]
    for name in wanted:
        if name not in feeds:
            unknown = [other for other in feeds if other not in wanted]
            text = f'input "{name}" is missing; expected {", ".join(wanted)}.'
            raise DataError("data.missing_input", text, hint=suggest(name, unknown))
    if len(feeds) > len(wanted):
        name = next(name for name in feeds if name not in wanted)
        text = f'"{name}" is not an input; expected {", ".join(wanted)}.'
        raise DataError("data.unknown_input", text, hint=suggest(name, wanted))


def _check_feed_shape(spec: InputSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    """Compare fixed axes, and axes of one name with each other; ``sizes`` remembers them over the inputs."""
    is_fit = array.ndim == len(spec.shape)
    for want, have in zip(spec.shape, array.shape, strict=False):
        if isinstance(want, str):
            known, other = sizes.setdefault(want, (have, spec.name))
            if known != have and is_fit:
                text = f'axis "{want}" is {have} in input "{spec.name}" and {known} in input "{other}".'
                raise DataError("data.shape", text)
        elif want != have:
            is_fit = False
    if not is_fit:
        expected = describe_shape(spec.shape)
        raise DataError("data.shape", f'input "{spec.name}" has shape {describe_shape(array.shape)}, expected {expected}.')
    if array.size == 0 and spec.shape:
        raise DataError("data.empty", f'input "{spec.name}" has no values: shape {describe_shape(array.shape)}.')


def count_out_of_range(contract: Contract, feeds: Mapping[str, Array]) -> dict[str, int]:
    """How many values of each input lie outside the range seen in calibration; inputs without a range are left out."""
    counts = {}
    for spec in contract.inputs:
        if spec.minimum is None or spec.maximum is None or spec.name not in feeds:
            continue
        array = feeds[spec.name]
        counts[spec.name] = int(np.count_nonzero(array < spec.minimum) + np.count_nonzero(array > spec.maximum))
    return counts
