"""The profile of the machine that this runs on, from ``/proc`` and ``/sys``.

Every function takes the root folder, so that recorded machines can be read as well as this one.

A host *is* a target when a latency measured here may be called measured on the target: the architectures are equal, the flags
that choose kernels are exactly equal (more is not the same: VNNI changes the int8 kernels), and the processor is the profile's:

- a profile with a ``device_model`` (a board) wants that text in what the firmware says;
- one whose ``cpu`` starts with ``generic`` (a class of x86-64 machines) wants no more than the instruction set;
- any other, a probed one too, wants the same processor by name.

AVX-VNNI beside AVX512-VNNI makes no difference: the wider kernels are taken.

    >>> is_host(probe_target())
    True
"""

from __future__ import annotations

import os
from pathlib import Path

from edgekit.errors import EnvironmentFault
from edgekit.schema.target import Arch, Int8Rules, TargetProfile

ROOT = Path("/")
X86_FLAGS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
ARM_FLAGS = {"asimd": "neon", "neon": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "asimdhp": "fp16", "sve": "sve"}
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}
ISA_FLAGS: dict[Arch, tuple[str, ...]] = {
    "x86-64": X86_FLAGS,
    "aarch64": tuple(dict.fromkeys(ARM_FLAGS.values())),
    "armv7e-m": ("dsp", "fpv4", "fpv5"),
}
"""The flags that choose kernels, by architecture."""
_ARCHES: dict[str, Arch] = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}
GENERIC = "generic "
_AVX512_CHANNELS = 16
_CHANNELS = 8
_UNLIMITED_BYTES = 1 << 60


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo(root: Path) -> dict[str, list[str]]:
    """Every value of every key of /proc/cpuinfo, in order."""
    fields: dict[str, list[str]] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if value:
            fields.setdefault(key.strip(), []).append(value.strip())
    return fields


def _arch(fields: dict[str, list[str]]) -> Arch:
    if "flags" in fields:
        return "x86-64"
    if "CPU implementer" in fields:
        if any("asimd" in features.split() for features in fields.get("Features", [])):
            return "aarch64"
        machine = "32-bit ARM"
    else:
        machine = os.uname().machine.lower()
    if machine not in _ARCHES:
        raise EnvironmentFault(
            "target.unknown_machine", f"{machine}: edgekit does not know this architecture.", hint="Write a profile by hand."
        )
    return _ARCHES[machine]


def _isa(fields: dict[str, list[str]], arch: Arch) -> tuple[str, ...]:
    if arch == "x86-64":
        have = set(fields.get("flags", [""])[0].split())
        return tuple(flag for flag in X86_FLAGS if flag in have)
    every_core = [set(features.split()) for features in fields.get("Features", ["asimd"])]
    have = set.intersection(*every_core)  # threads move between big and little cores
    return tuple(dict.fromkeys(name for flag, name in ARM_FLAGS.items() if flag in have))


def _cpu_name(fields: dict[str, list[str]], arch: Arch) -> str:
    if arch == "x86-64":
        return " ".join(fields.get("model name", ["unknown x86-64"])[0].split())
    parts = dict.fromkeys(fields.get("CPU part", []))
    return " + ".join(ARM_PARTS.get(part, f"ARM part {part}") for part in parts) or "unknown ARM"


def host_isa(root: Path = ROOT) -> tuple[str, ...]:
    """The instruction-set flags that choose kernels, as target profiles name them."""
    fields = _cpuinfo(root)
    return _isa(fields, _arch(fields))


def device_model(root: Path = ROOT) -> str:
    """What the firmware calls the board (``Raspberry Pi 4 Model B Rev 1.5``); empty where it says nothing."""
    return _read(root / "proc/device-tree/model").rstrip("\0\n ")


def _cgroups(root: Path) -> list[Path]:
    """The folders of our control groups, each from its own up to the top; version 2 and version 1."""
    folders: dict[Path, None] = {}
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _number, controllers, name = (*line.split(":", 2), "", "")[:3]
        bases = [root / "sys/fs/cgroup" / part for part in (controllers.split(",") if controllers else ("", "unified"))]
        parts = [part for part in name.split("/") if part not in {"", ".."}]
        for base in bases:
            folders |= dict.fromkeys(base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))
    return list(folders)


