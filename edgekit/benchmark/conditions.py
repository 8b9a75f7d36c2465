"""What the machine was doing while something was timed, and what of it may have moved the figures.

A :class:`~edgekit.schema.benchmark.Snapshot` is taken before and after the timed rounds, under load; :func:`judge` compares the
two. It speaks only when something matters: the thresholds are named below. What a system does not show is left out.

    >>> before = take_snapshot()           # doctest: +SKIP
    >>> judge(before, take_snapshot(), cpus=(1,)).notes  # doctest: +SKIP
    ('the clock fell 23 %, from 1800 to 1391 MHz',)
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from edgekit.schema.benchmark import Conditions, CpuState, Snapshot, ThermalZone

Pair = tuple[CpuState, CpuState]
ROOT = Path("/")
CLOCK_FALL = 0.05
TRIP_MARGIN_CELSIUS = 5.0
LOWEST_TRIP_CELSIUS = 30.0
"""Firmware writes trip points of 0 or below for those that it does not use."""
MAX_STEAL = 0.01
MAX_IDLE = 0.1
MAX_LOAD_HERE = 0.1
MAX_LOAD_ELSEWHERE = 0.5
"""Other processes on CPUs that the run does not use share only caches, memory and clock with it."""
STEADY_GOVERNOR = "performance"
SHORTEST_SECONDS = 0.1
"""The kernel counts in hundredths of a second: shares of less are no shares."""
_THROTTLED = Path("sys/devices/platform/soc/soc:firmware/get_throttled")
_FIRMWARE = {0: "the voltage was too low", 1: "the clock was capped", 2: "the processor was throttled", 3: "it was too hot"}
_SINCE_BOOT = 16
_TRIPS = {"passive", "hot", "critical"}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path, scale: float) -> float | None:
    text = _read(path)
    return int(text) * scale if text.lstrip("-").isdigit() else None


def _cpus(root: Path) -> Iterator[CpuState]:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    for line in _read(root / "proc/stat").splitlines():
        name, *fields = line.split() or [""]
        number = name.removeprefix("cpu")
        if not name.startswith("cpu") or not number.isdigit() or len(fields) < 8:
            continue
        user, nice, system, idle, iowait, irq, softirq, steal = (int(field) * tick for field in fields[:8])
        folder = root / f"sys/devices/system/cpu/{name}/cpufreq"
        yield CpuState(
            cpu=int(number),
            busy_s=user + nice + system + irq + softirq,
            idle_s=idle + iowait,
            steal_s=steal,
            mhz=_number(folder / "scaling_cur_freq", 1e-3),
            governor=_read(folder / "scaling_governor") or None,
        )


def _zones(root: Path) -> Iterator[ThermalZone]:
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        celsius = _number(folder / "temp", 1e-3)
        if celsius is None:
            continue
        kinds = {path: _read(path) for path in folder.glob("trip_point_*_type")}
        trips = [_number(path.with_name(path.name.replace("_type", "_temp")), 1e-3) for path in kinds if kinds[path] in _TRIPS]
        usable = [trip for trip in trips if trip is not None and trip >= LOWEST_TRIP_CELSIUS]
        yield ThermalZone(name=_read(folder / "type") or folder.name, celsius=celsius, trip_celsius=min(usable, default=None))


def _throttled(root: Path) -> int | None:
    try:
        return int(_read(root / _THROTTLED), 16)
    except ValueError:
        return None


def _quota_throttled(root: Path) -> float | None:
    """Seconds that the control group of this process, version 2, was held back by its CPU quota."""
    name = next((line[4:] for line in _read(root / "proc/self/cgroup").splitlines() if line.startswith("0::/")), "")
    for line in _read(root / "sys/fs/cgroup" / name / "cpu.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == "throttled_usec" and value.isdigit():
            return int(value) / 1e6
    return None


def take_snapshot(root: Path = ROOT) -> Snapshot:
    """What the machine says now; takes about a millisecond.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    load = _read(root / "proc/loadavg").split()
    return Snapshot(
        monotonic_s=time.monotonic(),
        own_cpu_s=time.process_time(),
        cpus=tuple(_cpus(root)),
        zones=tuple(_zones(root)),
        throttled=_throttled(root),
        load_average=float(load[0]) if load else None,
        quota_throttled_s=_quota_throttled(root),
    )


