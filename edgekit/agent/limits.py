"""How much a model may use while it proves itself: memory, processor time, latency.

Pure, except for the functions that a worker calls on itself.

The memory budget is of the whole process (``VmHWM``), as it is measured when a release is packed. It is watched from outside;
the kernel's limit on data behind it stops what grows faster than anybody can watch.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.agent.link import Ceiling
from edgekit.agent.plan import DeviceFacts
from edgekit.schema.manifest import Manifest, Variant
from edgekit.schema.measurement import LatencyReport

MEGA = 1e6
DATA_SLACK = 2.0
"""The kernel counts what is reserved, not what is touched: the hard limit lies above the watched one by this factor."""
LATENCY_SLACK_MS = 10.0
"""Below this difference a latency says more of the moment than of the model."""
CPU_SHARE = 2.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a self-test may take. 0: not limited, for want of a measure."""

    ram_mb: float = 0.0
    ram_reason: str = ""
    latency_ms: float = 0.0
    latency_reason: str = ""

    def ceiling(self, *, timeout_s: float) -> Ceiling:
        """The limits that the kernel keeps."""
        return Ceiling(data_bytes=int(self.ram_mb * MEGA * DATA_SLACK), cpu_s=timeout_s * CPU_SHARE)


def needed_ram_mb(manifest: Manifest, variant: Variant) -> float:
    """Memory that a process with this variant takes, as the release says; 0 when it does not say."""
    if variant.requires.ram_mb is not None:
        return variant.requires.ram_mb
    report = _report_of(manifest, variant)
    return (report.peak_rss_mb or 0.0) if report else 0.0


def _report_of(manifest: Manifest, variant: Variant) -> LatencyReport | None:
    """What was measured of a variant: the manifest embeds the first one's."""
    return manifest.candidate.latency if manifest.variants and manifest.variants[0].name == variant.name else None


def make_budget(
    manifest: Manifest,
    variant: Variant,
    facts: DeviceFacts,
    *,
    active_ms: float,
    free_mb: float,
    ram_factor: float,
    ram_limit_mb: float,
    latency_factor: float,
    latency_limit_ms: float,
) -> Budget:
    """The budget of one self-test.

    Args:
        manifest: of the release.
        variant: that this device took.
        facts: of this device.
        active_ms: golden latency of the model that serves now; 0 for none.
        free_mb: memory that programs can still have; NaN where it is not known.
        ram_factor: over what the release says that it needs.
        ram_limit_mb: a limit from the configuration; 0 for none.
        latency_factor: over what the release or the active model reached.
        latency_limit_ms: a limit from the configuration; 0 for none.
    """
    ram_mb, why = _ram(needed_ram_mb(manifest, variant), free_mb, ram_factor, ram_limit_mb)
    latency, because = _latency(_report_of(manifest, variant), facts, active_ms, latency_factor, latency_limit_ms)
    return Budget(ram_mb=ram_mb, ram_reason=why, latency_ms=latency, latency_reason=because)


def _ram(needed: float, free_mb: float, factor: float, limit_mb: float) -> tuple[float, str]:
    if limit_mb:
        return limit_mb, "the configured limit"
    if needed and factor:
        return needed * factor, f"{factor:g} times the {needed:g} MB that the release says it needs"
    if free_mb == free_mb and free_mb > 0:  # noqa: PLR0124 - not NaN
        return free_mb, "what was free on this device"
    return 0.0, ""


def _latency(
    report: LatencyReport | None, facts: DeviceFacts, active_ms: float, factor: float, limit_ms: float
) -> tuple[float, str]:
    if limit_ms:
        return limit_ms, "the configured limit"
    if not factor:
        return 0.0, ""
    if report is not None and (report.host.arch, report.host.cpu) == (facts.arch, facts.cpu) and report.host.cpu:
        return max(
            report.p50_ms * factor, report.p50_ms + LATENCY_SLACK_MS
        ), f"{factor:g} times the {report.p50_ms:g} ms that were measured on such a device"
    if active_ms:
        return max(
            active_ms * factor, active_ms + LATENCY_SLACK_MS
        ), f"{factor:g} times the {active_ms:.3g} ms of the model that serves"
    return 0.0, ""


def apply_ceiling(ceiling: Ceiling) -> None:
    """Limit this process; only the soft limits are set, so that they can be lifted again."""
    for kind, value in _wanted(ceiling).items():
        _, hard = resource.getrlimit(kind)
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (soft, hard))


def lift_ceiling(ceiling: Ceiling) -> None:
    """End the limits of :func:`apply_ceiling`."""
    for kind in _wanted(ceiling):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (hard, hard))


def _wanted(ceiling: Ceiling) -> Mapping[int, int]:
    wanted = {}
    if ceiling.data_bytes:
        wanted[resource.RLIMIT_DATA] = _own_data_bytes() + ceiling.data_bytes
    if ceiling.cpu_s:
        used = resource.getrusage(resource.RUSAGE_SELF)
        wanted[resource.RLIMIT_CPU] = int(used.ru_utime + used.ru_stime + ceiling.cpu_s) + 1
    return wanted


def _own_data_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)


def peak_rss_mb() -> float:
    """The high-water mark of this process's memory; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / MEGA for line in lines if line.startswith("VmHWM:")), 0.0)
