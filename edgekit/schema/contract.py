"""What a model may be fed and what it answers: names, types, shapes, ranges, categories, labels; what is done with the rest.

Every reaction has a default that asks for nothing new: a missing value (NaN) is refused, a value outside the range passes and
is counted. A column's field that is None is the input's.

    >>> ColumnSpec(name="temperature", minimum=-40, maximum=85, out_of_range="clip").missing is None
    True
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record
from edgekit.schema.tensor import DType, TensorSpec

Task = Literal["classification", "other"]
OnRange = Literal["reject", "clip", "pass"]
"""A value outside minimum..maximum: refuse the request, take the nearest bound, or only count it."""
OnMissing = Literal["reject", "impute", "pass"]
"""NaN, or the declared missing value: refuse the request, put ``fill`` in its place, or give it to the model and count it."""
OnUnknown = Literal["reject", "impute", "pass"]
"""A value that is none of the categories: as for a missing one."""
Action = Literal["reject", "clip", "impute", "pass"]


class ColumnSpec(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One place on the last axis of a tabular input. None: as the input says."""

    name: str
    minimum: float | None = None
    maximum: float | None = None
    out_of_range: OnRange | None = None
    missing: OnMissing | None = None
    missing_value: float | None = None
    """Means missing, beside NaN: for example -999."""
    fill: float | None = None
    """What is put in the place of a missing value or an unknown category."""
    categories: tuple[float, ...] = ()
    """The only values there are; empty: any."""
    unknown: OnUnknown | None = None
    missing_share: float = 0.0
    """Of the values that the contract was learned from."""


class InputSpec(Record, frozen=True, kw_only=True):
    """One input: ``minimum`` and ``maximum`` are the range seen in calibration data, inclusive."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    minimum: float | None = None
    maximum: float | None = None
    out_of_range: OnRange = "pass"
    missing: OnMissing = "reject"
    missing_value: float | None = None
    fill: float | None = None
    categories: tuple[float, ...] = ()
    unknown: OnUnknown = "pass"
    missing_share: float = 0.0
    columns: tuple[ColumnSpec, ...] = ()
    """Of the last axis, in order, all of them; empty: every value is under the input's own rules."""


class Contract(Record, frozen=True, kw_only=True):
    """Inputs, outputs and the meaning of the outputs."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[TensorSpec, ...]
    task: Task = "other"
    labels: tuple[str, ...] = ()
    thresholds: dict[str, float] = {}
    """By label, the score from which an answer counts; labels without one have no threshold."""
    violation_share: float | None = None
    """An event is raised when more than this share of a while's samples broke the contract; None: the agent's default."""