def _spent(pairs: Collection[Pair]) -> tuple[float, float, float]:
    """Seconds that some CPUs were busy, idle and taken away in between."""
    return (
        sum(new.busy_s - old.busy_s for old, new in pairs),
        sum(new.idle_s - old.idle_s for old, new in pairs),
        sum(new.steal_s - old.steal_s for old, new in pairs),
    )


def judge(before: Snapshot, after: Snapshot, *, cpus: Collection[int] = ()) -> Conditions:
    """Compare two snapshots.

    Args:
        before: taken at the first timed round.
        after: taken at the last.
        cpus: those that the run was pinned to; none where it could use all.
    """
    old = {state.cpu: state for state in before.cpus}
    pairs = [(old[state.cpu], state) for state in after.cpus if state.cpu in old]
    here = [pair for pair in pairs if pair[1].cpu in cpus] or pairs
    elsewhere = [pair for pair in pairs if pair not in here]
    seconds = after.monotonic_s - before.monotonic_s
    conditions = Conditions(before=before, after=after)
    if here and seconds >= SHORTEST_SECONDS:
        busy, idle, steal = _spent(here)
        total = busy + idle + steal or 1.0
        others = busy - (after.own_cpu_s - before.own_cpu_s)
        conditions = Conditions(
            before=before,
            after=after,
            steal_share=steal / total,
            idle_share=idle / total,
            load_here=max(0.0, others / seconds),
            load_elsewhere=_spent(elsewhere)[0] / seconds,
        )
    notes = (*_clock_notes(here), *_heat_notes(before, after), *_load_notes(conditions, cpus))
    return msgspec.structs.replace(conditions, notes=notes)


def _clock_notes(pairs: Collection[Pair]) -> Iterator[str]:
    clocks = [(old.mhz, new.mhz) for old, new in pairs if old.mhz and new.mhz]
    if clocks:
        first, last = (sum(column) / len(clocks) for column in zip(*clocks, strict=True))
        if last < first * (1 - CLOCK_FALL):
            yield f"the clock fell {1 - last / first:.0%}, from {first:.0f} to {last:.0f} MHz"
    governors = sorted({new.governor for _old, new in pairs if new.governor} - {STEADY_GOVERNOR})
    if governors:
        yield f"governor {', '.join(governors)}, not {STEADY_GOVERNOR}: the clock may follow the load"


def _heat_notes(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for old, zone in zip(before.zones, after.zones, strict=False):
        if zone.trip_celsius is not None and zone.celsius >= zone.trip_celsius - TRIP_MARGIN_CELSIUS:
            way = f"went from {old.celsius:.0f} to" if zone.celsius > old.celsius else "is at"
            yield f"{zone.name} {way} {zone.celsius:.0f} °C; at {zone.trip_celsius:.0f} °C the system slows down"
    if after.throttled:
        was = before.throttled or 0
        for bit, what in _FIRMWARE.items():
            is_now = (was | after.throttled) >> bit & 1
            is_new = (after.throttled & ~was) >> (bit + _SINCE_BOOT) & 1
            if is_now or is_new:
                yield f"the firmware says that {what}"


def _load_notes(conditions: Conditions, cpus: Collection[int]) -> Iterator[str]:
    if conditions.steal_share is not None and conditions.steal_share > MAX_STEAL:
        yield f"the hypervisor took {conditions.steal_share:.1%} of the CPU time for others"
    if conditions.load_here is not None and conditions.load_here > MAX_LOAD_HERE:
        where = f"on CPU {', '.join(map(str, sorted(cpus)))}" if cpus else "meanwhile"
        yield f"other processes used {conditions.load_here:.2f} of a CPU {where}"
    if conditions.load_elsewhere is not None and conditions.load_elsewhere > MAX_LOAD_ELSEWHERE:
        yield f"other processes used {conditions.load_elsewhere:.2f} CPUs beside this run"
    if len(cpus) == 1 and conditions.idle_share is not None and conditions.idle_share > MAX_IDLE:
        yield f"the CPU was idle {conditions.idle_share:.0%} of the time: something held the process back"
    old, new = conditions.before.quota_throttled_s, conditions.after.quota_throttled_s
    if old is not None and new is not None and new > old:
        yield f"the CPU quota of the control group held the process back for {new - old:.2f} s"
