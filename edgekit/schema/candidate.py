"""A candidate: one form of the model, how it was made, what it measured, and the verdict."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from edgekit.schema.artifact import ModelArtifact
from edgekit.schema.base import SCHEMA_VERSION, Record, Scalar
from edgekit.schema.contract import Contract
from edgekit.schema.digest import Digest
from edgekit.schema.measurement import EvalReport, LatencyReport

Quantity = Literal["latency_ms", "size_mb", "ram_mb", "drop", "value"]
Status = Literal["chosen", "passed", "missed", "failed"]


class PassStep(Record, frozen=True, kw_only=True):
    """One pass of the lineage: from ``parent`` to ``output`` (artifact digests), with settings and tool versions."""

    name: str
    settings: dict[str, Scalar]
    parent: Digest | None
    output: Digest
    seconds: float
    versions: dict[str, str]
    notes: tuple[str, ...] = ()


class BudgetCheck(Record, frozen=True, kw_only=True):
    """One term of the budget: ``name`` as the user wrote it (``top1_drop``), the limit and what was measured.

    ``value`` is None when it could not be measured (a latency without the target's hardware); then ``is_met`` is False
    only where ``note`` says so.
    """

    name: str
    operator: Literal["<=", ">="]
    limit: float
    value: float | None
    is_met: bool
    note: str = ""


class Verdict(Record, frozen=True, kw_only=True):
    """``chosen``: the winner; ``passed``: meets the budget; ``missed``: does not; ``failed``: could not be made or run."""

    status: Status
    is_budget_met: bool
    reason: str
    checks: tuple[BudgetCheck, ...] = ()


class SourceModel(Record, frozen=True, kw_only=True):
    """What the user gave: the MODEL argument, the digest of its bytes (weights included) and the size."""

    spec: str
    kind: Literal["onnx", "torch"]
    digest: Digest
    size_bytes: int


class Candidate(Record, frozen=True, kw_only=True):
    """One form of the model. ``artifact`` is None only when the status is ``failed``."""

    name: str
    target: str
    target_digest: Digest
    source: SourceModel
    contract: Contract
    verdict: Verdict
    seed: int
    created_at: datetime
    edgekit_version: str
    artifact: ModelArtifact | None = None
    lineage: tuple[PassStep, ...] = ()
    evaluation: EvalReport | None = None
    latency: LatencyReport | None = None
    is_on_pareto_front: bool = False
    schema_version: int = SCHEMA_VERSION
