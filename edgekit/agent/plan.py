"""What to do next: pure functions from state and signed releases to steps. No clock is read here, nothing is written.

A plan is the rest of the way: after an interruption the same functions give the steps that are still to do. The release with
the highest counter wins; one that this device refused, or that lies below the committed floor, is never chosen.

    fetch → stage → verify → selftest → switch → report
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec

from edgekit.agent.validity import find_recall
from edgekit.errors import ArtifactError, DeviceError
from edgekit.schema.base import Record
from edgekit.schema.contract import Contract
from edgekit.schema.manifest import BlobRef, Manifest, Variant
from edgekit.schema.release import Release
from edgekit.schema.state import AgentState, Attempt, Outcome, Phase, Refusal, Slot, SlotName

MAX_REFUSALS = 64
MAX_OUTCOMES = 32
MAX_ATTEMPTS = 3
"""Deaths of the device in a release's self-test, after which the release is refused."""
MAX_INTERRUPTIONS = 10
NAMES = {"selftest": "self-test", "fetch": "download"}
"""The same for steps that load no model, where the download did not go on either."""


class DeviceFacts(Record, frozen=True, kw_only=True):
    """What this device is: asked of a child process once, so that the supervisor loads no framework."""

    arch: str
    cpu: str
    isa: tuple[str, ...]
    cores: int
    ram_mb: float
    os: str
    runtimes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps that bring ``release`` into ``slot``."""

    release: Release
    slot: SlotName
    steps: tuple[Phase, ...]

    @property
    def intent(self) -> str:
        """The plan in one line, for the state file."""
        info = self.release.info
        return f"{info.name}@{info.version}#{info.counter}"


def slot_of(state: AgentState, name: SlotName) -> Slot:
    """A slot by name."""
    return state.slots[0] if name == "a" else state.slots[1]


def active_slot(state: AgentState) -> Slot | None:
    """The slot that serves, if any."""
    return slot_of(state, state.active) if state.active else None


def other_slot(state: AgentState) -> Slot:
    """The slot that does not serve: where an installation goes."""
    return state.slots[1] if state.active == "a" else state.slots[0]


def is_refused(state: AgentState, manifest: str) -> bool:
    """Whether this device refused a manifest before."""
    return any(refusal.manifest == manifest for refusal in state.refusals)


def choose_release(
    state: AgentState, releases: Sequence[Release], *, model: str, channel: str, deferred: Collection[str] = ()
) -> Release | None:
    """The release to install, or None when the device has the best it may have.

    Args:
        state: the agent's state.
        releases: what verified metadata lists.
        model: the model's name.
        channel: the channel that the device follows; empty takes releases of any.
        deferred: manifest digests whose installation failed a moment ago.
    """
    floor = state.floors.releases.get(model, 0)
    active = active_slot(state)
    eligible = [
        release
        for release in releases
        if release.info.name == model
        and channel in {"", release.info.channel}
        and release.info.counter >= floor
        and release.manifest_digest not in deferred
        and not is_refused(state, release.manifest_digest)
        and find_recall(state.recalls, (release.manifest_digest,)) is None
    ]
    if not eligible:
        return None
    best = max(eligible, key=lambda release: release.info.counter)
    if active and active.model == model:
        is_same = active.manifest == best.manifest_digest and active.counter == best.info.counter
        if is_same or best.info.counter < active.counter:
            return None
    return best


def make_plan(
    state: AgentState, releases: Sequence[Release], *, model: str, channel: str, deferred: Collection[str] = ()
) -> Plan | None:
    """The steps that are still to do, or None when there is nothing to do. Arguments as :func:`choose_release`."""
    release = choose_release(state, releases, model=model, channel=channel, deferred=deferred)
    if release is None or state.probation is not None:  # the other slot is what a model on probation goes back to
        return None
    active, target = active_slot(state), other_slot(state)
    if active and active.manifest == release.manifest_digest:
        return Plan(release=release, slot=active.name, steps=("switch", "report"))
    steps: tuple[Phase, ...] = ("fetch", "stage", "verify", "selftest", "switch", "report")
    if target.manifest == release.manifest_digest and target.status in {"verified", "good"}:
        steps = ("verify", "selftest", "switch", "report")
    return Plan(release=release, slot=target.name, steps=steps)


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison: ``1.24.4`` → (1, 24, 4)."""
    match = re.match(r"[0-9]{1,9}(?:\.[0-9]{1,9})*", text)  # a signed manifest's, too: int() refuses thousands of digits
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _obstacle(variant: Variant, facts: DeviceFacts) -> str:
    """Why this device cannot run a variant; empty when it can."""
    requires = variant.requires
    installed = facts.runtimes.get(requires.runtime)
    if installed is None:
        return f"needs {requires.runtime}, installed: {', '.join(sorted(facts.runtimes)) or 'no runtime'}"
    if requires.runtime_version and parse_version(installed) < parse_version(requires.runtime_version):
        return f"needs {requires.runtime} {requires.runtime_version} or newer, installed: {installed}"
    if why := _processor_obstacle(variant, facts):
        return why
    if requires.ram_mb is not None and requires.ram_mb > facts.ram_mb:
        return f"needs {requires.ram_mb:g} MB of memory, this device has {facts.ram_mb:g} MB"
    return ""


