"""What a rollout does next: a pure function of what is known. No clock is read here, nothing is sent or written.

The rules, in order:

1. A device belongs to the first wave whose threshold lies above its position, a value in [0, 1) drawn from the release and the
   device's name. It never changes, so that waves are the same after a restart, and a device that appears later has its place.
2. More failures than ``max_failed`` of the devices of the waves begun so far halt the rollout, and so does a violated gate.
3. A device that says nothing has not succeeded. When so many failed or are silent that ``required_success`` of a wave cannot be
   reached any more, the rollout halts.
4. A wave is passed when enough of its devices have committed, this has lasted for the soak time, every gate holds, and, where
   that is asked for, a person approved.
5. Halted means that nobody else gets the release, and those that were asked and have not committed are asked to stay. With
   ``is_rolled_back_on_halt`` those that have it are asked back.

>>> position("sha256:" + "ab" * 32, "lab", "cam-7") == position("sha256:" + "ab" * 32, "lab", "cam-7")
True
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from edgekit.errors import UsageError
from edgekit.fleet.rollout.records import DeviceProgress, GateReading, Progress, RolloutSpec, Wave, WaveView

MAX_WAVES = 20
_SPAN = 2.0**64


def position(manifest: str, site: str, device: str) -> float:
    """A device's fixed place in [0, 1) for a release."""
    drawn = hmac.new(manifest.encode(), f"{site}/{device}".encode(), hashlib.sha256).digest()
    return int.from_bytes(drawn[:8], "big") / _SPAN * (1 - 2**-53)


def parse_waves(text: str) -> tuple[Wave, ...]:
    """Waves as people type them: ``canary:5,10%,50%,100%``.

    A wave is a share of the devices, or a number of them; a name may stand before. The last is always all.

    >>> [str(wave.share or wave.count) for wave in parse_waves("canary:5,10%")]
    ['5', '0.1', '1.0']

    Raises:
        UsageError: ``rollout.waves``.
    """
    waves = [_parse_wave(part.strip(), number) for number, part in enumerate(text.split(","), 1) if part.strip()]
    shares = [wave.share for wave in waves if not wave.count]
    if not waves or len(waves) > MAX_WAVES or shares != sorted(set(shares)):
        raise UsageError(
            "rollout.waves",
            f"waves {text!r}: expected 1 to {MAX_WAVES} growing parts of the fleet.",
            hint="For example canary:5,10%,50%,100%.",
        )
    return tuple(waves) if waves[-1].share == 1.0 else (*waves, Wave(name="all", share=1.0))


def _parse_wave(text: str, number: int) -> Wave:
    name, _, size = text.rpartition(":")
    try:
        if size.endswith("%"):
            share = float(size[:-1]) / 100
            if 0 < share <= 1:
                return Wave(name=name or size, share=share)
        elif int(size) > 0:
            return Wave(name=name or f"first {int(size)}", count=int(size))
    except ValueError:
        pass
    raise UsageError(
        "rollout.waves", f"wave {number}, {text!r}: neither a number of devices nor a share.", hint="Write canary:5 or 10%."
    )


def thresholds(waves: Sequence[Wave], positions: Sequence[float]) -> tuple[float, ...]:
    """The position below which a device belongs to each wave, from the devices there are when the rollout begins."""
    ordered, found = sorted(positions), 0.0
    result = []
    for wave in waves:
        if wave.count:
            limit = (ordered[wave.count - 1] + ordered[wave.count]) / 2 if wave.count < len(ordered) else 1.0
        else:
            limit = wave.share
        found = max(found, limit)
        result.append(found)
    return tuple(result)


def wave_of(place: float, limits: Sequence[float]) -> int:
    """The number of the wave that a position belongs to."""
    return next((number for number, limit in enumerate(limits) if place < limit), len(limits) - 1)


def allowed_failures(spec: RolloutSpec, devices: int) -> int:
    """How many of so many devices may fail without halting the rollout."""
    return int(spec.max_failed * devices + 1e-9)


def is_silent(spec: RolloutSpec, device: DeviceProgress, now_ms: int) -> bool:
    """Whether a device was asked longer than the deadline ago and has not answered."""
    return device.stage == "asked" and now_ms - device.asked_ms > spec.deadline_ms


