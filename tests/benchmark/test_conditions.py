"""Conditions and pinning, on made-up machines: a folder with the files of ``/proc`` and ``/sys``."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.benchmark.conditions import judge, take_snapshot
from edgekit.benchmark.pinning import allowed_cpus, choose_cpus, pinned, read_cpu_list
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.benchmark import Conditions, CpuState, Snapshot, ThermalZone

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """Writes the files; every value as the kernel would."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def cpu(self, number: int, path: str, text: object) -> None:
        self.write(f"sys/devices/system/cpu/cpu{number}/{path}", text)

    def stat(self, *rows: tuple[float, float, float]) -> None:
        """Busy, idle and steal seconds by CPU."""
        lines = ["cpu 1 2 3 4 5 6 7 8 0 0"]
        for number, (busy, idle, steal) in enumerate(rows):
            ticks = [round(value * TICKS) for value in (busy, 0, 0, idle, 0, 0, 0, steal, 0, 0)]
            lines.append(f"cpu{number} {' '.join(map(str, ticks))}")
        self.write("proc/stat", "\n".join([*lines, "intr 12 3"]))

    def zone(self, number: int, name: str, celsius: float, **trips: float) -> None:
        folder = f"sys/class/thermal/thermal_zone{number}"
        self.write(f"{folder}/type", name)
        self.write(f"{folder}/temp", round(celsius * 1000))
        for index, (kind, value) in enumerate(trips.items()):
            self.write(f"{folder}/trip_point_{index}_type", kind)
            self.write(f"{folder}/trip_point_{index}_temp", round(value * 1000))


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def snapshot(**fields) -> Snapshot:
    return Snapshot(**({"monotonic_s": 0.0, "own_cpu_s": 0.0} | fields))


def after_ten_seconds(**fields) -> Snapshot:
    return snapshot(**({"monotonic_s": 10.0, "own_cpu_s": 10.0} | fields))


def state(cpu: int, busy: float, idle: float = 0.0, steal: float = 0.0, **fields) -> CpuState:
    return CpuState(cpu=cpu, busy_s=busy, idle_s=idle, steal_s=steal, **fields)


# --- what is read -----------------------------------------------------------------------------------------------------------


def test_snapshot_of_a_whole_machine(machine):
    machine.stat((10, 5, 1), (20, 6, 0))
    machine.cpu(0, "cpufreq/scaling_cur_freq", 1_800_000)
    machine.cpu(0, "cpufreq/scaling_governor", "ondemand")
    machine.zone(0, "cpu-thermal", 51.5, critical=110, passive=80, active=40)
    machine.write("sys/devices/platform/soc/soc:firmware/get_throttled", "50005")
    machine.write("proc/loadavg", "0.52 0.40 0.30 1/200 999")
    machine.write("proc/self/cgroup", "3:cpu:/x\n0::/user.slice")
    machine.write("sys/fs/cgroup/user.slice/cpu.stat", "usage_usec 9\nthrottled_usec 2500000")
    found = take_snapshot(machine.root)
    assert found.cpus == (state(0, 10, 5, 1, mhz=1800.0, governor="ondemand"), state(1, 20, 6, 0))
    assert found.zones == (ThermalZone(name="cpu-thermal", celsius=51.5, trip_celsius=80.0),)
    assert (found.throttled, found.load_average, found.quota_throttled_s) == (0x50005, 0.52, 2.5)


def test_machine_that_tells_nothing(machine):
    found = take_snapshot(machine.root)
    empty = msgspec.structs.replace(snapshot(), monotonic_s=found.monotonic_s, own_cpu_s=found.own_cpu_s)
    assert found == empty
    conditions = judge(found, msgspec.structs.replace(found, monotonic_s=found.monotonic_s + 10))
    assert (conditions.notes, conditions.steal_share, conditions.load_here) == ((), None, None)


def test_unused_trip_points_are_no_trip_points(machine):
    machine.zone(0, "acpitz", 27.8, critical=-273.2, passive=0)
    assert take_snapshot(machine.root).zones[0].trip_celsius is None


