"""What a model may be fed and what it answers: names, types, shapes, ranges, labels."""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record
from edgekit.schema.tensor import DType, TensorSpec

Task = Literal["classification", "other"]


class InputSpec(Record, frozen=True, kw_only=True):
    """One input: ``minimum`` and ``maximum`` are the range seen in calibration data, inclusive."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    minimum: float | None = None
    maximum: float | None = None


class Contract(Record, frozen=True, kw_only=True):
    """Inputs, outputs and the meaning of the outputs."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[TensorSpec, ...]
    task: Task = "other"
    labels: tuple[str, ...] = ()
    thresholds: dict[str, float] = {}
    """By label, the score from which an answer counts; labels without one have no threshold."""
