"""``/proc`` and ``/sys`` of machines, as far as the probe reads them, written under a folder."""

from __future__ import annotations

from pathlib import Path

_INTEL_FLAGS = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ss ht syscall nx pdpe1gb"
    " rdtscp lm constant_tsc arch_perfmon rep_good nopl xtopology cpuid tsc_known_freq pni pclmulqdq ssse3 fma cx16 pcid sse4_1"
    " sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand hypervisor lahf_lm abm 3dnowprefetch fsgsbase bmi1 avx2 smep bmi2"
)
_ZEN4_FLAGS = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht syscall nx mmxext lm"
    " constant_tsc rep_good nopl cpuid pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand"
    " lahf_lm abm sse4a bmi1 avx2 bmi2 avx512f avx512dq avx512ifma avx512cd sha_ni avx512bw avx512vl avx512_bf16 avx512vbmi"
    " avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg avx512_vpopcntdq"
)
INTEL_AVX2 = {"model name": "Intel(R) Core(TM) i5-6500 CPU @ 3.20GHz", "flags": _INTEL_FLAGS}
AMD_ZEN4 = {"model name": "AMD EPYC 9R14", "flags": _ZEN4_FLAGS}
INTEL_GOLDMONT = {
    "model name": "Intel(R) Celeron(R) CPU J3455 @ 1.50GHz",
    "flags": "fpu vme de lm sse sse2 ssse3 cx16 sse4_1 sse4_2 movbe popcnt aes xsave rdrand",
}
CORTEX_A72 = {
    "BogoMIPS": "108.00",
    "Features": "fp asimd evtstrm crc32 cpuid",
    "CPU implementer": "0x41",
    "CPU architecture": "8",
    "CPU variant": "0x0",
    "CPU part": "0xd08",
    "CPU revision": "3",
}
CORTEX_A76 = CORTEX_A72 | {
    "Features": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    "CPU part": "0xd0b",
    "CPU variant": "0x4",
}
CORTEX_A55 = CORTEX_A76 | {"CPU part": "0xd05"}
CORTEX_A53 = CORTEX_A72 | {"CPU part": "0xd03"}
CORTEX_A53_32_BIT = CORTEX_A53 | {
    "Features": "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm crc32"
}

PI_4 = "Raspberry Pi 4 Model B Rev 1.5"
PI_5 = "Raspberry Pi 5 Model B Rev 1.0"


def write_machine(
    root: Path,
    *cores: dict[str, str],
    model: str = "",
    ram_kb: int = 3_885_396,
    max_khz: int | None = None,
    files: dict[str, str] | None = None,
) -> Path:
    """Write a machine of the given cores; ``files`` are further texts by path."""
    blocks = [
        "\n".join([f"processor\t: {i}", *(f"{key}\t: {value}" for key, value in core.items())]) for i, core in enumerate(cores)
    ]
    texts = {
        "proc/cpuinfo": "\n\n".join(blocks) + "\n",
        "proc/meminfo": f"MemTotal:       {ram_kb} kB\nMemFree:          100000 kB\n",
        **(files or {}),
    }
    if model:
        texts["proc/device-tree/model"] = model + "\0"
    if max_khz:
        texts["sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"] = f"{max_khz}\n"
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root
