"""Fit raw arrays to what a model declares, or say exactly what does not fit.

A cast is made only when it changes no value, save the rounding of one float type to another; each is noted. Text, objects and
complex numbers are refused. Nothing is scaled, transposed or reshaped here: a guess that is wrong would be a silent one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.dataset.data import Array, Dataset, make_dataset, spread_indices, suggest
from edgekit.errors import DataError
from edgekit.schema.tensor import TensorSpec

INPUTS_NAME = "inputs"
LABELS_NAME = "labels"
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RawData:
    """What a source holds, before it is checked. ``arrays`` by input name (or ``inputs``), axis 0 is the sample."""

    arrays: Mapping[str, Array]
    labels: Array | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By input, the table's columns that it was made of, in order."""


def fit(
    raw: RawData,
    inputs: Sequence[TensorSpec],
    *,
    source: str,
    limit: int | None = None,
    class_names: Sequence[str] = (),
    is_missing_allowed: bool = False,
) -> Dataset:
    """Check everything and make the data set.

    Args:
        raw: what the source holds.
        inputs: the model's inputs.
        source: the user's word for the data, for messages.
        limit: keep at most this many samples, evenly spaced.
        class_names: names of the model's classes, to which labels written as text are matched.
        is_missing_allowed: NaN in the inputs is kept, for learning a contract or for a guard that knows what to do with it.

    Raises:
        DataError: ``data.missing_input``, ``data.unknown_input``, ``data.shape``, ``data.dtype``, ``data.not_finite``,
            ``data.empty``, ``data.labels_length``, ``data.labels_dtype`` or ``data.unknown_label``.
    """
    arrays = _match_names(raw.arrays, inputs, source)
    notes = list(raw.notes)
    fitted: dict[str, Array] = {}
    for spec in inputs:
        check_shape(arrays[spec.name], spec, source)
        fitted[spec.name] = fit_dtype(arrays[spec.name], spec, source, notes)
    count = _check_counts(fitted, source)
    for name, array in fitted.items():
        if not is_missing_allowed:
            check_finite(array, name, source)
    labels, names = _fit_labels(raw, count, tuple(class_names), source, notes)
    chosen = spread_indices(count, limit)
    if len(chosen) < count:
        fitted = {name: array[chosen] for name, array in fitted.items()}
        labels = None if labels is None else labels[chosen]
        notes.append(f"{len(chosen)} of {count} samples, evenly spaced")
    shapes = {name: array.shape for name, array in fitted.items() if array.ndim > 1}
    columns = {name: found for name, found in raw.columns.items() if name in shapes and shapes[name][-1] == len(found)}
    return make_dataset(fitted, labels=labels, class_names=names, source=source, notes=notes, columns=columns)


def _match_names(arrays: Mapping[str, Array], inputs: Sequence[TensorSpec], source: str) -> dict[str, Array]:
    wanted = [spec.name for spec in inputs]
    found = dict(arrays)
    if len(wanted) == 1 and wanted[0] not in found and INPUTS_NAME in found:
        found[wanted[0]] = found.pop(INPUTS_NAME)
    unknown = [name for name in found if name not in wanted]
    for name in wanted:
        if name not in found:
            have = ", ".join(found) if found else "no array"
            near = difflib.get_close_matches(name, unknown, n=1)
            raise DataError(
                "data.missing_input",
                f'{source}: no data for the model\'s input "{name}"; expected {", ".join(wanted)}, found {have}.',
                hint=f'Rename the array "{near[0]}" to "{name}".' if near else _naming_hint(name, wanted),
            )
    if unknown:
        raise DataError(
            "data.unknown_input",
            f'{source}: "{unknown[0]}" is not an input of the model, which takes {", ".join(wanted)}.',
            hint=suggest(unknown[0], [*wanted, LABELS_NAME], otherwise="Remove it, or give it the name of an input."),
        )
    return {name: np.asarray(found[name]) for name in wanted}


def _naming_hint(name: str, wanted: Sequence[str]) -> str:
    alternative = f' or "{INPUTS_NAME}"' if len(wanted) == 1 else ""
    return f'Name the array "{name}"{alternative}; one array per input, axis 0 is the sample.'


def describe_shape(shape: Sequence[int | str]) -> str:
    """A shape for people: ``[batch, 1, 28, 28]``."""
    return "[" + ", ".join(str(axis) for axis in shape) + "]"


