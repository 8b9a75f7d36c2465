"""The hardware of a simulated device: how fast it answers, how warm it gets, how fast its link is.

Latencies are lognormal around the device's own median, which grows with temperature once the processor slows itself down. The
temperature follows the site's hour and the load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgekit.telemetry.histogram import PER_OCTAVE, LatencyHistogram, index_of

DAY_MS = 86_400_000
SLOW_LATENCY = 4.0
SLOW_LINK = 0.1
THROTTLE_C = 78.0
LATENCY_SIGMA = 0.16
"""Of the logarithm of a latency."""
TAIL_SHARE = 0.01
"""Answers that take three times as long."""
_SPAN = 24
_PHASES = 16


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of machine."""

    name: str
    arch: str
    cpu: str
    isa: tuple[str, ...]
    cores: int
    ram_mb: float
    latency_ms: float
    share: float


KINDS = (
    Hardware(
        name="pi-5",
        arch="aarch64",
        cpu="Cortex-A76",
        isa=("asimd", "asimddp", "asimdhp"),
        cores=4,
        ram_mb=8064,
        latency_ms=5.0,
        share=0.35,
    ),
    Hardware(name="pi-4", arch="aarch64", cpu="Cortex-A72", isa=("asimd",), cores=4, ram_mb=3906, latency_ms=12.0, share=0.35),
    Hardware(
        name="imx8",
        arch="aarch64",
        cpu="Cortex-A53",
        isa=("asimd",),
        cores=4,
        ram_mb=1998,
        latency_ms=24.0,
        share=0.15,
    ),
    Hardware(
        name="n100",
        arch="x86_64",
        cpu="Intel(R) N100",
        isa=("avx2", "avx_vnni"),
        cores=4,
        ram_mb=15_800,
        latency_ms=2.5,
        share=0.15,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine: its kind, and how it differs from others of its kind."""

    kind: Hardware
    latency_factor: float
    warmth_c: float
    link_bytes_per_s: float
    hour_shift: float
    """Hours by which its site's day lies after UTC."""

    def load(self, time_ms: int) -> float:
        """How busy it is at a time, 0..1: little at night, most in the afternoon."""
        hour = (time_ms / DAY_MS * 24 + self.hour_shift) % 24
        return 0.55 + 0.4 * math.sin(2 * math.pi * (hour - 9.5) / 24)

    def temperature_c(self, time_ms: int) -> float:
        """Of the processor."""
        hour = (time_ms / DAY_MS * 24 + self.hour_shift) % 24
        ambient = 18 + 6 * math.sin(2 * math.pi * (hour - 9) / 24)
        return ambient + 24 + 26 * self.load(time_ms) + self.warmth_c

    def latency_ms(self, time_ms: int) -> float:
        """The median latency at a time."""
        throttle = 1 + 0.05 * max(0.0, self.temperature_c(time_ms) - THROTTLE_C)
        return self.kind.latency_ms * self.latency_factor * throttle


def make_machine(draw: Callable[[str], float], *, site: int, is_slow: bool, link_bytes_per_s: float) -> Machine:
    """A machine as a device's own numbers decide.

    Args:
        draw: a fixed number in [0, 1) for each name.
        site: the site's number, for its hour.
        is_slow: whether it is one of the slow ones.
        link_bytes_per_s: the median link.
    """
    place, kind = draw("kind"), KINDS[-1]
    for each in KINDS:
        if place < each.share:
            kind = each
            break
        place -= each.share
    return Machine(
        kind=kind,
        latency_factor=math.exp(0.12 * _gauss(draw, "latency")) * (SLOW_LATENCY if is_slow else 1.0),
        warmth_c=5.0 * _gauss(draw, "warmth"),
        link_bytes_per_s=link_bytes_per_s * math.exp(0.8 * _gauss(draw, "link")) * (SLOW_LINK if is_slow else 1.0),
        hour_shift=float(site % 7 - 3),
    )


def _gauss(draw: Callable[[str], float], name: str) -> float:
    """A standard normal number from two fixed ones (Box and Muller, 1958)."""
    return math.sqrt(-2 * math.log(1 - draw(f"{name}/1"))) * math.cos(2 * math.pi * draw(f"{name}/2"))


@lru_cache(maxsize=_PHASES)
def _bucket_shares(phase: int) -> tuple[int, np.ndarray]:
    """The first bucket, relative to the median's, and the probabilities of those that follow."""
    width = LATENCY_SIGMA / math.log(2) * PER_OCTAVE
    middle = phase / _PHASES
    bounds = (np.arange(-_SPAN, _SPAN + 1) - middle) / width
    shares = np.diff([0.0, *(0.5 * math.erfc(-bound / math.sqrt(2)) for bound in bounds.tolist()), 1.0])
    used = np.flatnonzero(shares > 1e-9)
    shares = shares[used[0] : used[-1] + 1]
    return int(used[0]) - _SPAN, shares / shares.sum()


def draw_latencies(rng: np.random.Generator, median_ms: float, count: int) -> LatencyHistogram:
    """The latencies of ``count`` answers."""
    position = math.log2(median_ms) * PER_OCTAVE
    whole = math.floor(position)
    first, shares = _bucket_shares(int((position - whole) * _PHASES))
    slow = int(rng.binomial(count, TAIL_SHARE))
    counts = rng.multinomial(count - slow, shares).tolist()
    found = {whole - 1 + first + place: number for place, number in enumerate(counts) if number}
    if slow:
        late = index_of(3 * median_ms)
        found[late] = found.get(late, 0) + slow
    return LatencyHistogram(found)
