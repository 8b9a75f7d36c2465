"""What ``edgekit recalibrate`` did, stage by stage: its job folder, its report, and what its bundle says of where it came from.

A copy without the fields of the job itself travels in the new release as ``recalibration.json``, so that it can always be said
which samples, of which order, made a model out of which.
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.digest import Digest

StageName = Literal["samples", "check", "data", "train", "compile", "evaluate", "pack", "publish", "rollout"]
Answer = Literal["better", "not worse", "worse", "cannot tell", "refused"]
"""``refused``: the samples were not good enough to begin with."""


class StageNote(Record, frozen=True, kw_only=True):
    """A stage that is done; ``key`` is the digest of everything that decides its result."""

    name: StageName
    key: Digest
    text: str = ""
    seconds: float = 0.0
    finished_ms: int = 0


class StreamShift(Record, frozen=True, kw_only=True):
    """How far the field lies from the baseline of the release that serves, on one stream."""

    name: str
    psi: float
    edges: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()
    """Shares by bin, of the baseline."""
    field: tuple[float, ...] = ()
    """The same of the field samples."""


class Lineage(Record, frozen=True, kw_only=True):
    """Where a recalibrated release comes from."""

    parent: str
    """``name@version`` that served, and its manifest."""
    parent_manifest: Digest
    order: int = 0
    """Of the fleet's work order; 0: none."""
    field_data: Digest | None = None
    field_samples: int = 0
    labelled: int = 0
    held_out: int = 0
    calibration_data: Digest | None = None
    old_share: float = 0.0
    """Of the calibration data."""
    trained_by: str = ""
    """The training function; empty: quantized anew only."""
    training_data: Digest | None = None


class JobRecord(Record, frozen=True, kw_only=True):
    """A job: where it stands."""

    name: str
    since_ms: int
    started_ms: int
    order: int = 0
    worker: str = ""
    stages: tuple[StageNote, ...] = ()
    schema_version: int = SCHEMA_VERSION
