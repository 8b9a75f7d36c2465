"""Rollouts at work: one turn at a time looks at what devices reported, decides by :mod:`edgekit.fleet.rollout.plan`, and acts.

A turn writes what was decided, the stages of the devices and their signed desired states in one transaction, and only then
sends. A server that is killed anywhere goes on where it was: no device is asked twice, and none is passed over.

>>> service.start(service.plan(request), actor="operator", reason="faster")  # doctest: +SKIP
12
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import msgspec
from sqlalchemy import Connection, select

from edgekit.errors import UsageError
from edgekit.fleet import audit
from edgekit.fleet.alerting.signals import Signal
from edgekit.fleet.catalog import Catalog
from edgekit.fleet.desired import DesiredDesk, Wish
from edgekit.fleet.groups import Groups
from edgekit.fleet.rollout import gates, plan
from edgekit.fleet.rollout import store as rows
from edgekit.fleet.rollout.records import (
    MINUTE_MS,
    OPEN_STATES,
    DeviceProgress,
    DryRun,
    GateReading,
    Progress,
    RolloutDevicePage,
    RolloutSpec,
    RolloutView,
)
from edgekit.fleet.rollout.tables import experiments
from edgekit.fleet.selector import Selector
from edgekit.fleet.store import Store
from edgekit.schema.desired import DesiredModel
from edgekit.schema.release import Release

logger = logging.getLogger(__name__)

GATE_WINDOW_MS = 30 * MINUTE_MS
"""Figures of the gates are of the last so long, and never from before the wave began."""
DONE_MS = 30_000
"""How often a rollout that is done looks for devices that appeared."""
SYSTEM = "system:rollouts"


class RolloutService:
    """The rollouts of one fleet.

    Args:
        store: the database.
        desk: issues desired states.
        catalog: the releases that may be chosen; None where the server does not know the repository.
        profiles: reference profiles by CRC-32, to read sketches by.
        critical_alerts: how many critical alerts are open for a model.
    """

    def __init__(
        self,
        store: Store,
        desk: DesiredDesk,
        *,
        catalog: Catalog | None,
        profiles: gates.Profiles = lambda _crc: None,
        critical_alerts: Callable[[str], int] = lambda _model: 0,
    ) -> None:
        self._store, self._desk, self._catalog = store, desk, catalog
        self._groups = Groups(store)
        self.profiles, self.critical_alerts = profiles, critical_alerts

    # what is asked for

    def find_release(self, model: str, version: str, *, channel: str = "") -> Release:
        """The newest release of a version that signed metadata lists.

        Raises:
            UsageError: ``rollout.no_catalog``, ``rollout.no_release``.
        """
        if self._catalog is None:
            raise UsageError(
                "rollout.no_catalog",
                "this fleet server does not know the repository, so it knows no release.",
                hint="Start it with --repository URL --repository-root metadata/1.root.json.",
            )
        listed = self._catalog.releases(model=model, channel=channel)
        found = [release for release in listed if release.info.version == version]
        if not found:
            known = ", ".join(dict.fromkeys(release.info.version for release in listed)) or "none"
            where = f" on channel {channel}" if channel else ""
            raise UsageError(
                "rollout.no_release",
                f"{model}@{version}: signed metadata lists no such release{where}.",
                hint=f"It lists {known}. Publish it first: edgekit repo publish.",
            )
        return max(found, key=lambda release: release.info.counter)

    def dry_run(self, spec: RolloutSpec, now_ms: int) -> DryRun:
        """The devices of each wave, by the functions that the rollout itself uses."""
        found = self._candidates(spec, now_ms)
        places = {item.device_id: plan.position(spec.manifest, item.site, item.device) for item in found}
        limits = plan.thresholds(spec.waves, list(places.values()))
        waves: list[list[str]] = [[] for _ in spec.waves]
        for item in found:
            waves[plan.wave_of(places[item.device_id], limits)].append(f"{item.site}/{item.device}")
        totals = [sum(len(wave) for wave in waves[: number + 1]) for number in range(len(waves))]
        return DryRun(
            spec=spec,
            waves=tuple(tuple(wave) for wave in waves),
            has_it=tuple(f"{item.site}/{item.device}" for item in found if item.manifest == spec.manifest),
            allowed_failures=tuple(plan.allowed_failures(spec, total) for total in totals),
        )

    def _candidates(self, spec: RolloutSpec, now_ms: int) -> tuple[rows.Candidate, ...]:
        selector, dynamic = Selector.parse(spec.selector), self._groups.dynamic()
        with self._store.read() as connection:
            return rows.candidates(connection, selector, dynamic, model=spec.model, now_ms=now_ms)

    def start(self, spec: RolloutSpec, *, actor: str, now_ms: int, reason: str = "") -> int:
        """Begin a rollout; its number.

        Raises:
            UsageError: ``rollout.unsigned``, ``rollout.busy``, ``rollout.nobody``.
        """
        if not self._desk.can_sign:
            raise UsageError(
                "rollout.unsigned",
                "this fleet server has no key to sign with: it cannot tell devices what to run.",
                hint="Start it with --fleet-key KEY; devices trust its .pub as fleet_keys.",
            )
        found = self._candidates(spec, now_ms)
        if not found:
            raise UsageError(
                "rollout.nobody",
                f"{spec.model}@{spec.version}: the selector {spec.selector!r} names no device that was seen in the last week.",
                hint='Look with "edgekit fleet devices"; a device that serves other models only is not asked.',
            )
        places = [plan.position(spec.manifest, item.site, item.device) for item in found]
        progress = Progress(wave_began_ms=now_ms, thresholds=plan.thresholds(spec.waves, places))
        with self._store.write() as connection:
            for other in rows.load_all(connection, model=spec.model):
                if other.progress.state in OPEN_STATES:
                    raise UsageError(
                        "rollout.busy",
                        f"rollout {other.id} of {other.spec.model}@{other.spec.version} is {other.progress.state}.",
                        hint=f"End it first: edgekit fleet rollout cancel {other.id}.",
                    )
            _refuse_experiment(connection, spec.model)
            number = rows.create(connection, spec, progress, actor=actor, now_ms=now_ms)
            rows.add_devices(connection, number, spec, found)
            audit.record(
                connection,
                actor=actor,
                action="rollout.started",
                subject=f"rollout:{number}",
                reason=reason,
                now_ms=now_ms,
                fields={"release": f"{spec.model}@{spec.version}", "devices": len(found), "selector": spec.selector},
            )
        logger.info("event=rollout_started rollout=%d release=%s@%s devices=%d", number, spec.model, spec.version, len(found))
        return number

    # turns

    def turn(self, now_ms: int) -> None:
        """One turn of every rollout, then send what is not confirmed yet."""
        with self._store.read() as connection:
            active = rows.load_active(connection)
        for rollout in active:
            is_idle = rollout.progress.state == "done" and now_ms - rollout.updated_ms < DONE_MS
            if rollout.progress.state != "paused" and not is_idle:
                self.turn_of(rollout.id, now_ms)
        self._desk.renew(now_ms)
        self._desk.publish_pending()

    def turn_of(self, rollout_id: int, now_ms: int) -> None:
        """One turn of one rollout: look, decide, write. Nothing is sent here."""
        with self._store.read() as connection:
            rollout = rows.load(connection, rollout_id)
            readings = self._read_gates(rollout, now_ms) if rollout.progress.state == "running" else rollout.readings
        joining = self._newcomers(rollout, now_ms)
        with self._store.write() as connection:
            rollout = rows.load(connection, rollout_id)  # a person may have changed it meanwhile
            rows.add_devices(connection, rollout_id, rollout.spec, joining)
            before = rows.stages(connection, rollout_id)
            devices = rows.device_rows(connection, rollout)
            rows.save_stages(connection, rollout_id, before, devices)
            decision = plan.step(rollout.spec, rollout.progress, devices, readings, now_ms)
            self._act(connection, rollout, decision, now_ms)
            rows.save(
                connection,
                rollout_id,
                decision.progress,
                now_ms=now_ms,
                readings=readings,
                waits_for=decision.waits_for,
            )

    def _newcomers(self, rollout: rows.Rollout, now_ms: int) -> tuple[rows.Candidate, ...]:
        if rollout.progress.state not in {"running", "done"}:
            return ()
        found = self._candidates(rollout.spec, now_ms)
        with self._store.read() as connection:
            known = rows.known_devices(connection, rollout.id) | rows.taken_by_others(connection, rollout)
        return tuple(item for item in found if item.device_id not in known)

    def _act(self, connection: Connection, rollout: rows.Rollout, decision: plan.Decision, now_ms: int) -> None:
        spec = rollout.spec
        if decision.ask:
            release = DesiredModel(counter=spec.counter, manifest=spec.manifest)
            rows.note_previous(connection, rollout, decision.ask)
            self._desk.want(
                connection,
                {number: Wish(model=spec.model, release=release, policy=spec.policy) for number in decision.ask},
                now_ms=now_ms,
            )
            rows.set_stage(connection, rollout.id, decision.ask, "asked", asked_ms=now_ms)
        self._send_back(connection, rollout, decision.revert, now_ms)
        rows.set_stage(connection, rollout.id, decision.revert, "reverting")
        self._send_back(connection, rollout, decision.withdraw, now_ms)
        rows.set_stage(connection, rollout.id, decision.withdraw, "waiting")
        for note in decision.notes:
            logger.warning("event=%s rollout=%d reason=%r", note.action.replace(".", "_"), rollout.id, note.reason)
            audit.record(
                connection,
                actor=SYSTEM,
                action=note.action,
                subject=f"rollout:{rollout.id}",
                reason=note.reason,
                now_ms=now_ms,
            )

    def _send_back(self, connection: Connection, rollout: rows.Rollout, device_ids: Sequence[int], now_ms: int) -> None:
        """Let devices have what they served before; nothing is said of the model where that is not known."""
        if not device_ids:
            return
        before = rows.previous_of(connection, rollout.id, device_ids)
        wishes = {}
        for number in device_ids:
            counter, manifest = before.get(number, (0, ""))
            release = DesiredModel(counter=counter, manifest=manifest) if manifest else None
            wishes[number] = Wish(model=rollout.spec.model, release=release)
        self._desk.want(connection, wishes, now_ms=now_ms)

    def _read_gates(self, rollout: rows.Rollout, now_ms: int) -> tuple[GateReading, ...]:
        if not rollout.spec.gates:
            return ()
        since = max(rollout.progress.wave_began_ms, now_ms - max(GATE_WINDOW_MS, rollout.spec.soak_ms))
        with self._store.read() as connection:
            canary, control = (
                gates.collect(
                    connection,
                    gates.members(rollout.id, stages),
                    model=rollout.spec.model,
                    since_ms=since,
                    profiles=self.profiles,
                )
                for stages in (("committed",), ("waiting",))
            )
        alerts = self.critical_alerts(rollout.spec.model)
        found = tuple(gates.read_gate(gate, canary, control, critical_alerts=alerts) for gate in rollout.spec.gates)
        with self._store.read() as connection:
            is_comparable = rollout.progress.wave == 0 or rows.has_waiting(connection, rollout.id)
        return found if is_comparable else gates.pass_relative(found)

    # what people say

    def _change(
        self, rollout_id: int, action: str, change: Callable[[rows.Rollout], Progress], *, actor: str, reason: str, now_ms: int
    ) -> None:
        with self._store.write() as connection:
            rollout = rows.load(connection, rollout_id)
            progress = change(rollout)
            rows.save(connection, rollout_id, progress, now_ms=now_ms, readings=rollout.readings)
            audit.record(connection, actor=actor, action=action, subject=f"rollout:{rollout_id}", reason=reason, now_ms=now_ms)

    def pause(self, rollout_id: int, *, actor: str, reason: str, now_ms: int) -> None:
        """Ask nobody else for now; those that were asked go on.

        Raises:
            UsageError: ``rollout.unknown``, ``rollout.state``.
        """
        self._change(
            rollout_id, "rollout.paused", lambda it: _to(it, "paused", {"running"}, reason), actor=actor, reason=reason,
            now_ms=now_ms,
        )  # fmt: skip

    def resume(self, rollout_id: int, *, actor: str, reason: str, now_ms: int) -> None:
        """Go on with a rollout that is paused or halted; failures so far are forgiven, silent devices get a new deadline.

        Raises:
            UsageError: ``rollout.unknown``, ``rollout.state``.
        """

        def change(rollout: rows.Rollout) -> Progress:
            after = _to(rollout, "running", {"paused", "halted"}, reason)
            return msgspec.structs.replace(after, forgiven=forgiven, soaking_since_ms=0)

        with self._store.write() as connection:
            rollout = rows.load(connection, rollout_id)
            devices = rows.device_rows(connection, rollout)
            was_halted = rollout.progress.state == "halted"
            failed = sum(device.stage == "failed" for device in devices)
            forgiven = failed if was_halted else rollout.progress.forgiven
            silent = [device.device_id for device in devices if plan.is_silent(rollout.spec, device, now_ms)]
            progress = change(rollout)
            rows.set_stage(connection, rollout_id, silent, "asked", asked_ms=now_ms)
            rows.save(connection, rollout_id, progress, now_ms=now_ms, readings=rollout.readings)
            audit.record(
                connection,
                actor=actor,
                action="rollout.resumed",
                subject=f"rollout:{rollout_id}",
                reason=reason,
                now_ms=now_ms,
                fields={"forgiven": forgiven},
            )

    def approve(self, rollout_id: int, *, actor: str, reason: str = "", now_ms: int) -> None:
        """Let the next wave begin.

        Raises:
            UsageError: ``rollout.unknown``, ``rollout.state``.
        """

        def change(rollout: rows.Rollout) -> Progress:
            after = _to(rollout, "running", {"running"}, rollout.progress.reason)
            return msgspec.structs.replace(after, approved=rollout.progress.wave + 1)

        self._change(rollout_id, "rollout.approved", change, actor=actor, reason=reason, now_ms=now_ms)

    def halt(
        self, rollout_id: int = 0, *, model: str = "", manifest: str = "", actor: str, reason: str, now_ms: int
    ) -> tuple[int, ...]:
        """Nobody else gets it; those that have it keep it. By number, or every rollout under way of a model or release.

        Returns:
            The numbers of those that were halted.

        Raises:
            UsageError: ``rollout.unknown``, ``rollout.state``; by model nothing is no error.
        """
        return self._end("halted", rollout_id, model, manifest, actor=actor, reason=reason, now_ms=now_ms)

    def roll_back(
        self, rollout_id: int = 0, *, model: str = "", manifest: str = "", actor: str, reason: str, now_ms: int
    ) -> tuple[int, ...]:
        """Nobody else gets it, and those that have it are asked back. Arguments and errors as :meth:`halt`."""
        return self._end("rolling_back", rollout_id, model, manifest, actor=actor, reason=reason, now_ms=now_ms)

    def _end(
        self, state: str, rollout_id: int, model: str, manifest: str, *, actor: str, reason: str, now_ms: int
    ) -> tuple[int, ...]:
        may = {"running", "paused"} if state == "halted" else {"running", "paused", "halted", "done"}
        numbers = (rollout_id,) if rollout_id else self._under_way(model, manifest, may)
        action = "rollout.halted" if state == "halted" else "rollout.rolling_back"
        for number in numbers:
            self._change(number, action, lambda it: _to(it, state, may, reason), actor=actor, reason=reason, now_ms=now_ms)
            self.turn_of(number, now_ms)  # those that were asked a moment ago are asked to stay at once
        self._desk.publish_pending()
        return numbers

    def cancel(self, rollout_id: int, *, actor: str, reason: str, now_ms: int) -> None:
        """End a halted rollout for good: what devices have they keep, and another may begin.

        Raises:
            UsageError: ``rollout.unknown``, ``rollout.state``.
        """
        self._change(
            rollout_id, "rollout.cancelled", lambda it: _to(it, "cancelled", {"halted", "paused", "rolling_back"}, reason),
            actor=actor, reason=reason, now_ms=now_ms,
        )  # fmt: skip

    def _under_way(self, model: str, manifest: str, states: Iterable[str]) -> tuple[int, ...]:
        with self._store.read() as connection:
            found = rows.load_all(connection, model=model)
        newest_done = max((it.id for it in found if it.progress.state == "done"), default=0)
        return tuple(
            it.id
            for it in found
            if it.progress.state in states
            and (not manifest or it.spec.manifest == manifest)
            and (it.progress.state != "done" or it.id == newest_done)
        )

    # what is shown

    def views(self, now_ms: int, *, model: str = "") -> tuple[RolloutView, ...]:
        """Every rollout, newest first."""
        with self._store.read() as connection:
            found = rows.load_all(connection, model=model)
            return tuple(self._view(connection, rollout, now_ms) for rollout in found)

    def signals(self, now_ms: int) -> tuple[Signal, ...]:
        """Of rollouts under way: whether one stopped by itself, or waits for longer than its deadline."""
        with self._store.read() as connection:
            active = [it for it in rows.load_active(connection) if it.progress.state in OPEN_STATES]
        found = []
        for it in active:
            labels = {"model": it.spec.model, "version": it.spec.version, "rollout": str(it.id)}
            is_halted = it.progress.state in {"halted", "rolling_back"}
            waited = now_ms - it.progress.wave_began_ms
            is_stalled = it.progress.state == "running" and waited > it.spec.deadline_ms + it.spec.soak_ms
            why: dict[str, str | float] = {"why": it.progress.reason or it.waits_for}
            for name, value in (("rollout.halted", is_halted), ("rollout.stalled", is_stalled)):
                found.append(Signal(name=name, value=float(value), labels=labels, time_ms=now_ms, evidence=why))
        return tuple(found)

    def view(self, rollout_id: int, now_ms: int) -> RolloutView:
        """One rollout.

        Raises:
            UsageError: ``rollout.unknown``.
        """
        with self._store.read() as connection:
            return self._view(connection, rows.load(connection, rollout_id), now_ms)

    @staticmethod
    def _view(connection: Connection, rollout: rows.Rollout, now_ms: int) -> RolloutView:
        devices = rows.device_rows(connection, rollout)
        progress = rollout.progress
        limit = progress.thresholds[progress.wave]
        begun = sum(device.position < limit for device in devices)
        return RolloutView(
            id=rollout.id,
            spec=rollout.spec,
            progress=progress,
            waves=plan.summarize(rollout.spec, progress.thresholds, devices, now_ms),
            gates=rollout.readings or tuple(GateReading(gate=gate, verdict="unknown") for gate in rollout.spec.gates),
            devices=len(devices),
            allowed_failures=plan.allowed_failures(rollout.spec, begun),
            created_ms=rollout.created_ms,
            created_by=rollout.created_by,
            updated_ms=rollout.updated_ms,
            waits_for=rollout.waits_for,
        )

    def devices(self, rollout_id: int, *, stage: str = "", after: str = "", limit: int = 100) -> RolloutDevicePage:
        """A page of a rollout's devices, by site and name.

        Args:
            rollout_id: its number.
            stage: only those at this stage.
            after: the ``next`` of the page before.
            limit: most on a page.

        Raises:
            UsageError: ``rollout.unknown``.
        """
        with self._store.read() as connection:
            found = rows.device_rows(connection, rows.load(connection, rollout_id))
        chosen = [device for device in found if not stage or device.stage == stage]
        rest = [device for device in chosen if _name(device) > after] if after else chosen
        page = rest[:limit]
        return RolloutDevicePage(devices=tuple(page), total=len(chosen), next=_name(page[-1]) if len(rest) > limit else "")


def _refuse_experiment(connection: Connection, model: str) -> None:
    row = experiments.c
    other = connection.execute(select(row.id).where(row.model == model, row.state != "stopped")).scalar()
    if other is not None:
        raise UsageError(
            "rollout.busy",
            f"experiment {other} of {model} is not stopped.",
            hint=f"edgekit fleet experiment stop {other} --keep challenger",
        )


def _name(device: DeviceProgress) -> str:
    return f"{device.site}/{device.device}"


def _to(rollout: rows.Rollout, state: str, may: Iterable[str], reason: str) -> Progress:
    """The progress in another state.

    Raises:
        UsageError: ``rollout.state``.
    """
    if rollout.progress.state not in may:
        raise UsageError(
            "rollout.state",
            f"rollout {rollout.id} is {rollout.progress.state}; this is for one that is {' or '.join(sorted(may))}.",
        )
    return msgspec.structs.replace(rollout.progress, state=state, reason=reason)
