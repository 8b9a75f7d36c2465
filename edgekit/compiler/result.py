"""What a run of ``optimize`` comes to: the request, the candidates with what they measured, and the verdict.

The pipeline makes an :class:`OptimizeResult`, the report writer and the command line show it. Paths inside the records are
relative to the output folder's ``candidate.json`` files; nothing here names a place on this machine but what the user typed.
"""

from __future__ import annotations

from edgekit.compiler.findings import Findings
from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.candidate import Candidate
from edgekit.schema.digest import Digest
from edgekit.schema.measurement import HostFingerprint
from edgekit.schema.target import TargetProfile


class RequestSummary(Record, frozen=True, kw_only=True):
    """The request as the user wrote it; ``budget`` is the text, or the default's where none was given."""

    model: str
    target: str
    data: str
    evaluation: str | None
    metric: str
    budget: str
    is_default_budget: bool
    effort: str
    seed: int
    threads: int
    weights: str | None = None


class DataDescription(Record, frozen=True, kw_only=True):
    """A data set of the run; ``role`` is ``calibration`` or ``evaluation``.

    ``class_counts`` has the samples of each class by label or index, where the data has labels of classes.
    """

    role: str
    source: str
    digest: Digest
    samples: int
    has_labels: bool
    class_names: tuple[str, ...] = ()
    class_counts: dict[str, int] = {}  # noqa: RUF012  msgspec copies an empty default per instance


class OpLatency(Record, frozen=True, kw_only=True):
    """Time spent in one kind of operator, per run, as the runtime's own profiler saw it on this host."""

    op_type: str
    count: int
    ms: float
    share: float


class OptimizeResult(Record, frozen=True, kw_only=True):
    """The whole outcome.

    ``candidates`` has every candidate of the plan in the plan's order, the baseline and the failed ones too; ``chosen`` and
    ``baseline`` are among them. ``op_latency`` is by candidate name and has only those that were profiled. ``findings`` is
    what the search learned about the model. ``warnings`` are sentences for people.
    """

    request: RequestSummary
    target: TargetProfile
    baseline: Candidate
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    data: tuple[DataDescription, ...]
    is_budget_met: bool
    verdict: str
    seconds: float
    host: HostFingerprint
    warnings: tuple[str, ...] = ()
    op_latency: dict[str, tuple[OpLatency, ...]] = {}  # noqa: RUF012  msgspec copies an empty default per instance
    findings: Findings = Findings()
    schema_version: int = SCHEMA_VERSION