def test_conditions_survive_json():
    before = snapshot(cpus=(state(3, 1, 2, 3, mhz=1.5),))
    conditions = judge(before, after_ten_seconds(cpus=(state(3, 11, 2, 3),)))
    assert decode_json(encode_json(conditions), Conditions) == conditions


# --- what is said -----------------------------------------------------------------------------------------------------------


def notes(before: Snapshot, after: Snapshot, cpus: tuple[int, ...] = ()) -> str:
    return "; ".join(judge(before, after, cpus=cpus).notes)


def test_quiet_machine_gives_no_note():
    zone = ThermalZone(name="cpu", celsius=50, trip_celsius=80)
    fields = {"zones": (zone,), "throttled": 0, "quota_throttled_s": 1.0}
    steady = {"mhz": 1800.0, "governor": "performance"}
    before = snapshot(cpus=(state(0, 0), state(1, 0, **steady)), **fields)
    after = after_ten_seconds(cpus=(state(0, 1, 9), state(1, 10, **steady)), **fields)
    assert notes(before, after, (1,)) == ""


@pytest.mark.parametrize(("mhz", "is_noted"), [(1720.0, False), (1700.0, True)])
def test_clock_that_fell(mhz, is_noted):
    text = notes(snapshot(cpus=(state(1, 0, mhz=1800.0),)), after_ten_seconds(cpus=(state(1, 10, mhz=mhz),)))
    assert ("from 1800 to 1700 MHz" in text) == is_noted


def test_clock_of_another_cpu_does_not_matter():
    before = snapshot(cpus=(state(0, 0, mhz=1800.0), state(1, 0, mhz=1800.0)))
    after = after_ten_seconds(cpus=(state(0, 0, mhz=600.0), state(1, 10, mhz=1800.0)))
    assert "MHz" not in notes(before, after, (1,))
    assert "MHz" in notes(before, after, (0,))


def test_governor_that_follows_the_load():
    cpus = (state(0, 0, governor="schedutil"),)
    assert "governor schedutil, not performance" in notes(snapshot(cpus=cpus), after_ten_seconds(cpus=cpus))


@pytest.mark.parametrize(("celsius", "is_noted"), [(74.0, False), (76.0, True)])
def test_heat_near_the_trip_point(celsius, is_noted):
    zones = [(ThermalZone(name="cpu-thermal", celsius=value, trip_celsius=80.0),) for value in (60.0, celsius)]
    text = notes(snapshot(zones=zones[0]), after_ten_seconds(zones=zones[1]))
    assert ("cpu-thermal went from 60 to 76 °C" in text) == is_noted


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0x0, 0x0, []),
        (0x50000, 0x50000, []),  # long ago, since the start
        (0x0, 0x50005, ["the voltage was too low", "the processor was throttled"]),
        (0x0, 0x20000, ["the clock was capped"]),  # in between
        (0x8, 0x80000, ["it was too hot"]),
    ],
)
def test_firmware_bits_of_a_raspberry_pi(before, after, said):
    found = judge(snapshot(throttled=before), after_ten_seconds(throttled=after)).notes
    assert list(found) == [f"the firmware says that {what}" for what in said]


@pytest.mark.parametrize(("steal", "is_noted"), [(0.05, False), (0.5, True)])
def test_steal_of_the_hypervisor(steal, is_noted):
    text = notes(snapshot(cpus=(state(0, 0),)), after_ten_seconds(cpus=(state(0, 10, 0, steal),)))
    assert ("hypervisor took 4.8%" in text) == is_noted


def test_load_of_others_counts_where_the_run_is():
    before = snapshot(cpus=(state(0, 0), state(1, 0)))
    on_ours = after_ten_seconds(own_cpu_s=8.0, cpus=(state(0, 0, 10), state(1, 10)))
    assert notes(before, on_ours, (1,)) == "other processes used 0.20 of a CPU on CPU 1"
    beside = after_ten_seconds(cpus=(state(0, 9, 1), state(1, 10)))
    assert notes(before, beside, (1,)) == "other processes used 0.90 CPUs beside this run"
    little = after_ten_seconds(cpus=(state(0, 3, 7), state(1, 10)))
    assert notes(before, little, (1,)) == ""
    assert notes(before, little) == "other processes used 0.30 of a CPU meanwhile"


