"""Promotion: a release goes on to the next channel when it passes the gates, measured on this machine.

The release must be on the channel before. Nothing is changed where a gate says no; what was measured goes into the audit log
where it was promoted. A gate can be skipped, by name and with a reason, which is written down, too.

    >>> report = promote(Path("repository"), "fashion", "1.1.0", to="staging", trial=trial)  # doctest: +SKIP
    >>> report.is_passed, [gate.gate for gate in report.gates if gate.verdict == "failed"]    # doctest: +SKIP
    (False, ['drop'])
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from edgekit.errors import ArtifactError, DataError, RepositoryError, UsageError
from edgekit.repository import audit
from edgekit.repository.changes import Waiting, Workbench
from edgekit.repository.gates import (
    GATE_NAMES,
    ContractChanges,
    GateName,
    GateResult,
    check_skips,
    compare_contracts,
    describe_gates,
    first_release,
    judge_contract,
    judge_drop,
    judge_golden,
    judge_hours,
    judge_latency,
    judge_publishers,
    skipped,
    unmeasured,
)
from edgekit.repository.listing import head_of, manifest_path, releases_of
from edgekit.repository.measuring import OpenedModel, Trial, check_golden, measure_drop, measure_latency, opened
from edgekit.repository.publishing import (
    DeltaMaker,
    add_release,
    all_releases,
    check_recalls,
    find_release,
    load_manifest,
    new_info,
)
from edgekit.repository.signatures import signed_publishers
from edgekit.repository.store import Chain, Gates, Store, whole_second
from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.digest import Digest
from edgekit.schema.manifest import Manifest
from edgekit.schema.measurement import EvalReport, LatencyReport
from edgekit.schema.release import DeltaRef, Release

_MEASURED: frozenset[GateName] = frozenset({"golden", "drop", "latency_ratio"})


class PromotionReport(Record, frozen=True, kw_only=True):
    """What ``edgekit repo promote`` shows. ``against`` is the channel's release so far, empty for the first."""

    name: str
    version: str
    manifest: Digest
    source: str
    """The channel that it is on."""
    channel: str
    """The channel that it was to go to."""
    against: str = ""
    variant: str = ""
    """Of the release, the one that this machine runs; empty where nothing was measured."""
    against_variant: str = ""
    gates: tuple[GateResult, ...] = ()
    evaluation: EvalReport | None = None
    latency: LatencyReport | None = None
    reason: str = ""
    is_passed: bool = False
    is_dry_run: bool = False
    counter: int | None = None
    """Of the new release; None where none was made."""
    waiting: tuple[Waiting, ...] = ()
    """Whose signatures it still waits for."""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A release with its manifest."""

    release: Release
    manifest: Manifest
    data: bytes

    @property
    def what(self) -> str:
        return f"{self.manifest.name}@{self.manifest.version}"


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is to be promoted, where to, what it would replace there, and what must hold."""

    store: Store
    wanted: _Side
    current: _Side | None
    channel: str
    limits: Gates
    trial: Trial

    @property
    def changes(self) -> ContractChanges | None:
        """Against what it would replace."""
        return compare_contracts(self.current.manifest.contract, self.wanted.manifest.contract) if self.current else None


def promote(
    folder: Path,
    name: str,
    version: str,
    *,
    to: str,
    trial: Trial,
    gates: Gates | None = None,
    skip: Sequence[str] = (),
    reason: str = "",
    is_dry_run: bool = False,
    delta_maker: DeltaMaker | None = None,
    role_keys: Sequence[str] = (),
    now: datetime | None = None,
) -> PromotionReport:
    """Measure a release against the gates, and put it on the next channel when it passes.

    Args:
        folder: of the repository.
        name: of the model.
        version: of the release.
        to: the channel.
        trial: how to measure.
        gates: the limits; None are the repository's.
        skip: gates to leave out, by name.
        reason: why, for the audit log; needed where a gate is skipped.
        is_dry_run: measure only.
        delta_maker: makes ways from the models of the channel's releases, as for :func:`publish`.
        role_keys: private keys to sign the metadata with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        UsageError: ``promotion.channel``, ``promotion.nothing``, ``promotion.waiting``, ``promotion.no_data``,
            ``promotion.no_metric``, ``gate.unknown``, ``gate.no_reason``.
        RepositoryError: ``repository.no_release``, ``promotion.not_on_channel``, ``promotion.expired``,
            ``promotion.changed`` when somebody else published meanwhile, ``repository.recalled``, ``repository.damaged``.
        DeviceError: ``device.unsupported`` when no variant runs here, ``device.sealed_...``.
    """
    skips, moment = check_skips(skip, reason), whole_second(now)
    store = Store.open(folder)
    wanted, current = _prepare(store, name, version, to, moment)
    limits = gates or store.config.gates
    case = _Case(store=store, wanted=wanted, current=current, channel=to, limits=limits, trial=trial)
    found = _measure(case, skips, reason, moment)
    report = PromotionReport(
        name=name,
        version=version,
        manifest=case.wanted.release.manifest_digest,
        source=case.wanted.release.info.channel,
        channel=to,
        against=case.current.what if case.current else "",
        variant=found.variants[0],
        against_variant=found.variants[1],
        gates=tuple(found.gates[gate] for gate in GATE_NAMES),
        evaluation=found.evaluation,
        latency=found.latency,
        reason=reason,
        is_passed=all(result.verdict != "failed" for result in found.gates.values()),
        is_dry_run=is_dry_run,
    )
    if is_dry_run or not report.is_passed:
        return report
    return _publish(case, report, delta_maker, role_keys, moment)


