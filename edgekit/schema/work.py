"""Work orders, and the field samples that they are carried out with: what the fleet server hands to whoever has the compiler.

>>> WorkOrder(id=1, kind="recalibrate", model="kws").state
'open'
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record
from edgekit.schema.message import SampleTensor

WorkKind = Literal["recalibrate", "retrain", "recall"]
WorkState = Literal["open", "taken", "done", "failed"]


class WorkOrder(Record, frozen=True, kw_only=True):
    """One order."""

    id: int
    kind: WorkKind
    model: str
    manifest: str = ""
    reason: str = ""
    alert_id: int = 0
    state: WorkState = "open"
    created_ms: int = 0
    created_by: str = ""
    worker: str = ""
    taken_ms: int = 0
    lease_until_ms: int = 0
    """Until then it is the worker's, who may ask for more."""
    finished_ms: int = 0
    result: str = ""


class FieldSample(Record, frozen=True, kw_only=True):
    """One input that a device's owner agreed to give; ``label`` is empty where none came. Tensors as they travelled."""

    site: str
    device: str
    time_ms: int
    model_digest: str
    prediction_id: str
    predicted: str
    confidence: float
    label: str
    redacted: tuple[str, ...]
    """The rules that were applied on the device before it left."""
    tensors: tuple[SampleTensor, ...]


class SamplePage(Record, frozen=True, kw_only=True):
    """Samples in the order in which they are kept; ``next`` is the ``after`` of the page after this one."""

    samples: tuple[FieldSample, ...]
    next: str = ""


class SampleCount(Record, frozen=True, kw_only=True):
    """How many samples of a model there are, how many have a label, and how old they are."""

    model: str
    model_digest: str
    samples: int
    labelled: int
    first_ms: int
    last_ms: int