def _processor_obstacle(variant: Variant, facts: DeviceFacts) -> str:
    requires = variant.requires
    if requires.arch and facts.arch not in requires.arch:
        return f"needs {' or '.join(requires.arch)}, this device is {facts.arch}"
    if missing := [flag for flag in requires.isa if flag not in facts.isa]:
        return f"needs {' '.join(missing)}, this processor lacks it"
    if requires.isa_any and not set(requires.isa_any) & set(facts.isa):
        return f"needs {' or '.join(requires.isa_any)}, this processor has neither"
    return ""


def choose_variant(manifest: Manifest, facts: DeviceFacts) -> Variant:
    """The first variant that this device can run.

    Raises:
        DeviceError: ``device.unsupported`` with the reason for each variant.
    """
    reasons = []
    for variant in manifest.variants:
        obstacle = _obstacle(variant, facts)
        if not obstacle:
            return variant
        reasons.append(f"{variant.name} {obstacle}")
    name = f"{manifest.name}@{manifest.version}"
    raise DeviceError(
        "device.unsupported",
        f"{name}: no variant runs on this device: {'; '.join(reasons) or 'it has none'}.",
        hint="Publish a variant for this target, or install the runtime that it needs.",
    )


def needed_blobs(manifest: Manifest, variant: Variant) -> tuple[BlobRef, ...]:
    """The blobs that a device needs to serve a variant: the model, its golden samples, and the reference profile.

    Raises:
        ArtifactError: ``manifest.missing_blob`` when the manifest does not list one.
    """
    refs = {ref.digest: ref for ref in manifest.blobs}
    for digest in (variant.model, variant.golden):
        if digest not in refs:
            raise ArtifactError(
                "manifest.missing_blob",
                f"{manifest.name}@{manifest.version}: variant {variant.name} names {digest}, which the manifest does not list.",
            )
    wanted = dict.fromkeys((variant.model, variant.golden, *(ref.digest for ref in manifest.blobs if ref.role == "baseline")))
    return tuple(refs[digest] for digest in wanted)


def check_manifest(manifest: Manifest, release: Release) -> None:
    """Whether the manifest is the one that signed metadata speaks of.

    Raises:
        ArtifactError: ``manifest.mismatch``.
    """
    info = release.info
    if (manifest.name, manifest.version) != (info.name, info.version):
        raise ArtifactError(
            "manifest.mismatch",
            f"{info.name}@{info.version}: its manifest says {manifest.name}@{manifest.version}.",
            hint="Publish the bundle again.",
        )


