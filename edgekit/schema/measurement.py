"""What was measured, on which machine, with which data."""

from __future__ import annotations

from edgekit.schema.base import Record
from edgekit.schema.digest import Digest


class HostFingerprint(Record, frozen=True, kw_only=True):
    """The machine and software that a number was measured on."""

    arch: str
    cpu: str
    isa: tuple[str, ...]
    cores: int
    ram_mb: float
    os: str
    python: str
    runtime: str
    runtime_version: str
    governor: str | None = None


class LatencyReport(Record, frozen=True, kw_only=True):
    """Latency of one model, batch of one request, milliseconds.

    ``is_on_target`` is true only when the host matches the target profile; else the figures are the host's, not the target's.
    ``ratio`` compares with the baseline of the same interleaved run (below 1 is faster), with a 95 % bootstrap interval of
    the ratio of medians; a ratio whose interval holds 1, or that is nearer to 1 than ``noise`` is a tie.
    """

    host: HostFingerprint
    is_on_target: bool
    threads: int
    warmup_runs: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    p50_low_ms: float
    p50_high_ms: float
    noise: float
    """Relative noise floor: the 97.5 % bootstrap bound of |median(A) / median(A') - 1|, the baseline against a second session
    of itself in the same run."""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    peak_rss_mb: float | None = None
    is_settled: bool = True
    """False when the warm-up ran out of time before the median settled."""


class EvalReport(Record, frozen=True, kw_only=True):
    """Quality of one model on one data set.

    ``value`` and ``baseline`` are in the metric's unit; ``drop`` is baseline - value for metrics where higher is better,
    value - baseline otherwise: a positive drop is always worse. ``extra`` has further figures by name
    (``agreement``, ``sqnr_db``, ``balanced_accuracy``, ...).
    """

    metric: str
    value: float
    baseline: float
    drop: float
    is_higher_better: bool
    samples: int
    data: Digest
    isa: tuple[str, ...]
    """Instruction set that the evaluation ran on: int8 results differ between them."""
    drop_low: float | None = None
    drop_high: float | None = None
    """95 % paired bootstrap interval of the drop, where the metric is a mean over samples."""
    extra: dict[str, float] = {}
    per_class: dict[str, float] = {}
