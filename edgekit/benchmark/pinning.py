"""On which CPUs a benchmark runs: a fixed set of physical cores, the fastest ones, for as long as it lasts.

Threads inherit the mask of the thread that makes them, so a runtime's own threads stay on the chosen CPUs only when the mask is
set before the session is opened. Only the calling thread's mask changes, and it is restored whatever happens.

    >>> with pinned(choose_cpus(1, allowed=allowed_cpus())) as cpus:  # doctest: +SKIP
    ...     session = open_session(path)
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/")


def allowed_cpus() -> frozenset[int]:
    """The CPUs that this thread may use; none where the system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def _read_number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return 0


def read_cpu_list(text: str) -> tuple[int, ...]:
    """The numbers of a list as the kernel writes it.

    >>> read_cpu_list("0-2,8")
    (0, 1, 2, 8)
    """
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _core_of(folder: Path, cpu: int) -> int:
    """The first CPU of the physical core that a CPU belongs to."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        try:
            return min(read_cpu_list((folder / "topology" / name).read_text(encoding="ascii")), default=cpu)
        except OSError:
            continue
    return cpu


def choose_cpus(count: int, *, allowed: Collection[int], root: Path = ROOT) -> tuple[int, ...]:
    """CPUs for ``count`` threads: one of each physical core, the fastest cores first, of one package where it has enough.

    How fast a core is says ``cpu_capacity`` (ARM's big and little cores) or else its highest clock. Among equals CPU 0 comes
    last, since it serves most interrupts. Second threads of a core are taken only when the cores do not suffice.

    Args:
        count: threads, 1 or more.
        allowed: the CPUs that may be chosen.
        root: where ``sys`` is.

    Returns:
        The CPUs in ascending order, fewer than ``count`` only where fewer are allowed.
    """

    def rank(cpu: int) -> tuple[int, int, int, bool, int]:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        speed = _read_number(folder / "cpu_capacity"), _read_number(folder / "cpufreq/cpuinfo_max_freq")
        package = _read_number(folder / "topology/physical_package_id")
        return -speed[0], -speed[1], package, cpu == 0, cpu

    ranked = sorted(allowed, key=rank)
    first_of_core: dict[int, int] = {}
    for cpu in ranked:
        first_of_core.setdefault(_core_of(root / f"sys/devices/system/cpu/cpu{cpu}", cpu), cpu)
    cores = list(first_of_core.values())
    siblings = [cpu for cpu in ranked if cpu not in cores]
    return tuple(sorted([*cores, *siblings][:count]))


@contextmanager
def pinned(cpus: Collection[int]) -> Iterator[tuple[int, ...]]:
    """Keep this thread, and the threads that it makes, on some CPUs; an empty collection leaves all as it is.

    Yields:
        The CPUs, ascending.

    Raises:
        OSError: when the system refuses; nothing has changed then.
    """
    if not cpus:
        yield ()
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield tuple(sorted(cpus))
    finally:
        os.sched_setaffinity(0, before)
