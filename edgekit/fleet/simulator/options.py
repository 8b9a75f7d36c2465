"""What is simulated: how many devices, which release, which faults; and the short texts that people type for it.

>>> parse_faults("fail=5%,silent=10%,drift=.3@10min").fail
0.05
>>> parse_duration("90s", "--for"), parse_duration("10min", "--for")
(90.0, 600.0)
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated

import msgspec

from edgekit.errors import UsageError
from edgekit.schema.base import Record
from edgekit.telemetry.topics import check_name

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
MAX_DEVICES = 1_000_000
MAX_SITES = 10_000
MAX_SPEED = 3600.0
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*(ms|s|min|h|d)?\Z")


class Shift(Record, frozen=True, kw_only=True):
    """A change that begins ``after_s`` into the run and stays; ``share`` of the devices have it."""

    size: float
    after_s: float = 0.0
    share: Share = 1.0


class Faults(Record, frozen=True, kw_only=True):
    """What goes wrong. A plain number is the share of the devices; the seed says which.

    The first four are drawn anew for each release, since a release is what they are about; the others belong to a device.
    """

    fail: Share = 0.0
    """The release's self-test fails there: refused."""
    rollback: Share = 0.0
    """It is installed, and taken back on probation."""
    silent: Share = 0.0
    """Asked for a release it does nothing and says nothing of it; telemetry goes on."""
    dark: Share = 0.0
    """It loses its power while it installs, and does not come back."""
    slow: Share = 0.0
    """Inference takes four times as long; the link has a tenth of the usual rate."""
    offline: Share = 0.0
    """It loses its connection for minutes, again and again, and sends what it kept, some of it merged, when it is back."""
    crashloop: Share = 0.0
    """Its worker crashes in every window, the whole agent every ten minutes."""
    clock: Share = 0.0
    """Its clock starts years in the past, and is set right a few minutes later."""
    sensor: Share = 0.0
    """One of its inputs is missing in a third of the samples."""
    full: Share = 0.0
    """As ``offline``, with a spool that holds ten windows: what is older is given up, and told."""
    drift: Shift | None = None
    """Every second input moves by so many standard deviations."""
    regress: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """A release that is installed during the run answers so much slower: .4 is 1.4 times the time."""
    concept: Shift | None = None
    """So large a share of the right answers become wrong, at the same confidence."""


SHARES = ("fail", "rollback", "silent", "dark", "slow", "offline", "crashloop", "clock", "sensor", "full")
SHIFTS = ("drift", "concept")
FACTORS = ("regress",)
NAMES = (*SHARES, *SHIFTS, *FACTORS)


class SimulatorOptions(Record, frozen=True, kw_only=True):
    """One simulation. Times are seconds of the simulated devices; ``speed`` of them pass in a second."""

    devices: int = 100
    first: int = 0
    """Number of the first device, so that several processes share a fleet."""
    sites: int = 5
    prefix: str = "sim"
    seed: int = 0
    telemetry_s: float = 30.0
    heartbeat_s: float = 30.0
    duration_s: float = 0.0
    """How long; 0: until it is ended."""
    speed: float = 1.0
    connects_per_s: float = 1000.0
    requests_per_s: float = 10.0
    """Inferences of a device on average; they follow the hour."""
    sketched: int = 300
    """Samples a window that the sketches see, at most."""
    labelled: Share = 0.02
    """Share of the answers whose true label comes."""
    self_test_s: float = 5.0
    """Of a new release on a middling device."""
    probation_s: float = 60.0
    link_bytes_per_s: float = 400_000.0
    """Median download rate of a device."""
    sampling: Share = 0.01
    """Share of the devices whose owners give inputs, one every ten windows."""
    faults: Faults = Faults()
    faulty: tuple[str, ...] = ()
    """Releases, ``NAME@VERSION``, that the faults of releases are about; empty: all but the one in service."""


def parse_duration(text: str, option: str) -> float:
    """Seconds of ``500ms``, ``30s``, ``10min``, ``2h``, ``1d`` or a plain number of seconds.

    Raises:
        UsageError: ``config.invalid``.
    """
    found = _DURATION.match(text.strip())
    if found is None:
        raise UsageError("config.invalid", f"{option} {text!r}: not a length of time.", hint="For example 30s, 10min or 2h.")
    return float(found[1]) * _UNITS[found[2] or "s"]


def parse_share(text: str, option: str) -> float:
    """A share of ``5%``, ``.05`` or ``0.05``.

    Raises:
        UsageError: ``config.invalid``.
    """
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise UsageError("config.invalid", f"{option} {text!r}: not a share.", hint="For example 5% or 0.05.")
    return value


def parse_faults(text: str) -> Faults:
    """Faults as people type them: ``fail=5%,silent=10%,drift=.3@10min/20%``.

    A shift is its size, after ``@`` when it begins, after ``/`` the share of the devices that have it.

    Raises:
        UsageError: ``faults.unknown``, ``config.invalid``.
    """
    found: dict[str, float | Shift] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f'Did you mean "{near[0]}"?' if near else f"There are {', '.join(NAMES)}."
            raise UsageError("faults.unknown", f"--faults {part!r}: no such fault.", hint=hint)
        if name in SHARES:
            found[name] = parse_share(value, f"--faults {name}")
        else:
            shift = _parse_shift(value, part)
            found[name] = abs(shift.size) if name in FACTORS else shift
    return msgspec.convert(found, Faults, from_attributes=True)


def _parse_shift(text: str, part: str) -> Shift:
    rest, _, share = text.partition("/")
    size, _, after = rest.partition("@")
    try:
        number = float(size)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError("config.invalid", f"--faults {part!r}: not a size.", hint="For example drift=.3@10min/20%.")
    return Shift(
        size=number,
        after_s=parse_duration(after, "--faults") if after else 0.0,
        share=parse_share(share, "--faults") if share else 1.0,
    )


def check_options(options: SimulatorOptions) -> None:
    """Refuse what cannot be simulated.

    Raises:
        UsageError: ``config.invalid``, ``telemetry.name``.
    """
    limits: tuple[tuple[str, float, float, float], ...] = (
        ("--devices", options.devices, 0, MAX_DEVICES),
        ("--sites", options.sites, 1, MAX_SITES),
        ("--speed", options.speed, 0.01, MAX_SPEED),
        ("--telemetry-every", options.telemetry_s, 0.1, 86400),
        ("--heartbeat-every", options.heartbeat_s, 0.1, 86400),
        ("--connect-rate", options.connects_per_s, 1, 100_000),
    )
    for option, value, low, high in limits:
        if not low <= value <= high:
            raise UsageError("config.invalid", f"{option} {value:g}: expected {low:g} to {high:g}.")
    concept = options.faults.concept
    if concept is not None and not 0 <= concept.size <= 1:
        raise UsageError("config.invalid", f"concept={concept.size:g}: expected a share, 0 to 1, of the right answers.")
    check_name(f"{options.prefix}-000000", "prefix")
