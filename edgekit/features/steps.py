"""Element-wise steps: the same for one value as for a million, in float64, rounded to the model's type at the very end."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError, UsageError
from edgekit.features.calls import Call, check_call, parse_call

Array = NDArray[Any]

STEPS: dict[str, tuple[int, ...]] = {
    "scale": (1,),
    "offset": (1,),
    "normalize": (2,),
    "clip": (2,),
    "log1p": (0,),
    "abs": (0,),
}
CODES: dict[str, tuple[int, ...]] = {"one_hot": (), "codes": ()}
"""Categories become places, or their numbers in the list."""
INEXACT = frozenset({"log1p"})


def parse_steps(texts: tuple[str, ...], *, is_table: bool = False) -> tuple[Call, ...]:
    """Read and check steps.

    Args:
        texts: as they were typed.
        is_table: categories are allowed, as the first step.

    Raises:
        UsageError: ``features.call`` naming what is wrong.
    """
    calls = tuple(parse_call(text, what="step") for text in texts)
    for place, call in enumerate(calls):
        check_call(call, STEPS | CODES if is_table and place == 0 else STEPS, what="step")
        if call.name in CODES:
            if len(set(call.arguments)) != len(call.arguments):
                raise UsageError("features.call", f'"{call.text}": a category is named twice.')
            continue
        numbers = call.numbers
        if not np.isfinite(numbers).all():
            raise UsageError("features.call", f'"{call.text}": its arguments are finite numbers.')
        if call.name == "normalize" and numbers[1] <= 0:
            raise UsageError("features.call", f'"{call.text}": mean and standard deviation, which is above 0.')
        if call.name == "clip" and numbers[0] > numbers[1]:
            raise UsageError("features.call", f'"{call.text}": low before high.')
    return calls


def apply_steps(values: Array, calls: tuple[Call, ...]) -> Array:
    """The values, float64, after all steps."""
    for call in calls:
        match call.name, call.numbers:
            case "scale", (factor,):
                values = values * factor
            case "offset", (number,):
                values = values + number
            case "normalize", (mean, std):
                values = (values - mean) / std
            case "clip", (low, high):
                values = np.clip(values, low, high)
            case "log1p", _:
                with np.errstate(invalid="ignore", divide="ignore"):
                    values = np.log1p(np.ascontiguousarray(values))
            case "abs", _:
                values = np.abs(values)
            case _:
                raise AssertionError(call.text)
    return values


def normalize(values: Array, mean: Array, std: Array) -> Array:
    """(x - mean) / std, along the last axis."""
    return np.asarray((values - mean) / std)


def encode_categories(column: str, values: Array, call: Call) -> Array:
    """Places [N, categories] or numbers [N, 1] of categories; a value that is none of them is 0 everywhere, or NaN.

    Text is compared as it is, numbers as numbers.
    """
    if values.dtype.kind in "biuf":
        try:
            wanted = np.array(call.numbers)
        except UsageError:
            text = f'column "{column}" holds numbers, its categories are {", ".join(call.arguments[:8])}.'
            raise DataError("data.dtype", text, hint="Give the column as text, or name the categories by number.") from None
        equal = values.reshape(-1, 1).astype(np.float64) == wanted
    else:
        equal = np.array([[str(value) == name for name in call.arguments] for value in values.reshape(-1).tolist()], bool)
        equal = equal.reshape(-1, len(call.arguments))
    if call.name == "one_hot":
        return np.asarray(equal, np.float64)
    return np.where(equal.any(axis=1), equal.argmax(axis=1).astype(np.float64), np.nan)[:, None]