@dataclass(frozen=True, kw_only=True)
class Note:
    """A decision for the audit log: ``rollout.halted`` and why."""

    action: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done: where the rollout stands now, and which devices are asked for it or asked back."""

    progress: Progress
    ask: tuple[int, ...] = ()
    revert: tuple[int, ...] = ()
    withdraw: tuple[int, ...] = ()
    """Asked and not yet committed: to stay with what they have."""
    notes: tuple[Note, ...] = ()
    waits_for: str = ""


def step(
    spec: RolloutSpec, progress: Progress, devices: Sequence[DeviceProgress], readings: Sequence[GateReading], now_ms: int
) -> Decision:
    """What happens next.

    Args:
        spec: what was asked for.
        progress: where it stands.
        devices: every device of the rollout, as far as it is known.
        readings: the gates, measured now.
        now_ms: the time.
    """
    match progress.state:
        case "running":
            return _advance(spec, progress, devices, readings, now_ms)
        case "halted":
            return Decision(progress=progress, withdraw=_ids(devices, "asked"), waits_for="a person: resume it or roll it back")
        case "rolling_back":
            return _go_back(progress, devices)
        case "done":
            newcomers = _ids(devices, "waiting")[: spec.max_batch]
            return Decision(progress=progress, ask=newcomers)
        case _:
            return Decision(progress=progress, waits_for="a person: resume it" if progress.state == "paused" else "")


def _ids(devices: Sequence[DeviceProgress], stage: str) -> tuple[int, ...]:
    return tuple(device.device_id for device in devices if device.stage == stage)


def halt(spec: RolloutSpec, progress: Progress, reason: str) -> Progress:
    """The progress of a rollout that goes no further."""
    state = "rolling_back" if spec.is_rolled_back_on_halt else "halted"
    return msgspec.structs.replace(progress, state=state, reason=reason, soaking_since_ms=0)


def _halted(spec: RolloutSpec, progress: Progress, devices: Sequence[DeviceProgress], reason: str) -> Decision:
    after = halt(spec, progress, reason)
    notes = [Note(action="rollout.halted", reason=reason)]
    if after.state == "rolling_back":
        notes.append(Note(action="rollout.rolling_back", reason=reason))
        then = _go_back(after, devices)
        return Decision(progress=then.progress, revert=then.revert, notes=(*notes, *then.notes), waits_for=then.waits_for)
    return Decision(progress=after, withdraw=_ids(devices, "asked"), notes=tuple(notes))


def _go_back(progress: Progress, devices: Sequence[DeviceProgress]) -> Decision:
    wanted = (*_ids(devices, "committed"), *_ids(devices, "asked"))
    under_way = len(_ids(devices, "reverting")) + len(wanted)
    if under_way:
        return Decision(progress=progress, revert=wanted, waits_for=f"{under_way} devices to go back")
    done = msgspec.structs.replace(progress, state="rolled_back")
    return Decision(progress=done, notes=(Note(action="rollout.rolled_back", reason=progress.reason),))


def _advance(
    spec: RolloutSpec, progress: Progress, devices: Sequence[DeviceProgress], readings: Sequence[GateReading], now_ms: int
) -> Decision:
    limit = progress.thresholds[progress.wave]
    members = [device for device in devices if device.position < limit]
    reason = _reason_to_halt(spec, progress, members, readings, now_ms)
    if reason:
        return _halted(spec, progress, devices, reason)
    ask = tuple(device.device_id for device in members if device.stage == "waiting")[: spec.max_batch]
    committed = sum(device.stage == "committed" for device in members)
    if committed + progress.forgiven < _needed(spec, len(members)):
        waiting = msgspec.structs.replace(progress, soaking_since_ms=0)
        words = (
            f"{_needed(spec, len(members)) - committed - progress.forgiven} more devices of {_name(spec, progress)} to commit"
        )
        return Decision(progress=waiting, ask=ask, waits_for=words)
    since = progress.soaking_since_ms or now_ms
    soaking = msgspec.structs.replace(progress, soaking_since_ms=since)
    if now_ms - since < spec.soak_ms:
        left = (spec.soak_ms - (now_ms - since)) // 1000
        return Decision(progress=soaking, ask=ask, waits_for=f"{_name(spec, progress)} to soak, {left} s more")
    unknown = [reading for reading in readings if reading.verdict == "unknown"]
    if unknown:
        if now_ms - since > spec.soak_ms + spec.deadline_ms:
            words = f"{unknown[0].gate}: only {unknown[0].samples} of {unknown[0].gate.min_samples} samples came"
            return _halted(spec, soaking, devices, words)
        return Decision(progress=soaking, ask=ask, waits_for=f"figures for {unknown[0].gate}")
    return _pass(spec, soaking, ask, now_ms)


def _pass(spec: RolloutSpec, progress: Progress, ask: tuple[int, ...], now_ms: int) -> Decision:
    """The wave is passed: the next one, or the end."""
    if progress.wave + 1 == len(progress.thresholds):
        done = msgspec.structs.replace(progress, state="done", reason="every wave passed")
        return Decision(progress=done, ask=ask, notes=(Note(action="rollout.done", reason="every wave passed"),))
    if spec.needs_approval and progress.approved <= progress.wave:
        return Decision(progress=progress, ask=ask, waits_for=f"a person to approve the wave after {_name(spec, progress)}")
    after = msgspec.structs.replace(progress, wave=progress.wave + 1, wave_began_ms=now_ms, soaking_since_ms=0)
    note = Note(action="rollout.wave_begun", reason=f"{_name(spec, progress)} passed; now {_name(spec, after)}")
    return Decision(progress=after, ask=ask, notes=(note,), waits_for=f"{_name(spec, after)} to be asked")


def _name(spec: RolloutSpec, progress: Progress) -> str:
    return f"wave {progress.wave + 1} ({spec.waves[progress.wave].name})"


def _needed(spec: RolloutSpec, members: int) -> int:
    """Devices of a wave that must have committed; at least one where there is one."""
    allowed = int((1 - spec.required_success) * members + 1e-9)
    return max(min(members, 1), members - allowed)


def _reason_to_halt(
    spec: RolloutSpec,
    progress: Progress,
    members: Sequence[DeviceProgress],
    readings: Sequence[GateReading],
    now_ms: int,
) -> str:
    failed = [device for device in members if device.stage == "failed"]
    allowed = allowed_failures(spec, len(members)) + progress.forgiven
    if len(failed) > allowed:
        newest = max(failed, key=lambda device: device.asked_ms)
        said = f"; {newest.site}/{newest.device}: {newest.detail}" if newest.detail else ""
        return f"{len(failed)} of {len(members)} devices failed, {allowed} may{said}"
    for reading in readings:
        if reading.verdict == "violated":
            beside = f" (control {reading.control:.4g})" if reading.control is not None else ""
            return f"{reading.gate.metric} is {reading.value:.4g}{beside}, asked {reading.gate}"
    silent = sum(is_silent(spec, device, now_ms) for device in members)
    if max(0, len(failed) - progress.forgiven) + silent > len(members) - _needed(spec, len(members)):
        return (
            f"{silent} of {len(members)} devices are silent and {len(failed)} failed: {_needed(spec, len(members))} must commit"
        )
    return ""


def summarize(
    spec: RolloutSpec, limits: Sequence[float], devices: Sequence[DeviceProgress], now_ms: int
) -> tuple[WaveView, ...]:
    """Each wave's devices by what became of them; a device counts in one wave."""
    counts = [
        {"devices": 0, "waiting": 0, "pending": 0, "silent": 0, "committed": 0, "failed": 0, "reverted": 0} for _ in spec.waves
    ]
    for device in devices:
        found = counts[wave_of(device.position, limits)]
        found["devices"] += 1
        match device.stage:
            case "asked":
                found["silent" if is_silent(spec, device, now_ms) else "pending"] += 1
            case "reverting":
                found["pending"] += 1
            case stage:
                found[stage] += 1
    return tuple(WaveView(name=wave.name, **found) for wave, found in zip(spec.waves, counts, strict=True))
