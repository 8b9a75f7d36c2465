"""The probe on recorded machines, and on this one."""

from __future__ import annotations

import os

import msgspec
import pytest
from recorded_machines import (
    AMD_ZEN4,
    CORTEX_A53,
    CORTEX_A53_32_BIT,
    CORTEX_A55,
    CORTEX_A72,
    CORTEX_A76,
    INTEL_AVX2,
    INTEL_GOLDMONT,
    PI_4,
    PI_5,
    write_machine,
)

from edgekit.errors import EnvironmentFault
from edgekit.target.load import list_targets, load_target
from edgekit.target.probe import host_isa, is_host, probe_target, ram_mb


def matches(root) -> list[str]:
    """The shipped profiles that a machine is."""
    return [profile.name for profile in list_targets() if is_host(profile, root=root)]


def test_raspberry_pi_4(tmp_path):
    root = write_machine(tmp_path, *[CORTEX_A72] * 4, model=PI_4, max_khz=1_800_000)
    profile = probe_target("mine", root=root)
    assert (profile.name, profile.arch, profile.cpu) == ("mine", "aarch64", "Cortex-A72")
    assert (profile.isa, profile.cores, profile.clock_mhz) == (("neon",), 4, 1800.0)
    assert (profile.device_model, profile.title) == (PI_4, PI_4)
    assert profile.ram_mb == pytest.approx(3978.6, abs=0.1)
    assert (profile.int8.activations, profile.int8.weights, profile.int8.reduce_range) == ("int8", "int8", False)
    assert matches(root) == ["raspberry-pi-4"]


def test_raspberry_pi_5(tmp_path):
    root = write_machine(tmp_path, *[CORTEX_A76] * 4, model=PI_5)
    assert host_isa(root) == ("neon", "dotprod", "fp16")
    assert matches(root) == ["raspberry-pi-5"]


def test_intel_with_avx2(tmp_path):
    root = write_machine(tmp_path, *[INTEL_AVX2] * 4)
    profile = probe_target(root=root)
    assert profile.isa == ("sse4_2", "avx", "avx2", "fma")
    assert profile.cpu == "Intel(R) Core(TM) i5-6500 CPU @ 3.20GHz"
    assert (profile.int8.activations, profile.int8.weights, profile.int8.reduce_range) == ("uint8", "int8", True)
    assert profile.channel_multiple == 8
    assert matches(root) == ["x86-64-avx2"]


def test_amd_with_avx512_vnni(tmp_path):
    root = write_machine(tmp_path, *[AMD_ZEN4] * 2)
    profile = probe_target(root=root)
    assert profile.isa == ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni")
    assert (profile.int8.reduce_range, profile.channel_multiple) == (False, 16)
    assert matches(root) == ["x86-64-avx512-vnni"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (AMD_ZEN4["flags"] + " avx_vnni", ["x86-64-avx512-vnni"]),  # the wider kernels are taken: no difference
        (AMD_ZEN4["flags"] + " amx_int8", []),
        (AMD_ZEN4["flags"].replace("avx512_vnni", ""), []),
        (INTEL_AVX2["flags"] + " avx_vnni", []),  # another int8 kernel than plain AVX2
        (INTEL_AVX2["flags"].replace("fma", ""), []),
        (INTEL_GOLDMONT["flags"], ["x86-64-sse42"]),
    ],
)
def test_one_flag_that_chooses_kernels_decides(tmp_path, flags, expected):
    assert matches(write_machine(tmp_path, {"model name": "some processor", "flags": flags})) == expected


def test_client_vnni_needs_no_reduced_range(tmp_path):
    root = write_machine(tmp_path, {**INTEL_AVX2, "flags": INTEL_AVX2["flags"] + " avx_vnni"})
    assert not probe_target(root=root).int8.reduce_range


def test_board_of_the_same_processor_is_not_the_board(tmp_path):
    root = write_machine(tmp_path, *[CORTEX_A53] * 4, model="Raspberry Pi Zero 2 W Rev 1.0")
    assert matches(root) == ["raspberry-pi-zero-2w"]
    assert not is_host(load_target("raspberry-pi-3"), root=root)
    assert not is_host(load_target("imx8m-plus-cpu"), root=root)


def test_big_and_little_cores(tmp_path):
    root = write_machine(tmp_path, *[CORTEX_A55] * 4, *[CORTEX_A76] * 4, model="Radxa ROCK 5B")
    assert probe_target(root=root).cpu == "Cortex-A55 + Cortex-A76"
    assert matches(root) == ["rockchip-rk3588"]


def test_flags_are_those_that_every_core_has(tmp_path):
    assert host_isa(write_machine(tmp_path, CORTEX_A53, CORTEX_A76)) == ("neon",)


def test_probed_profile_is_its_own_machine_and_no_other(tmp_path):
    mine = write_machine(tmp_path / "mine", INTEL_AVX2)
    other = write_machine(tmp_path / "other", {**INTEL_AVX2, "model name": "AMD Ryzen 7 5700X 8-Core Processor"})
    profile = probe_target(root=mine)
    assert is_host(profile, root=mine)
    assert not is_host(profile, root=other)


def test_32_bit_arm_is_refused(tmp_path):
    with pytest.raises(EnvironmentFault) as caught:
        probe_target(root=write_machine(tmp_path, CORTEX_A53_32_BIT))
    assert caught.value.code == "target.unknown_machine"


def test_unknown_arm_part_keeps_its_number(tmp_path):
    assert probe_target(root=write_machine(tmp_path, {**CORTEX_A76, "CPU part": "0xfff"})).cpu == "ARM part 0xfff"


@pytest.mark.parametrize(
    ("files", "megabytes"),
    [
        ({}, 3978.6),
        ({"sys/fs/cgroup/memory.max": "512000000\n"}, 512.0),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 3978.6),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 3978.6),
        (
            {
                "proc/self/cgroup": "0::/system.slice/edgekit.service\n",
                "sys/fs/cgroup/system.slice/edgekit.service/memory.max": "max\n",
                "sys/fs/cgroup/system.slice/memory.max": "256000000\n",
            },
            256.0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "128000000\n",
            },
            128.0,
        ),
    ],
)
def test_memory_limit_of_the_control_groups(tmp_path, files, megabytes):
    root = write_machine(tmp_path, *[CORTEX_A72] * 4, files=files)
    assert ram_mb(root) == pytest.approx(megabytes, abs=0.1)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "900000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "1:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_processor_quota_of_the_control_groups(tmp_path, files, cores):
    assert probe_target(root=write_machine(tmp_path, *[CORTEX_A72] * 4, files=files)).cores == cores


def test_this_machine_is_itself():
    profile = probe_target()
    assert is_host(profile)
    assert profile.isa == host_isa()
    assert 1 <= profile.cores <= (os.cpu_count() or 1)
    assert profile.ram_mb > 0
    assert not is_host(msgspec.structs.replace(profile, cpu="another processor", device_model="another board"))
    other = "aarch64" if profile.arch == "x86-64" else "x86-64"
    assert not is_host(msgspec.structs.replace(profile, arch=other))