def _cpu_quota(root: Path) -> int | None:
    """Whole processors that our control groups allow; None where nothing is said."""
    quotas = []
    for folder in _cgroups(root):
        limit, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not period:
            limit, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if limit.isdigit() and period.isdigit() and int(period):
            quotas.append(max(1, int(limit) // int(period)))
    return min(quotas, default=None)


def ram_mb(root: Path = ROOT) -> float:
    """Memory that this machine, or the container it is, may use: megabytes."""
    total = _UNLIMITED_BYTES
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    for folder in _cgroups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit():
                total = min(total, int(text))
    return round(total / 1e6, 1) if total < _UNLIMITED_BYTES else 0.0


def _cores(fields: dict[str, list[str]], root: Path) -> int:
    """Processors that we may use: the affinity mask (on a recorded machine its list of processors), less a group's quota."""
    count = len(os.sched_getaffinity(0)) if root == ROOT else max(1, len(fields.get("processor", ["0"])))
    quota = _cpu_quota(root)
    return count if quota is None else min(count, quota)


def _clock_mhz(root: Path) -> float | None:
    text = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    return int(text) / 1000 if text.isdigit() else None


def int8_rules(arch: Arch, isa: tuple[str, ...]) -> Int8Rules:
    """The int8 form that ONNX Runtime's kernels want on an instruction set.

    x86-64 multiplies unsigned activations with signed weights; without VNNI the products of a pair saturate in int16, which
    7-bit weights avoid. ARM multiplies signed with signed.
    """
    if arch == "x86-64":
        has_vnni = bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(isa))
        return Int8Rules(weights="int8", activations="uint8", activation_symmetric=False, reduce_range=not has_vnni)
    return Int8Rules(weights="int8", activations="int8", activation_symmetric=False, reduce_range=False)


def probe_target(name: str = "this-machine", *, root: Path = ROOT) -> TargetProfile:
    """The profile of a machine.

    Args:
        name: the profile's name.
        root: where its ``proc`` and ``sys`` are.

    Raises:
        EnvironmentFault: ``target.unknown_machine`` for an architecture that edgekit does not know.
    """
    fields = _cpuinfo(root)
    arch = _arch(fields)
    isa = _isa(fields, arch)
    cores = _cores(fields, root)
    model = device_model(root)
    clock_mhz = _clock_mhz(root)
    return TargetProfile(
        name=name,
        title=model or f"This machine ({_cpu_name(fields, arch)})",
        arch=arch,
        cpu=_cpu_name(fields, arch),
        isa=isa,
        cores=cores,
        ram_mb=ram_mb(root),
        runtime="onnxruntime",
        int8=int8_rules(arch, isa),
        channel_multiple=_AVX512_CHANNELS if "avx512f" in isa else _CHANNELS,
        clock_mhz=clock_mhz,
        device_model=model,
        notes="Probed on the machine itself.",
        sources={
            "cpu": "/proc/cpuinfo",
            "isa": "/proc/cpuinfo",
            "cores": "the affinity mask and the control group's quota",
            "ram_mb": "/proc/meminfo and the control group's limit",
            **({"clock_mhz": "cpufreq/cpuinfo_max_freq"} if clock_mhz else {}),
            **({"device_model": "/proc/device-tree/model"} if model else {}),
            "runtime": "the default of edgekit",
            "int8": "derived from the instruction set",
            "channel_multiple": "the fp32 kernels' block: 16 with AVX-512, else 8",
        },
    )


def _kernel_flags(isa: tuple[str, ...]) -> frozenset[str]:
    """The flags that decide which kernels run."""
    flags = frozenset(isa)
    return flags - {"avx_vnni"} if "avx512_vnni" in flags else flags


def is_host(profile: TargetProfile, *, root: Path = ROOT) -> bool:
    """Whether the machine is the profile's hardware, as the module's docstring says."""
    fields = _cpuinfo(root)
    arch = _arch(fields)
    if profile.arch != arch or _kernel_flags(profile.isa) != _kernel_flags(_isa(fields, arch)):
        return False
    if profile.device_model:
        return profile.device_model in device_model(root)
    return profile.cpu.startswith(GENERIC) or profile.cpu == _cpu_name(fields, arch)
