"""One request for any model: random values of the right types and shapes, or given arrays fitted to another model's inputs.

>>> from edgekit.schema.tensor import TensorSpec
>>> make_request([TensorSpec(name="x", dtype="float32", shape=("batch", 3))], batch=2)["x"].shape
(2, 3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgekit.errors import DataError
from edgekit.runtime.session import Array
from edgekit.schema.tensor import TensorSpec

_BYTES = ("int8", "uint8")


def shape_of(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """The input's shape in a request: a free axis 0 takes the batch, other free axes one."""
    return tuple(axis if isinstance(axis, int) else batch if i == 0 else 1 for i, axis in enumerate(spec.shape))


def make_request(inputs: Sequence[TensorSpec], *, batch: int = 1, seed: int = 0) -> dict[str, Array]:
    """Random inputs: floats in 0..1, bytes over their whole range, other integers 0 or 1 (they may be indices).

    Args:
        inputs: the model's inputs.
        batch: samples, where axis 0 is free.
        seed: draws the values.
    """
    generator = np.random.default_rng(seed)
    request: dict[str, Array] = {}
    for spec in inputs:
        shape = shape_of(spec, batch)
        if spec.dtype.startswith("float"):
            request[spec.name] = generator.random(shape, np.float32).astype(spec.dtype)
        elif spec.dtype in _BYTES:
            bounds = np.iinfo(spec.dtype)
            request[spec.name] = generator.integers(bounds.min, bounds.max + 1, shape).astype(spec.dtype)
        else:
            request[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return request


def take_samples(arrays: Mapping[str, Array], inputs: Sequence[TensorSpec], *, batch: int = 1) -> dict[str, Array]:
    """The first samples as one request, from the start again where there are too few.

    Args:
        arrays: samples along axis 0, by input name.
        inputs: the model's inputs; a fixed axis 0 decides how many samples it takes.
        batch: samples, where axis 0 is free.
    """
    request = {}
    for spec in inputs:
        values = arrays[spec.name]
        count = shape_of(spec, batch)[0] if spec.shape else 1
        request[spec.name] = np.ascontiguousarray(values[np.arange(count) % len(values)])
    return request


def fit_request(
    request: Mapping[str, Array], inputs: Sequence[TensorSpec], *, name: str, batch: int = 1
) -> tuple[dict[str, Array], bool]:
    """The same request for another model, whose inputs may have other names, types or an other order of axes.

    Inputs are matched by name where the names are the same, else by position. Where type and shape agree the values are kept;
    where they do not (an int8 form, channels last) random values of the same number take their place: time hardly depends on
    values.

    Args:
        request: the request of the first model.
        inputs: the inputs of the other.
        name: the other model, for the message.
        batch: samples, where axis 0 is free.

    Returns:
        The request, and whether all values are the same.

    Raises:
        DataError: ``benchmark.inputs_differ`` when it takes another number of inputs or of elements.
    """
    is_by_name = {spec.name for spec in inputs} == set(request)
    given = [request[spec.name] for spec in inputs] if is_by_name else list(request.values())
    hint = "Compare models that take the same input."
    if len(given) != len(inputs):
        message = (
            f"{name}: it takes {len(inputs)} inputs, the first model takes {len(given)}; one request must fit every model."
        )
        raise DataError("benchmark.inputs_differ", message, hint=hint)
    fitted = make_request(inputs, batch=batch)
    is_same = True
    for spec, values in zip(inputs, given, strict=True):
        made = fitted[spec.name]
        if values.size != made.size:
            message = (
                f"{name}: input {spec.name!r} takes {list(made.shape)}, the first model takes {list(values.shape)};"
                " one request must fit both."
            )
            raise DataError("benchmark.inputs_differ", message, hint=hint)
        if values.shape == made.shape and values.dtype == made.dtype:
            fitted[spec.name] = values
        else:
            is_same = False
    return fitted, is_same