# --- what is promoted -------------------------------------------------------------------------------------------------------


def _prepare(store: Store, name: str, version: str, to: str, now: datetime) -> tuple[_Side, _Side | None]:
    """The release, and the one that it would replace."""
    source = _channel_before(store, to)
    chain = store.chain()
    find_release(chain, name, version)
    wanted = _side(store.folder, _on_channel(chain, name, version, source))
    expires = wanted.release.info.valid_until
    if expires is not None and expires <= now:
        raise RepositoryError(
            "promotion.expired",
            f"{wanted.what}: was valid until {expires:%Y-%m-%d %H:%M}.",
            hint='Publish a release with a later "--valid-until".',
        )
    head = head_of(releases_of(chain), name, to)
    if head is not None and head.manifest_digest == wanted.release.manifest_digest:
        raise UsageError("promotion.nothing", f"{wanted.what}: is the newest release on {to} already.")
    _refuse_waiting(store, chain, wanted, to, now)
    return wanted, _side(store.folder, head) if head else None


def _channel_before(store: Store, to: str) -> str:
    channels = store.config.channels
    if to not in channels[1:]:
        raise UsageError(
            "promotion.channel",
            f"--to {to}: not a channel that is promoted to.",
            hint=f"The channels are {' → '.join(channels)}; a release is promoted from each to the next.",
        )
    return channels[channels.index(to) - 1]


def _on_channel(chain: Chain, name: str, version: str, channel: str) -> Release:
    found = {
        release.info.channel: release
        for release in releases_of(chain)
        if (release.info.name, release.info.version) == (name, version)
    }
    if channel not in found:
        raise RepositoryError(
            "promotion.not_on_channel",
            f"{name}@{version}: is on {', '.join(sorted(found))}, not on {channel}, from where it could be promoted.",
            hint=f"Publish or promote it to {channel} first.",
        )
    return found[channel]


def _refuse_waiting(store: Store, chain: Chain, wanted: _Side, to: str, now: datetime) -> None:
    """Promoted again while it waits, it would lose the signatures that it has."""
    path = manifest_path(wanted.manifest.name, wanted.manifest.version, to)
    listed = {release.manifest_path: release for release in all_releases(Workbench(store, chain, now, store.pending()))}
    visible = {release.manifest_path: release for release in releases_of(chain)}
    if path in listed and listed[path] != visible.get(path):
        raise UsageError(
            "promotion.waiting",
            f"{wanted.what}: was promoted to {to} and waits for signatures.",
            hint=f'"edgekit repo status {store.folder}" says whose.',
        )


def _side(folder: Path, release: Release) -> _Side:
    manifest, data = load_manifest(folder, release)
    return _Side(release=release, manifest=manifest, data=data)


# --- measuring --------------------------------------------------------------------------------------------------------------


@dataclass
class _Findings:
    """What was measured so far."""

    gates: dict[GateName, GateResult] = field(default_factory=dict)
    evaluation: EvalReport | None = None
    latency: LatencyReport | None = None
    variants: tuple[str, str] = ("", "")


def _measure(case: _Case, skips: Sequence[GateName], reason: str, now: datetime) -> _Findings:
    found = _Findings()
    found.gates["contract"] = judge_contract(case.changes) if case.changes else first_release("contract")
    names = [case.store.name_of(key.keyid) for key in signed_publishers(case.store, case.wanted.release.manifest_digest)]
    found.gates["publishers"] = judge_publishers(names, case.limits)
    hours = (now - case.wanted.release.info.published_at) / timedelta(hours=1)
    found.gates["hours"] = judge_hours(hours, case.limits)
    for gate in skips:
        found.gates[gate] = skipped(gate, reason)
    if not found.gates.keys() >= _MEASURED:
        _run(case, found)
    return found


def _run(case: _Case, found: _Findings) -> None:
    """The gates that run models."""
    trial = case.trial
    with contextlib.ExitStack() as stack:

        def open_side(side: _Side) -> OpenedModel:
            variant = trial.choose(side.manifest)
            return stack.enter_context(opened(case.store.folder, side.manifest, variant, identity=trial.identity))

        wanted = open_side(case.wanted)
        found.variants = wanted.variant.name, ""
        if "golden" not in found.gates:
            trial.on_progress("golden samples", 0.0)
            found.gates["golden"] = _golden(wanted)
        if case.current is None:
            found.gates = {gate: first_release(gate) for gate in ("drop", "latency_ratio")} | found.gates
        if found.gates.keys() >= _MEASURED or case.current is None:
            return
        current = open_side(case.current)
        found.variants = wanted.variant.name, current.variant.name
        _compare(case, wanted, current, found)