def check_shape(array: Array, spec: TensorSpec, source: str) -> None:
    """Compare every axis but the first, which is the sample.

    Raises:
        DataError: ``data.shape``.
    """
    expected = spec.shape[1:]
    is_fit = bool(spec.shape) and array.ndim == len(spec.shape)
    if is_fit and all(isinstance(want, str) or want == have for want, have in zip(expected, array.shape[1:], strict=True)):
        return
    raise DataError(
        "data.shape",
        f'{source}: input "{spec.name}" has shape {describe_shape(array.shape)}, '
        f"the model expects {describe_shape(['samples', *expected])}.",
        hint=_shape_hint(array.shape, spec),
    )


def _shape_hint(shape: tuple[int, ...], spec: TensorSpec) -> str:
    tail = tuple(spec.shape[1:])
    rest = shape[1:]
    is_image = len(tail) == 3
    if not spec.shape:
        return "The model's input has no sample axis; export the model with a batch axis."
    hint = "Axis 0 is the sample; prepare every other axis as the model was trained."
    if shape == tail:
        hint = "This is one sample without the sample axis: save array[None]."
    elif is_image and (1, *rest) == tail:
        hint = "The channel axis is missing: save array[:, None]."
    elif is_image and (*rest, 1) == tail:
        hint = "The channel axis is missing: save array[..., None]."
    elif is_image and len(rest) == 3 and (rest[2], *rest[:2]) == tail:
        hint = "The channels are last, the model wants them first: save array.transpose(0, 3, 1, 2)."
    elif is_image and len(rest) == 3 and (*rest[1:], rest[0]) == tail:
        hint = "The channels are first, the model wants them last: save array.transpose(0, 2, 3, 1)."
    return hint


def fit_dtype(array: Array, spec: TensorSpec, source: str, notes: list[str]) -> Array:
    """The array in the model's type, C-contiguous and in native byte order.

    Raises:
        DataError: ``data.dtype`` when a value would change, or the data is no number.
    """
    want = np.dtype(spec.dtype)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if native.dtype == want:
        return np.ascontiguousarray(native)
    obstacle = _cast_obstacle(native, want)
    if obstacle:
        raise DataError(
            "data.dtype",
            f'{source}: input "{spec.name}" is {array.dtype.name}, the model expects {spec.dtype}: {obstacle}.',
            hint=f'Save it as {spec.dtype}, prepared as the model was trained: array.astype("{spec.dtype}").',
        )
    kind = "cast" if want.kind == "f" and native.dtype.kind == "f" else "cast without scaling"
    notes.append(f"{spec.name}: {native.dtype.name} {kind} to {spec.dtype}")
    return np.ascontiguousarray(native.astype(want))


def _cast_obstacle(array: Array, want: np.dtype[Any]) -> str:
    """Why the cast would lose something; empty when it would not."""
    have = array.dtype.kind
    if have not in "biuf":
        return "it does not hold plain numbers"
    if array.size == 0 or have == "b":
        return ""
    low, high = array.min(), array.max()
    if want.kind == "f":
        return _float_obstacle(low, high, have, want)
    if have == "f":
        position = _first_sample(~np.isfinite(array) | (array != np.trunc(array)))
        if position is not None:
            return f"sample {position} holds a value that is not a whole number"
    limits = (0, 1) if want.kind == "b" else (int(np.iinfo(want).min), int(np.iinfo(want).max))
    if int(low) < limits[0] or int(high) > limits[1]:
        return f"its range {low} to {high} does not fit {limits[0]} to {limits[1]}"
    return ""


def _float_obstacle(low: Any, high: Any, have: str, want: np.dtype[Any]) -> str:
    details = np.finfo(want)
    if have == "f":
        finite = [abs(float(value)) for value in (low, high) if np.isfinite(float(value))]
        return "its largest values overflow" if any(value > float(details.max) for value in finite) else ""
    exact = 2 ** (details.nmant + 1)
    largest = max(abs(int(low)), abs(int(high)))
    return f"{largest} cannot be held exactly by {want.name}" if largest > exact else ""


def _first_sample(mask: Array) -> int | None:
    """Index on axis 0 of the first True, or None."""
    rows = mask.reshape(len(mask), -1).any(axis=1)
    return int(rows.argmax()) if rows.any() else None


