"""Which machine and software a number was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from edgekit.schema.measurement import HostFingerprint
from edgekit.target.probe import probe_target

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def fingerprint(runtime: str, runtime_version: str) -> HostFingerprint:
    """This machine, with the runtime that the measurement used."""
    host = probe_target()
    try:
        governor: str | None = _GOVERNOR.read_text(encoding="ascii").strip()
    except OSError:
        governor = None
    system = os.uname()
    return HostFingerprint(
        arch=host.arch,
        cpu=host.cpu,
        isa=host.isa,
        cores=host.cores,
        ram_mb=host.ram_mb,
        os=f"{system.sysname} {system.release}",
        python=platform.python_version(),
        runtime=runtime,
        runtime_version=runtime_version,
        governor=governor,
    )