def test_idle_cpu_and_quota_mean_that_the_process_was_held_back():
    before = snapshot(cpus=(state(1, 0),), quota_throttled_s=1.0)
    after = after_ten_seconds(own_cpu_s=7.0, cpus=(state(1, 7, 3),), quota_throttled_s=4.0)
    assert notes(before, after, (1,)) == (
        "the CPU was idle 30% of the time: something held the process back; "
        "the CPU quota of the control group held the process back for 3.00 s"
    )


def test_shares_of_a_moment_are_no_shares():
    conditions = judge(snapshot(cpus=(state(0, 0),)), snapshot(monotonic_s=0.01, cpus=(state(0, 0.01),)))
    assert (conditions.load_here, conditions.notes) == (None, ())


# --- pinning ----------------------------------------------------------------------------------------------------------------


def test_cpu_list_as_the_kernel_writes_it():
    assert read_cpu_list("0-2,8,10-11\n") == (0, 1, 2, 8, 10, 11)
    assert read_cpu_list("") == ()


def test_fastest_cores_of_big_little(machine):
    for number, capacity in enumerate((446, 446, 446, 446, 871, 871, 1024)):
        machine.cpu(number, "cpu_capacity", capacity)
    assert choose_cpus(1, allowed=range(7), root=machine.root) == (6,)
    assert choose_cpus(3, allowed=range(7), root=machine.root) == (4, 5, 6)
    assert choose_cpus(2, allowed=(0, 1, 2), root=machine.root) == (1, 2)


def test_highest_clock_where_no_capacity_is_told(machine):
    for number, clock in enumerate((5_000_000, 3_800_000, 5_200_000)):
        machine.cpu(number, "cpufreq/cpuinfo_max_freq", clock)
    assert choose_cpus(1, allowed=range(3), root=machine.root) == (2,)
    assert choose_cpus(2, allowed=range(3), root=machine.root) == (0, 2)


def test_one_cpu_of_each_core_before_second_threads(machine):
    for number in range(4):
        machine.cpu(number, "topology/thread_siblings_list", f"{number % 2},{number % 2 + 2}")
    assert choose_cpus(2, allowed=range(4), root=machine.root) == (1, 2)
    assert choose_cpus(3, allowed=range(4), root=machine.root) == (1, 2, 3)


def test_one_package_where_it_suffices(machine):
    for number in range(6):
        machine.cpu(number, "topology/physical_package_id", number % 2)
    assert choose_cpus(2, allowed=range(6), root=machine.root) == (2, 4)


def test_fewer_are_chosen_only_where_fewer_are_allowed(machine):
    assert choose_cpus(8, allowed=(3, 5), root=machine.root) == (3, 5)


def test_mask_is_restored_after_an_error():
    before = allowed_cpus()
    inside: list[object] = []

    def fail() -> None:
        with pinned(choose_cpus(1, allowed=before)) as cpus:
            inside.extend([frozenset(cpus), allowed_cpus()])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside[0] == inside[1]
    assert len(inside[0]) == 1
    assert allowed_cpus() == before


def test_nothing_to_pin_changes_nothing():
    before = allowed_cpus()
    with pinned(()) as cpus:
        assert (cpus, allowed_cpus()) == ((), before)


def tasks_of_this_process() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def test_threads_of_the_runtime_stay_on_the_pinned_cpus(sample_dir):
    known = tasks_of_this_process()
    with pinned(choose_cpus(1, allowed=allowed_cpus())) as cpus:
        session = open_session(sample_dir / "model.onnx", options=SessionOptions(threads=3))
        session.run({"image": np.zeros((1, 1, 28, 28), np.float32)})
        masks = {task: os.sched_getaffinity(task) for task in tasks_of_this_process() - known}
        session.close()
    assert len(masks) >= 2
    assert all(mask == set(cpus) for mask in masks.values())
