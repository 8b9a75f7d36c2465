"""The profile of the machine that this runs on, from ``/proc`` and ``/sys``.

Every function takes the root folder, so that recorded machines can be read as well as this one.

A host *is* a target when a latency measured here may be called measured on the target: the architectures are equal, the flags
that choose kernels are exactly equal (more is not the same: VNNI changes the int8 kernels), and a board profile's
``device_model`` is what the firmware says. AVX-VNNI beside AVX512-VNNI makes no difference: the wider
kernels are taken. Generic x86-64 profiles have no ``device_model``: there the instruction set decides.
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
_ARCHES: dict[str, Arch] = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}
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
        return "aarch64"
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
    have = set(fields.get("Features", ["asimd"])[0].split())
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


def ram_mb(root: Path = ROOT) -> float:
    """Memory that this machine, or the container it is, may use: megabytes."""
    total = _UNLIMITED_BYTES
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / name).strip()
        if text.isdigit():
            total = min(total, int(text))
    return round(total / 1e6, 1) if total < _UNLIMITED_BYTES else 0.0


def _cores(fields: dict[str, list[str]], root: Path) -> int:
    """Processors that we may use: the affinity mask on this machine, the list of processors on a recorded one."""
    if root == ROOT:
        return len(os.sched_getaffinity(0))
    return max(1, len(fields.get("processor", ["0"])))


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
        clock_mhz=_clock_mhz(root),
        device_model=model,
        notes="Probed on the machine itself.",
        sources={
            "cpu": "/proc/cpuinfo",
            "isa": "/proc/cpuinfo",
            "ram_mb": "/proc/meminfo and the cgroup's limit",
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
    return arch == "x86-64" or profile.cpu == _cpu_name(fields, arch)