def _check_counts(arrays: Mapping[str, Array], source: str) -> int:
    names = list(arrays)
    count = len(arrays[names[0]])
    for name in names[1:]:
        if len(arrays[name]) != count:
            raise DataError(
                "data.shape",
                f'{source}: input "{name}" has {len(arrays[name])} samples, input "{names[0]}" has {count}.',
                hint="Every input needs the same number of samples on axis 0.",
            )
    if any(array.size == 0 for array in arrays.values()):
        raise DataError("data.empty", f"{source}: no samples.", hint="Give at least one sample; 100 to 500 calibrate well.")
    return count


def check_finite(array: Array, name: str, source: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: ``data.not_finite`` with the first sample and the number of values.
    """
    if array.dtype.kind != "f":
        return
    step = max(1, _CHUNK_VALUES // max(1, int(np.prod(array.shape[1:]))))
    first, bad = -1, 0
    for start in range(0, len(array), step):
        mask = ~np.isfinite(array[start : start + step])
        found = int(mask.sum())
        if found and first < 0:
            first = start + (_first_sample(mask) or 0)
        bad += found
    if bad:
        value = array[first].reshape(-1)
        kind = "NaN" if np.isnan(value).any() else "infinite"
        raise DataError(
            "data.not_finite",
            f'{source}: input "{name}" has {bad} NaN or infinite values, the first ({kind}) in sample {first}; '
            "expected finite numbers.",
            hint="Remove the sample or fill its missing values, as in training.",
        )


def _fit_labels(
    raw: RawData, count: int, class_names: tuple[str, ...], source: str, notes: list[str]
) -> tuple[Array | None, tuple[str, ...]]:
    names = class_names or raw.class_names
    if raw.labels is None:
        return None, names
    labels = np.asarray(raw.labels)
    if labels.ndim == 0 or len(labels) != count:
        found = "one value" if labels.ndim == 0 else f"{len(labels)} labels"
        raise DataError(
            "data.labels_length",
            f"{source}: {found} for {count} samples.",
            hint="Give one label per sample, in the order of the samples.",
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if raw.class_names and class_names and raw.class_names != class_names:
        labels = _rename(labels, raw.class_names, source)
    return _numeric_labels(labels, names, source, notes)


def _rename(labels: Array, names: tuple[str, ...], source: str) -> Array:
    """Class names in the place of indices, so that they can be matched to the model's own order."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min() < 0 or labels.max() >= len(names):
        text = f"{source}: labels are {labels.dtype.name}; expected indices of the {len(names)} classes that the data names."
        raise DataError("data.labels_dtype", text, hint='Save class indices from 0: labels.astype("int64").')
    return np.array(names, dtype=object)[labels]


def _numeric_labels(labels: Array, names: tuple[str, ...], source: str, notes: list[str]) -> tuple[Array, tuple[str, ...]]:
    match labels.dtype.kind:
        case "i" | "u" | "b":
            return labels.astype(np.int64), names
        case "f":
            check_finite(labels, LABELS_NAME, source)
            return labels.astype(labels.dtype.newbyteorder("=")), names
        case "U" | "S" | "O" | "T" if labels.ndim == 1 and all(isinstance(value, str | bytes) for value in labels.tolist()):
            text = np.array([v.decode(errors="replace") if isinstance(v, bytes) else v for v in labels.tolist()], dtype=object)
            if not names:
                names = tuple(sorted(set(text.tolist())))
                notes.append(f"labels are text: class i is the i-th name in sorted order, {names[0]} first")
            return _text_indices(text, names, source), names
    raise DataError(
        "data.labels_dtype",
        f"{source}: labels are {labels.dtype.name} of shape {describe_shape(labels.shape)}; "
        "expected class indices, class names or floats.",
        hint='Save class indices: labels.astype("int64").',
    )


def _text_indices(text: Array, names: tuple[str, ...], source: str) -> Array:
    places = {name: index for index, name in enumerate(names)}
    for position, value in enumerate(text.tolist()):
        if value not in places:
            raise DataError(
                "data.unknown_label",
                f'{source}: sample {position} has the label "{value}", which is none of the {len(names)} classes.',
                hint=suggest(str(value), names, otherwise=f"The classes are {', '.join(names[:8])}."),
            )
    return np.array([places[value] for value in text.tolist()], dtype=np.int64)