def _golden(model: OpenedModel) -> GateResult:
    try:
        result = check_golden(model)
    except ArtifactError as error:
        return unmeasured("golden", error.message)
    return judge_golden(is_passed=result.is_passed, worst_error=result.worst_error, reason=result.reason)


def _compare(case: _Case, wanted: OpenedModel, current: OpenedModel, found: _Findings) -> None:
    is_other = case.changes not in {None, ContractChanges()}
    if "drop" not in found.gates:

        def judge_quality() -> GateResult:
            found.evaluation = measure_drop(wanted, current, case.trial)
            return judge_drop(found.evaluation, case.limits)

        found.gates["drop"] = _tried("drop", judge_quality, is_other=is_other)
    if "latency_ratio" not in found.gates:

        def judge_speed() -> GateResult:
            found.latency = measure_latency(wanted, current, case.trial)
            return judge_latency(found.latency, case.limits)

        found.gates["latency_ratio"] = _tried("latency_ratio", judge_speed, is_other=is_other)


def _tried(gate: GateName, measure: Callable[[], GateResult], *, is_other: bool) -> GateResult:
    """A model that fails on the data fails the gate; so do data that fit only one of two models with different contracts."""
    try:
        return measure()
    except ArtifactError as error:
        return unmeasured(gate, error.message)
    except DataError as error:
        if not is_other:
            raise
        return unmeasured(gate, f"the releases cannot be compared: {error.message}")


# --- publishing -------------------------------------------------------------------------------------------------------------


def _publish(
    case: _Case, report: PromotionReport, delta_maker: DeltaMaker | None, role_keys: Sequence[str], now: datetime
) -> PromotionReport:
    store, wanted = case.store, case.wanted
    with store.locked():
        store.give(role_keys)
        bench = Workbench.open(store, now=now)
        _check_unchanged(bench.chain, case)
        check_recalls(bench, wanted.manifest, wanted.release.manifest_digest)
        source = wanted.release.info
        info = msgspec.structs.replace(
            new_info(bench, wanted.manifest, case.channel, now=now),
            notes=source.notes,
            allows_contract_change=source.allows_contract_change,
            deltas=_deltas(case, bench, delta_maker),
            valid_until=source.valid_until,
            fallback=source.fallback,
        )
        made = add_release(bench, info, wanted.data, action="promote", details=_details(report))
        waiting = tuple(bench.waiting_for(role) for role in bench.pending)
    return msgspec.structs.replace(report, counter=made.info.counter, waiting=waiting)


def _deltas(case: _Case, bench: Workbench, delta_maker: DeltaMaker | None) -> tuple[DeltaRef, ...]:
    """Those that the release has, and further ones from what devices of the channel run."""
    known = {(delta.base, delta.target): delta for delta in case.wanted.release.info.deltas}
    if delta_maker is not None:
        made = delta_maker(case.store.folder, case.wanted.manifest, all_releases(bench), channel=case.channel)
        known = {(delta.base, delta.target): delta for delta in made} | known
    return tuple(known.values())


def _check_unchanged(chain: Chain, case: _Case) -> None:
    head = head_of(releases_of(chain), case.wanted.manifest.name, case.channel)
    before = case.current.release if case.current else None
    if head != before or case.wanted.release not in releases_of(chain):
        raise RepositoryError(
            "promotion.changed",
            f"{case.wanted.what}: somebody published meanwhile; what was measured does not hold any more.",
            hint="Promote it again.",
        )


def _details(report: PromotionReport) -> dict[str, str]:
    """What the audit log keeps of the measurements."""
    details = {"from": report.source, "against": report.against, "reason": report.reason}
    for gate in report.gates:
        parts = [gate.verdict, gate.value, gate.limit, f"({gate.reason})" if gate.reason else ""]
        details[f"gate {gate.gate}"] = " ".join(filter(None, parts))
    if report.evaluation is not None:
        details["data"] = report.evaluation.data
    if report.latency is not None:
        details["host"] = f"{report.latency.host.cpu}, {report.latency.host.runtime} {report.latency.host.runtime_version}"
    return {key: value for key, value in details.items() if value}


def set_gates(folder: Path, gates: Gates, *, is_gated: bool | None = None, now: datetime | None = None) -> None:
    """Change the limits that promotions keep to from now on, and whether the later channels are promoted to only.

    Raises:
        RepositoryError: ``repository.not_found``, ``repository.locked``.
    """
    store = Store.open(folder)
    with store.locked():
        config = store.config
        changed = msgspec.structs.replace(config, gates=gates, is_gated=config.is_gated if is_gated is None else is_gated)
        if changed == config:
            return
        Workbench.open(store, now=whole_second(now))
        details = {"gates": describe_gates(gates), "gated": "yes" if changed.is_gated else "no"}
        audit.append(folder, "gates", folder.name, now=whole_second(now), details=details)
        store.save_config(changed)
