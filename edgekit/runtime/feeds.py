"""Check feeds against a model's inputs, the same for every runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgekit.errors import DataError
from edgekit.runtime.session import Array
from edgekit.schema.tensor import TensorSpec


def check_feeds(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec], *, name: str) -> None:
    """Refuse feeds that do not fit.

    Args:
        feeds: arrays by input name.
        inputs: the model's inputs; axes with a name take any length.
        name: the model, for the message.

    Raises:
        DataError: ``data.missing_input``, ``data.unknown_input``, ``data.dtype`` or ``data.shape``.
    """
    names = [spec.name for spec in inputs]
    if unknown := [given for given in feeds if given not in names]:
        raise DataError(
            "data.unknown_input", f"{name}: there is no input {unknown[0]!r}.", hint=f"Its inputs are {', '.join(names)}."
        )
    for spec in inputs:
        value = feeds.get(spec.name)
        if value is None:
            raise DataError("data.missing_input", f"{name}: input {spec.name!r} is missing.", hint=f"Feed {', '.join(names)}.")
        if value.dtype != np.dtype(spec.dtype):
            message = f"{name}: input {spec.name!r} is {value.dtype}, expected {spec.dtype}."
            raise DataError("data.dtype", message, hint=f"Convert it to {spec.dtype} where it is made.")
        fits = len(value.shape) == len(spec.shape) and all(
            isinstance(axis, str) or axis == length for axis, length in zip(spec.shape, value.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(str(axis) for axis in spec.shape)
            message = f"{name}: input {spec.name!r} has shape {list(value.shape)}, expected [{expected}]."
            raise DataError("data.shape", message, hint="Axis 0 is the batch; check the order of the axes.")
