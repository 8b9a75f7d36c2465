"""What ``edgekit benchmark`` was asked, what it found, under which conditions, and how two of its runs compare.

A :class:`BenchmarkRun` is kept as a file and read again on another day or machine, so it says everything that a fair comparison
needs: the digests of the models, the settings, the conditions, and a part of the single times.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.digest import Digest
from edgekit.schema.measurement import HostFingerprint, LatencyReport

Change = Literal["reference", "faster", "slower", "tie"]


class BenchmarkRequest(Record, frozen=True, kw_only=True):
    """What to time and how; the same request means the same protocol on any machine.

    ``models`` are paths on the machine that measures. ``baseline`` is a model's name or path, the first without it. ``data`` as
    ``edgekit`` loads data; without it values are random. ``is_pinned`` None: pin where there are more CPUs than threads.
    ``seconds`` is for each model and thread count.
    """

    models: tuple[str, ...]
    baseline: str | None = None
    data: str | None = None
    threads: tuple[int, ...] = (1,)
    batch: int = 1
    seconds: float = 2.0
    min_runs: int = 50
    seed: int = 0
    is_pinned: bool | None = None


class TimedModel(Record, frozen=True, kw_only=True):
    """One model of a run: ``name`` is what tables and reports call it; digest and size are of the file."""

    name: str
    path: str
    digest: Digest
    size_bytes: int


class ThermalZone(Record, frozen=True, kw_only=True):
    """A temperature in degrees Celsius, and the lowest trip point at which the system acts; None where it names none."""

    name: str
    celsius: float
    trip_celsius: float | None = None


class CpuState(Record, frozen=True, kw_only=True):
    """One CPU: seconds since the machine started at work, idle, and waiting for the hypervisor; its clock and governor."""

    cpu: int
    busy_s: float
    idle_s: float
    steal_s: float
    mhz: float | None = None
    governor: str | None = None


class Snapshot(Record, frozen=True, kw_only=True):
    """What the machine said at one moment; what it does not tell is empty or None.

    ``throttled`` are the Raspberry Pi firmware's bits; ``quota_throttled_s`` is how long the control group's CPU quota held its
    processes back; ``own_cpu_s`` is this process's time on all CPUs.
    """

    monotonic_s: float
    own_cpu_s: float
    cpus: tuple[CpuState, ...] = ()
    zones: tuple[ThermalZone, ...] = ()
    throttled: int | None = None
    load_average: float | None = None
    quota_throttled_s: float | None = None


class Conditions(Record, frozen=True, kw_only=True):
    """The machine before and after the timed rounds; ``notes`` say in words what may have moved the figures.

    Shares are of the time of the CPUs that the run used: ``steal_share`` taken by the hypervisor, ``idle_share`` unused. Loads
    are of other processes, in CPUs: on the CPUs of the run, and on the rest. None where the system does not tell.
    """

    before: Snapshot
    after: Snapshot
    steal_share: float | None = None
    idle_share: float | None = None
    load_here: float | None = None
    load_elsewhere: float | None = None
    notes: tuple[str, ...] = ()


class ThreadRun(Record, frozen=True, kw_only=True):
    """One interleaved run at one thread count.

    ``cpus`` are those that the process was pinned to, none where it was not. ``drift`` is the ratio of the baseline's medians
    in the second and the first half of the rounds, with a 95 % bootstrap interval. ``times_ms`` are single times by model, in
    order, of the same rounds for each, 2,000 at the most.
    """

    threads: int
    cpus: tuple[int, ...]
    reports: dict[str, LatencyReport]
    drift: float
    drift_low: float
    drift_high: float
    conditions: Conditions
    times_ms: dict[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()


class BenchmarkRun(Record, frozen=True, kw_only=True):
    """Everything that one benchmark found, as ``--save`` writes it."""

    created_at: datetime
    edgekit_version: str
    request: BenchmarkRequest
    baseline: str
    models: tuple[TimedModel, ...]
    runs: tuple[ThreadRun, ...]
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def host(self) -> HostFingerprint:
        """The machine, as the baseline's report names it."""
        return self.runs[0].reports[self.baseline].host


class ModelChange(Record, frozen=True, kw_only=True):
    """One model in two runs at one thread count.

    ``ratio`` is new over old, with a 95 % bootstrap interval: of the model's ratio to the reference where the runs share one
    (``is_corrected``), else of its times. A change inside the interval or within ``noise`` is a tie. The reference's own ratio
    is how much the machine changed between the runs.
    """

    old_name: str
    new_name: str
    threads: int
    old_p50_ms: float
    new_p50_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    noise: float
    is_corrected: bool
    is_same_file: bool
    change: Change


class RunComparison(Record, frozen=True, kw_only=True):
    """Two saved runs, model by model; ``reference`` is the model, the same file in both, that corrects for the machine."""

    changes: tuple[ModelChange, ...]
    reference: str | None
    warnings: tuple[str, ...] = ()