def refuse(state: AgentState, refusal: Refusal) -> tuple[Refusal, ...]:
    """The refusals with one more; one a manifest, the oldest give way."""
    kept = [old for old in state.refusals if old.manifest != refusal.manifest]
    return tuple([*kept, refusal][-MAX_REFUSALS:])


def contract_changes(before: Contract, after: Contract) -> tuple[str, ...]:
    """What a client of the model would notice: names, types, shapes and labels. Ranges and thresholds may change."""
    changes: list[str] = []
    for what, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        olds, news = {spec.name: spec for spec in old}, {spec.name: spec for spec in new}
        changes += [f"{what} {name} is gone" for name in olds if name not in news]
        changes += [f"{what} {name} is new" for name in news if name not in olds]
        for name, left in olds.items():
            right = news.get(name)
            if right is None:
                continue
            if left.dtype != right.dtype:
                changes.append(f"{what} {name} is {right.dtype}, was {left.dtype}")
            if _axes(left.shape) != _axes(right.shape):
                changes.append(f"{what} {name} has shape {list(right.shape)}, had {list(left.shape)}")
    if before.labels != after.labels:
        changes.append(
            f"{len(after.labels)} labels, {len(before.labels)} before"
            if len(before.labels) != len(after.labels)
            else "the labels or their order changed"
        )
    if before.task != after.task:
        changes.append(f"the task is {after.task}, was {before.task}")
    return tuple(changes)


def _axes(shape: tuple[int | str, ...]) -> tuple[int | None, ...]:
    """A dynamic axis is dynamic by whatever name."""
    return tuple(axis if isinstance(axis, int) else None for axis in shape)


def next_attempt(before: Attempt | None, manifest: str, phase: str, size_bytes: int) -> Attempt:
    """The record of an attempt that comes to a phase."""
    if before is None or before.manifest != manifest:
        return Attempt(manifest=manifest, phase=phase, size_bytes=size_bytes)
    return msgspec.structs.replace(before, phase=phase)


def interrupted(attempt: Attempt, size_bytes: int) -> tuple[Attempt | None, str]:
    """What an attempt that found no end counts for: nothing where the download went on meanwhile.

    Args:
        attempt: as the interruption left it.
        size_bytes: what is downloaded by now.

    Returns:
        The record to go on with, or None and why the release is given up.
    """
    if attempt.phase in {"fetch", "stage", "verify"}:
        count = 0 if size_bytes > attempt.size_bytes else attempt.interruptions + 1
        changed = msgspec.structs.replace(attempt, interruptions=count, size_bytes=max(size_bytes, attempt.size_bytes))
        limit = MAX_INTERRUPTIONS
    else:
        count = attempt.deaths + 1
        changed, limit = msgspec.structs.replace(attempt, deaths=count), MAX_ATTEMPTS
    if count >= limit:
        return None, f"the device died {count} times in its {NAMES.get(attempt.phase, attempt.phase)}"
    return changed, ""


def new_outcome(state: AgentState, outcome: Outcome) -> tuple[Outcome, ...]:
    """The outcomes that wait for their report, with one more; the oldest give way."""
    return (*state.outcomes, outcome)[-MAX_OUTCOMES:]


def next_poll_s(poll_s: float, retries_at: Collection[float], *, now: float) -> float:
    """Seconds until the next poll: the usual pause, or less when a release that failed may be tried again sooner.

    Args:
        poll_s: the usual pause.
        retries_at: when releases may be tried again; those that could have been tried already ask for nothing.
        now: on the same clock.
    """
    return min([poll_s, *(at - now for at in retries_at if at > now)])


def backoff_s(failures: int, *, base_s: float, cap_s: float, draw: Callable[[], float]) -> float:
    """Seconds to wait after so many failures in a row: full jitter under an exponential ceiling.

    Args:
        failures: 1 after the first failure.
        base_s: ceiling after the first failure.
        cap_s: highest ceiling.
        draw: uniform in [0, 1).
    """
    ceiling = min(cap_s, base_s * 2.0 ** min(failures - 1, 30))
    return ceiling * draw()
