"""Watches every model that windows come from: one run adds up what is new, goes on with the detectors, writes what they found.

An interval is judged ``GRACE_MS`` after its end. Windows that come later, up to ``HORIZON_MS`` late, are added to their own
interval, and the detectors go back to a state before it and forward again: the result is what it would have been had they come
in time. Sums are always made anew from the windows themselves, and everything that a run changes is one transaction that also
deletes the marks it dealt with: a run may be killed at any moment, and no window is ever counted twice or forgotten.

>>> from edgekit.fleet.store import Store
>>> Watch(Store("sqlite://")).run(now_ms=0)
0
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, func, select, update

from edgekit.errors import EdgekitError, UsageError
from edgekit.fleet import audit, tables
from edgekit.fleet.config import DEFAULT_GRACE_S
from edgekit.fleet.watch import pages, store
from edgekit.fleet.watch.findings import find
from edgekit.fleet.watch.reading import DeviceFacts, Folded, fold, model_names, profiles_in, read_windows
from edgekit.fleet.watch.tables import MARK_MS, watch_facts, watch_intervals, watches
from edgekit.fleet.watch.views import Budget, DriftPage, Finding, QualityPage, VersionsPage, VersionView
from edgekit.monitor.intervals import Interval
from edgekit.monitor.replay import RecordedWindow
from edgekit.monitor.sketch import bare_profile
from edgekit.monitor.watcher import Watcher, WatchRule, WatchState
from edgekit.schema.baseline import ReferenceProfile
from edgekit.schema.digest import hex_of

if TYPE_CHECKING:
    from edgekit.fleet.alerting.signals import Signal
    from edgekit.fleet.catalog import Catalog
    from edgekit.fleet.services import Services
    from edgekit.fleet.store import Store

logger = logging.getLogger(__name__)

PERIOD_S = 30.0
PRUNE_S = 3600.0
GRACE_MS = round(DEFAULT_GRACE_S * 1000)
HORIZON_MS = 48 * 3_600_000
KEEP_MS = 35 * 86_400_000
"""How long sums are kept."""
SNAPSHOT_EVERY = 36
"""Intervals between two kept states."""
MAX_INTERVALS = 96
"""Of one model in one run; the rest comes in the next."""
DIGEST_DIGITS = 12
MAX_WATCHERS = 64
MIN_INTERVAL_S = MARK_MS // 1000
_NO_PROFILE = ReferenceProfile(samples=0, streams=())


@dataclass
class _Work:
    """What one model needs: its changed intervals, the marks they come from, and those that wait."""

    intervals: set[int] = field(default_factory=set)
    done: list[int] = field(default_factory=list)
    waiting: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)
    digests: set[str] = field(default_factory=set)


class Watch:
    """The watch over all models. Runs in one thread at a time; pages may be asked for from others.

    Args:
        fleet: where windows are.
        catalog: where references come from; None: from :meth:`add_profile` only.
        grace_ms: how long after its end an interval is judged.
    """

    def __init__(self, fleet: Store, catalog: Catalog | None = None, *, grace_ms: int = GRACE_MS) -> None:
        self._store, self._catalog, self._grace_ms = fleet, catalog, grace_ms
        self._watchers: dict[tuple[str, int, WatchRule], Watcher] = {}
        self._asked: dict[str, int] = {}

    # what people ask

    def budget(self, model: str) -> Budget:
        """What is asked of the watch on a model."""
        with self._store.read() as connection:
            return store.read_budget(connection, model)

    def set_budget(self, model: str, budget: Budget, *, actor: str, now_ms: int, reason: str = "") -> None:
        """Ask something else of the watch on a model; another interval or other slices begin the detectors anew.

        Raises:
            UsageError: ``watch.budget``.
        """
        check_budget(budget)
        with self._store.write() as connection:
            before = store.read_budget(connection, model)
            store.write_budget(connection, model, budget)
            if (before.interval_s, before.slices) != (budget.interval_s, budget.slices):
                self._restart(connection, model, now_ms)
            audit.record(
                connection,
                actor=actor,
                action="watch.changed",
                subject=f"model:{model}",
                reason=reason,
                now_ms=now_ms,
                fields={"alarms": budget.alarms, "days": budget.days, "interval_s": budget.interval_s},
            )

    def _restart(self, connection: Connection, model: str, now_ms: int) -> None:
        """Begin anew, with the windows of the horizon."""
        for row in store.read_watches(connection, model):
            store.forget_intervals(connection, row.id)
            interval_ms = store.read_budget(connection, model).interval_s * 1000
            store.save_state(connection, row, state=None, frontier_ms=-1, now_ms=now_ms)
            connection.execute(update(watches).where(watches.c.id == row.id).values(interval_ms=interval_ms))
        names = [known.model_digest for known in store.read_profiles(connection, model)]
        row_ = tables.devices.c
        names += list(connection.execute(select(row_.model_digest).where(row_.model == model).distinct()).scalars())
        self._mark_again(connection, names, now_ms)

    @staticmethod
    def _mark_again(connection: Connection, digests: Iterable[str], now_ms: int) -> None:
        row = tables.model_windows.c
        for digest in sorted(set(digests)):
            statement = select(func.min(row.start_ms), func.max(row.start_ms)).where(
                row.model_digest == digest, row.start_ms >= now_ms - HORIZON_MS
            )
            first, last = connection.execute(statement).one()
            if first is not None:
                store.add_marks(connection, [(digest, first - first % MARK_MS, last - last % MARK_MS)])

    def add_profile(
        self,
        profile: ReferenceProfile,
        *,
        crc: int,
        model_digest: str,
        model: str,
        now_ms: int,
        version: str = "",
        labels: Sequence[str] = (),
        size_bytes: int = 0,
    ) -> None:
        """Make a reference known; windows that were counted with it before are judged then.

        Args:
            profile: of the release.
            crc: CRC-32 of the profile as it travels, 0 for one that only counts answers.
            model_digest: of the model's file.
            model: its name.
            now_ms: Unix time in milliseconds.
            version: of the release.
            labels: names of its classes.
            size_bytes: of its model file.
        """
        known = store.KnownProfile(
            crc=crc,
            model_digest=model_digest.removeprefix("sha256:")[:DIGEST_DIGITS],
            model=model,
            version=version,
            size_bytes=size_bytes,
            labels=tuple(labels),
            profile=profile,
            added_ms=now_ms,
        )
        with self._store.write() as connection:
            self._keep_profile(connection, known, now_ms)

    def _keep_profile(self, connection: Connection, known: store.KnownProfile, now_ms: int) -> None:
        others = {item.crc for item in store.read_profiles(connection, known.model)}
        store.write_profile(connection, known)
        self._watchers.clear()
        row = next((item for item in store.read_watches(connection, known.model) if item.crc == known.crc), None)
        if row is not None and known.crc not in others:  # it was watched without: begin anew with it
            store.forget_intervals(connection, row.id)
            store.save_state(connection, row, state=None, frontier_ms=-1, now_ms=now_ms)
            self._mark_again(connection, [known.model_digest], now_ms)

    # the job

    def run(self, now_ms: int) -> int:
        """Judge what is new.

        Returns:
            How many intervals were judged, again or for the first time.
        """
        started = time.monotonic()
        with self._store.read() as connection:
            marks = store.read_marks(connection)
            names = store.profile_names(connection) | model_names(connection, sorted({mark.model_digest for mark in marks}))
        work = self._sort(marks, names, now_ms)
        judged = 0
        for model, part in work.items():
            self._learn_profiles(model, part.digests, now_ms)
            judged += self._run_model(model, part, names, now_ms)
        if judged:
            spent_ms = round((time.monotonic() - started) * 1000)
            logger.info("event=watched intervals=%d models=%d ms=%d", judged, len(work), spent_ms)
        return judged

    def _sort(self, marks: Sequence[store.Mark], names: Mapping[str, tuple[str, str]], now_ms: int) -> dict[str, _Work]:
        """Which intervals of which models changed; models that no device has reported yet are called by their digest."""
        work: dict[str, _Work] = {}
        with self._store.read() as connection:
            budgets: dict[str, int] = {}
            for mark in marks:
                model = names.get(mark.model_digest, (mark.model_digest, ""))[0]
                if model not in budgets:
                    budgets[model] = store.read_budget(connection, model).interval_s * 1000
                part = work.setdefault(model, _Work())
                part.digests.add(mark.model_digest)
                self._sort_mark(part, mark, budgets[model], now_ms)
        for part in work.values():
            self._limit(part)
        return work

    def _sort_mark(self, part: _Work, mark: store.Mark, interval_ms: int, now_ms: int) -> None:
        """A mark's intervals that can be judged; the rest of it waits as a mark of its own."""
        ready_until = (now_ms - self._grace_ms) // interval_ms * interval_ms
        first = max(mark.start_ms, (now_ms - HORIZON_MS) // interval_ms * interval_ms)
        start = first - first % interval_ms
        while start <= mark.end_ms and start < ready_until:
            part.intervals.add(start)
            start += interval_ms
        is_whole = mark.start_ms >= ready_until
        if mark.end_ms >= ready_until:
            rest = part.waiting.setdefault((mark.model_digest, max(mark.start_ms, ready_until), mark.end_ms), [])
            if is_whole:
                rest.append(mark.id)
        if not is_whole:
            part.done.append(mark.id)

    @staticmethod
    def _limit(part: _Work) -> None:
        """Take on no more than a run's share, the oldest first; what is left is marked anew."""
        left = sorted(part.intervals)[MAX_INTERVALS:]
        if left:
            part.intervals -= set(left)
            digest = min(part.digests)
            for start in left:
                part.waiting.setdefault((digest, start, start), [])

    def _run_model(self, model: str, part: _Work, names: Mapping[str, tuple[str, str]], now_ms: int) -> int:
        with self._store.read() as connection:
            budget = store.read_budget(connection, model)
            known = store.read_profiles(connection, model)
            interval_ms = budget.interval_s * 1000
            digests = {digest: version for digest, (name, version) in names.items() if name == model}
            digests |= {item.model_digest: item.version for item in known}
            digests |= {digest: digest for digest in part.digests if digest not in digests}
            facts = DeviceFacts(connection, budget.slices) if part.intervals else None
            folded = (
                self._fold_all(connection, part.intervals, digests=digests, known=known, facts=facts, interval_ms=interval_ms)
                if facts
                else {}
            )
        plans = [
            self._plan(model, crc, found, known=known, budget=budget, now_ms=now_ms) for crc, found in sorted(folded.items())
        ]
        with self._store.write() as connection:
            if not all(plan(connection) for plan in plans):
                logger.warning("event=watch_overtaken model=%s", model)
                connection.rollback()
                return 0
            self._settle(connection, part)
        return len(part.intervals)

    @staticmethod
    def _settle(connection: Connection, part: _Work) -> None:
        """Delete the marks that were dealt with; those that wait become one for each stretch."""
        ids = list(part.done)
        fresh = []
        for rest, found in part.waiting.items():
            if len(found) != 1:
                fresh.append(rest)
                ids += found
        store.add_marks(connection, fresh)
        store.drop_marks(connection, ids)

    @staticmethod
    def _fold_all(
        connection: Connection,
        intervals: set[int],
        *,
        digests: Mapping[str, str],
        known: Sequence[store.KnownProfile],
        facts: DeviceFacts,
        interval_ms: int,
    ) -> dict[int, dict[int, Folded | None]]:
        """By profile and interval; None for an interval that has no windows any more."""
        by_crc = {item.crc: item.profile for item in known}
        if not intervals:
            return {}
        crcs = profiles_in(connection, list(digests), min(intervals), max(intervals) + interval_ms)
        return {
            crc: {
                start: fold(
                    connection,
                    by_crc.get(crc, _NO_PROFILE),
                    crc=crc,
                    versions=digests,
                    facts=facts,
                    start_ms=start,
                    end_ms=start + interval_ms,
                )
                for start in sorted(intervals)
            }
            for crc in crcs
        }

    def _plan(
        self,
        model: str,
        crc: int,
        found: Mapping[int, Folded | None],
        *,
        known: Sequence[store.KnownProfile],
        budget: Budget,
        now_ms: int,
    ) -> Callable[[Connection], bool]:
        """Judge a watch's changed intervals; gives the writing of it, which says False when another server was faster."""
        interval_ms = budget.interval_s * 1000
        with self._store.write() as connection:
            row = store.make_watch(connection, model=model, crc=crc, interval_ms=interval_ms, now_ms=now_ms)
        watcher = self.watcher(model, crc, next((item for item in known if item.crc == crc), None), budget)
        first = min(found)
        with self._store.read() as connection:
            state, frontier = watcher.start(), -1
            if row.state is not None and row.frontier_ms < first:
                state, frontier = WatchState.decode(row.state), row.frontier_ms
            elif (snapshot := store.newest_snapshot(connection, row.id, before_ms=first)) is not None:
                frontier, state = snapshot[0], WatchState.decode(snapshot[1])
            stored = store.read_intervals(connection, row.id, after_ms=frontier)
        for start, item in found.items():
            if item is None:
                stored.pop(start, None)
            else:
                stored[start] = item.interval
        run = _Run(watcher, state)
        for start in sorted(stored):
            run.take(stored[start])
        findings = find(watcher, run.state, [stored[start] for start in sorted(stored)], now_ms=now_ms)

        def write(connection: Connection) -> bool:
            state_ = run.state.encode()
            if not store.save_state(connection, row, state=state_, frontier_ms=run.state.frontier_ms, now_ms=now_ms):
                return False
            for start, item in found.items():
                store.write_interval(connection, row.id, start, item)
            store.write_evidence(connection, row.id, run.evidence)
            keep_ms = now_ms - HORIZON_MS - interval_ms * SNAPSHOT_EVERY
            store.write_snapshots(connection, row.id, run.snapshots, from_ms=first, keep_ms=keep_ms)
            store.write_findings(connection, row.id, findings, now_ms=now_ms)
            return True

        return write

    def watcher(self, model: str, crc: int, known: store.KnownProfile | None, budget: Budget) -> Watcher:
        """The engine for a model's windows with one reference; None: without any, for labels and contract alone."""
        rule = WatchRule(
            alarms=budget.alarms, days=budget.days, effect_floor=budget.effect_floor, interval_s=float(budget.interval_s)
        )
        key = (model, crc if known else -1, rule)
        if key not in self._watchers:
            if len(self._watchers) > MAX_WATCHERS:
                self._watchers.clear()
            made = Watcher(known.profile, rule, known.labels) if known else Watcher(_NO_PROFILE, rule)
            self._watchers[key] = made
        return self._watchers[key]

    # references out of the catalog

    def _learn_profiles(self, model: str, digests: Iterable[str], now_ms: int) -> None:
        """Take the references of models that are new from the catalog; what it does not have is asked for again later."""
        if self._catalog is None:
            return
        with self._store.read() as connection:
            have = store.known_profiles(connection)
        for digest in sorted(digests):
            if any(known == digest for _crc, known in have) or self._asked.get(digest, -math.inf) > now_ms - 300_000:
                continue
            self._asked[digest] = now_ms
            try:
                self._take_profile(self._catalog, digest, model, now_ms)
            except EdgekitError as error:
                logger.warning("event=reference_unread model=%s code=%s error=%r", model, error.code, error.message)

    def _take_profile(self, catalog: Catalog, digest: str, model: str, now_ms: int) -> None:
        ref = catalog.by_model_digest(digest)
        if ref is None:
            return
        manifest = catalog.manifest(ref.release)
        size = next((blob.size_bytes for blob in manifest.blobs if hex_of(blob.digest).startswith(digest)), 0)
        found = catalog.profile(ref.release.manifest_digest)
        if found is None:
            bare = bare_profile(manifest.contract)
            found = (bare, 0) if bare is not None else None
        if found is not None:
            self.add_profile(
                found[0],
                crc=found[1],
                model_digest=digest,
                model=ref.release.info.name or model,
                version=ref.release.info.version,
                labels=manifest.contract.labels,
                size_bytes=size,
                now_ms=now_ms,
            )

    def prune(self, now_ms: int) -> int:
        """Drop sums that are older than ``KEEP_MS``."""
        dropped = 0
        with self._store.write() as connection:
            for table in (watch_intervals, watch_facts):
                dropped += connection.execute(delete(table).where(table.c.start_ms < now_ms - KEEP_MS)).rowcount
        return dropped

    # what is shown

    def models(self) -> tuple[str, ...]:
        """The models that are watched."""
        with self._store.read() as connection:
            return tuple(sorted({row.model for row in store.read_watches(connection)}))

    def drift(self, model: str, since_ms: int, *, now_ms: int, slice_name: str = "") -> DriftPage:
        """The drift page of a model: all streams of ``all``, and of other slices those that drift, or of one slice all.

        Args:
            model: its name.
            since_ms: what counts as recent.
            now_ms: Unix time in milliseconds.
            slice_name: show this slice.
        """
        return pages.drift_page(self, self._store, model, since_ms=since_ms, now_ms=now_ms, slice_name=slice_name)

    def quality(self, model: str, *, now_ms: int, since_ms: int = 0) -> QualityPage:
        """The quality page of a model; of the last day without ``since_ms``."""
        return pages.quality_page(self, self._store, model, since_ms=since_ms or now_ms - pages.DAY_MS, now_ms=now_ms)

    def versions(self, model: str, *, now_ms: int, since_ms: int = 0) -> tuple[VersionView, ...]:
        """Versions beside each other, by class of devices; of the last day without ``since_ms``."""
        return self.versions_page(model, now_ms=now_ms, since_ms=since_ms).versions

    def versions_page(self, model: str, *, now_ms: int, since_ms: int = 0) -> VersionsPage:
        """The same with its time."""
        return pages.versions_page(self, self._store, model, since_ms=since_ms or now_ms - pages.DAY_MS, now_ms=now_ms)

    def signals(self, now_ms: int) -> Iterable[Signal]:
        """What alert rules watch."""
        from edgekit.fleet.watch.sources import signals  # noqa: PLC0415 - it needs this class

        return signals(self, now_ms)

    def export(self, model: str, *, since_ms: int, until_ms: int) -> Iterator[RecordedWindow]:
        """Windows of a model as devices sent them, oldest first, for ``edgekit monitor replay``."""
        with self._store.read() as connection:
            budget = store.read_budget(connection, model)
            names = store.profile_names(connection)
            row = tables.device_models.c
            statement = select(row.model_digest, row.version).where(row.model == model).distinct()
            digests = {item.model_digest: item.version for item in connection.execute(statement)}
            digests |= {digest: version for digest, (name, version) in names.items() if name == model}
            facts = DeviceFacts(connection, budget.slices)
            yield from read_windows(connection, digests, facts, since_ms=since_ms, until_ms=until_ms)

    def findings(self, model: str = "") -> tuple[Finding, ...]:
        """What was found and lasts, of a model or of all."""
        return pages.open_findings(self._store, model)


class _Run:
    """Detectors going over intervals, with what is kept on the way."""

    def __init__(self, watcher: Watcher, state: WatchState) -> None:
        self._watcher, self.state = watcher, state
        self.snapshots: dict[int, bytes] = {}
        self.evidence: dict[int, tuple[tuple[str, ...], list[float]]] = {}

    def take(self, interval: Interval) -> None:
        """One more."""
        self.state = self._watcher.advance(self.state, interval)
        self.evidence[interval.start_ms] = (self.state.slices, self._watcher.evidence(self.state))
        if self.state.bank is not None and self.state.bank.steps % SNAPSHOT_EVERY == 0:
            self.snapshots[interval.start_ms] = self.state.encode()


def check_budget(budget: Budget) -> None:
    """See that a budget can be kept.

    Raises:
        UsageError: ``watch.budget``.
    """
    problems = [
        (not (budget.alarms > 0 and math.isfinite(budget.alarms)), "alarms: expected a number above 0"),
        (not (0 < budget.days <= 3660), "days: expected a number above 0, at most 3660"),
        (not (0 <= budget.effect_floor < 1), "effect_floor: expected nats a sample, from 0 to below 1"),
        (
            budget.interval_s < MIN_INTERVAL_S or budget.interval_s % MIN_INTERVAL_S != 0 or budget.interval_s > 86_400,
            f"interval_s: expected a multiple of {MIN_INTERVAL_S}, at most 86400",
        ),
    ]
    known = {"site", "arch", "release", "group"}
    problems += [
        (
            name not in known and not (name.startswith("label.") and len(name) > 6 and "," not in name),
            f"slice {name!r}: no such",
        )
        for name in budget.slices
    ]
    for is_wrong, text in problems:
        if is_wrong:
            hint = (
                "For example alarms 1, days 30, effect_floor 0.002, interval_s 600, slices site, arch, release, label.camera."
            )
            raise UsageError("watch.budget", f"budget: {text}.", hint=hint)


def open_watch(services: Services) -> Watch:
    """The watch of a server, with its job."""
    grace_s = services.config.watch_grace_s
    watch = Watch(services.store, services.catalog, grace_ms=round(grace_s * 1000))
    services.jobs.every(max(1.0, min(PERIOD_S, grace_s)), "watch", lambda: _turn(watch))
    services.jobs.every(PRUNE_S, "watch-prune", lambda: _prune(watch))
    return watch


def _turn(watch: Watch) -> None:
    watch.run(time.time_ns() // 1_000_000)


def _prune(watch: Watch) -> None:
    watch.prune(time.time_ns() // 1_000_000)
