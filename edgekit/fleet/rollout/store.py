"""Rollouts in the database: what was decided, and what is known of each device by what it reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, and_, func, insert, or_, select, update

from edgekit.errors import UsageError
from edgekit.fleet import tables
from edgekit.fleet.rollout.plan import position
from edgekit.fleet.rollout.records import (
    OPEN_STATES,
    DeviceProgress,
    DeviceStage,
    GateReading,
    Progress,
    RolloutSpec,
)
from edgekit.fleet.rollout.tables import rollout_devices, rollouts
from edgekit.fleet.selector import Selector
from edgekit.schema.message import Reported
from edgekit.telemetry.codec import decode

UNSEEN_MS = 7 * 86_400_000
"""A device that was not seen for so long is not asked, until it comes back."""
FAILURES = ("install_refused", "rolled_back", "precheck_failed")
TROUBLES = ("install_failed",)
"""What the device tries again by itself: shown, and a failure only when the deadline is over."""
BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A row of ``rollouts``."""

    id: int
    spec: RolloutSpec
    progress: Progress
    readings: tuple[GateReading, ...]
    waits_for: str
    created_ms: int
    created_by: str
    updated_ms: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A device that a selector names."""

    device_id: int
    site: str
    device: str
    manifest: str
    counter: int


def _rollout(row: Row[Any]) -> Rollout:
    readings = msgspec.msgpack.decode(row.readings, type=tuple[GateReading, ...]) if row.readings else ()
    return Rollout(
        id=row.id,
        spec=msgspec.msgpack.decode(row.spec, type=RolloutSpec),
        progress=msgspec.msgpack.decode(row.progress, type=Progress),
        readings=readings,
        waits_for=row.waits_for,
        created_ms=row.created_ms,
        created_by=row.created_by,
        updated_ms=row.updated_ms,
    )


def load(connection: Connection, rollout_id: int) -> Rollout:
    """One rollout.

    Raises:
        UsageError: ``rollout.unknown``.
    """
    row = connection.execute(select(rollouts).where(rollouts.c.id == rollout_id)).one_or_none()
    if row is None:
        raise UsageError("rollout.unknown", f"rollout {rollout_id}: no such rollout.", hint="edgekit fleet rollout list")
    return _rollout(row)


def load_all(connection: Connection, *, model: str = "", limit: int = 200) -> tuple[Rollout, ...]:
    """Rollouts, newest first."""
    statement = select(rollouts).order_by(rollouts.c.id.desc()).limit(limit)
    if model:
        statement = statement.where(rollouts.c.model == model)
    return tuple(_rollout(row) for row in connection.execute(statement))


def load_active(connection: Connection) -> tuple[Rollout, ...]:
    """Those at which there may be something to do: the open ones, and the newest of each model and selector that is done."""
    found = connection.execute(
        select(rollouts).where(or_(rollouts.c.state.in_(OPEN_STATES), rollouts.c.state == "done")).order_by(rollouts.c.id)
    )
    rollouts_found = [_rollout(row) for row in found]
    newest = {(it.spec.model, it.spec.selector): it.id for it in rollouts_found}
    return tuple(it for it in rollouts_found if it.progress.state != "done" or newest[it.spec.model, it.spec.selector] == it.id)


def create(connection: Connection, spec: RolloutSpec, progress: Progress, *, actor: str, now_ms: int) -> int:
    """A new rollout's number."""
    found = connection.execute(
        insert(rollouts)
        .values(
            model=spec.model,
            manifest=spec.manifest,
            state=progress.state,
            spec=msgspec.msgpack.encode(spec),
            progress=msgspec.msgpack.encode(progress),
            waits_for="",
            created_ms=now_ms,
            created_by=actor,
            updated_ms=now_ms,
        )
        .returning(rollouts.c.id)
    ).scalar_one()
    return int(found)


def save(
    connection: Connection,
    rollout_id: int,
    progress: Progress,
    *,
    now_ms: int,
    readings: Sequence[GateReading] = (),
    waits_for: str = "",
) -> None:
    """Where a rollout stands now."""
    connection.execute(
        update(rollouts)
        .where(rollouts.c.id == rollout_id)
        .values(
            state=progress.state,
            progress=msgspec.msgpack.encode(progress),
            readings=msgspec.msgpack.encode(tuple(readings)),
            waits_for=waits_for[:500],
            updated_ms=now_ms,
        )
    )


def candidates(
    connection: Connection, selector: Selector, dynamic: Mapping[str, str], *, model: str, now_ms: int
) -> tuple[Candidate, ...]:
    """The devices that a rollout of a model may ask: selected, seen lately, and not busy with other models only."""
    row, serves = tables.devices.c, tables.device_models.c
    here = and_(serves.device_id == row.id, serves.model == model)
    any_model = tables.device_models.alias()
    serves_nothing = ~select(any_model.c.device_id).where(any_model.c.device_id == row.id).exists()
    statement = (
        select(row.id, row.site, row.device, serves.manifest_digest, serves.counter)
        .outerjoin(tables.device_models, here)
        .where(selector.clause(dynamic), row.last_seen_ms >= now_ms - UNSEEN_MS)
        .where(or_(serves.device_id.is_not(None), serves_nothing))
        .order_by(row.site, row.device)
    )
    return tuple(
        Candidate(device_id=number, site=site, device=device, manifest=manifest or "", counter=counter or 0)
        for number, site, device, manifest, counter in connection.execute(statement)
    )


def add_devices(connection: Connection, rollout_id: int, spec: RolloutSpec, found: Iterable[Candidate]) -> None:
    """Give devices their place in a rollout."""
    rows = [
        {
            "rollout_id": rollout_id,
            "device_id": item.device_id,
            "position": position(spec.manifest, item.site, item.device),
            "stage": "committed" if item.manifest == spec.manifest else "waiting",
            "previous_counter": item.counter if item.manifest != spec.manifest else 0,
            "previous_manifest": item.manifest if item.manifest != spec.manifest else "",
        }
        for item in found
    ]
    if rows:
        connection.execute(insert(rollout_devices), rows)


def known_devices(connection: Connection, rollout_id: int) -> set[int]:
    """Those that have their place."""
    row = rollout_devices.c
    return set(connection.execute(select(row.device_id).where(row.rollout_id == rollout_id)).scalars())


def taken_by_others(connection: Connection, rollout: Rollout) -> set[int]:
    """Devices that a later rollout of the same model has."""
    row, of = rollout_devices.c, rollouts.c
    statement = (
        select(row.device_id).join(rollouts, of.id == row.rollout_id).where(of.model == rollout.spec.model, of.id > rollout.id)
    )
    return set(connection.execute(statement).scalars())


def device_rows(connection: Connection, rollout: Rollout) -> list[DeviceProgress]:
    """The devices of a rollout, with what they reported since they were asked taken in."""
    row, device, serves = rollout_devices.c, tables.devices.c, tables.device_models.c
    statement = (
        select(
            row.device_id,
            row.position,
            row.stage,
            row.asked_ms,
            row.asked_event,
            row.detail,
            device.site,
            device.device,
            serves.manifest_digest,
        )
        .join(tables.devices, device.id == row.device_id)
        .outerjoin(tables.device_models, and_(serves.device_id == row.device_id, serves.model == rollout.spec.model))
        .where(row.rollout_id == rollout.id)
        .order_by(device.site, device.device)
    )
    rows: list[Any] = list(connection.execute(statement).all())
    open_rows = [item for item in rows if item.stage in {"asked", "committed", "failed"}]
    said = _failures(connection, rollout, open_rows)
    arriving = [item.device_id for item in open_rows if item.manifest_digest == rollout.spec.manifest]
    trying = _on_probation(connection, rollout.spec.model, arriving)
    return [_observed(rollout.spec, item, said.get(item.device_id), item.device_id in trying) for item in rows]


def _observed(spec: RolloutSpec, item: Row[Any], failure: tuple[str, str] | None, is_on_probation: bool) -> DeviceProgress:  # noqa: FBT001
    stage, detail = _stage(spec, item, failure, is_on_probation)
    return DeviceProgress(
        device_id=item.device_id,
        site=item.site,
        device=item.device,
        position=item.position,
        stage=stage,
        asked_ms=item.asked_ms,
        detail=detail[:500],
    )


def _stage(
    spec: RolloutSpec,
    item: Row[Any],
    failure: tuple[str, str] | None,
    is_on_probation: bool,  # noqa: FBT001
) -> tuple[DeviceStage, str]:
    """What a device's own reports make of its stage."""
    serves_it = item.manifest_digest == spec.manifest
    match item.stage:
        case "asked" | "failed" | "committed" if serves_it:
            return ("asked", "on probation") if is_on_probation else ("committed", "")
        case "asked" if failure and failure[0] in FAILURES:
            return "failed", failure[1]
        case "asked" if failure:
            return "asked", failure[1]
        case "committed":
            return "failed", failure[1] if failure else "it serves another release now"
        case "reverting" if not serves_it:
            return "reverted", ""
        case stage:
            return stage, item.detail


def _failures(connection: Connection, rollout: Rollout, rows: Sequence[Row[Any]]) -> dict[int, tuple[str, str]]:
    """The newest failure of this release that each device told since it was asked."""
    asked = {item.device_id: item.asked_event for item in rows}
    if not asked:
        return {}
    log, row, spec = tables.events.c, rollout_devices.c, rollout.spec
    statement = (
        select(log.device_id, log.id, log.kind, log.code, log.detail)
        .join(rollout_devices, and_(row.device_id == log.device_id, row.rollout_id == rollout.id))
        .where(log.kind.in_((*FAILURES, *TROUBLES)), log.model == spec.model, log.counter == spec.counter)
        .where(log.id > min(asked.values()))
        .order_by(log.id)
    )
    found: dict[int, tuple[str, str]] = {}
    for number, event, kind, code, detail in connection.execute(statement):
        final = found.get(number, ("", ""))[0] in FAILURES
        if event > asked.get(number, event) and (kind in FAILURES or not final):
            found[number] = (kind, f"{kind}: {code}: {detail}" if code else f"{kind}: {detail}")
    return found


def _on_probation(connection: Connection, model: str, device_ids: Sequence[int]) -> set[int]:
    row, found = tables.devices.c, set()
    for at in range(0, len(device_ids), BATCH):
        part = device_ids[at : at + BATCH]
        for number, data in connection.execute(select(row.id, row.reported).where(row.id.in_(part))):
            report = decode(data) if data else None
            if isinstance(report, Reported) and model in report.probation:
                found.add(number)
    return found


def save_stages(connection: Connection, rollout_id: int, before: Mapping[int, str], after: Iterable[DeviceProgress]) -> None:
    """Write the stages that changed."""
    row = rollout_devices.c
    for item in after:
        if before.get(item.device_id) != f"{item.stage}:{item.detail}":
            here = (row.rollout_id == rollout_id, row.device_id == item.device_id)
            connection.execute(update(rollout_devices).where(*here).values(stage=item.stage, detail=item.detail))


def stages(connection: Connection, rollout_id: int) -> dict[int, str]:
    """Stage and detail as they were written last, for :func:`save_stages`."""
    row = rollout_devices.c
    found = connection.execute(select(row.device_id, row.stage, row.detail).where(row.rollout_id == rollout_id))
    return {number: f"{stage}:{detail}" for number, stage, detail in found}


def has_waiting(connection: Connection, rollout_id: int) -> bool:
    """Whether any device has not been asked yet."""
    row = rollout_devices.c
    statement = select(row.device_id).where(row.rollout_id == rollout_id, row.stage == "waiting").limit(1)
    return connection.execute(statement).first() is not None


def set_stage(
    connection: Connection, rollout_id: int, device_ids: Sequence[int], stage: DeviceStage, *, asked_ms: int | None = None
) -> None:
    """Note what was done with devices."""
    row = rollout_devices.c
    values: dict[str, Any] = {"stage": stage}
    if asked_ms is not None:
        newest = connection.execute(select(func.max(tables.events.c.id))).scalar() or 0
        values |= {"asked_ms": asked_ms, "asked_event": newest, "detail": ""}
    for at in range(0, len(device_ids), BATCH):
        part = device_ids[at : at + BATCH]
        connection.execute(
            update(rollout_devices).where(row.rollout_id == rollout_id, row.device_id.in_(part)).values(**values)
        )


def previous_of(connection: Connection, rollout_id: int, device_ids: Sequence[int]) -> dict[int, tuple[int, str]]:
    """What devices served before they were asked: counter and manifest."""
    row, found = rollout_devices.c, {}
    for at in range(0, len(device_ids), BATCH):
        part = device_ids[at : at + BATCH]
        statement = select(row.device_id, row.previous_counter, row.previous_manifest)
        for number, counter, manifest in connection.execute(
            statement.where(row.rollout_id == rollout_id, row.device_id.in_(part))
        ):
            found[number] = (counter, manifest)
    return found


def note_previous(connection: Connection, rollout: Rollout, device_ids: Sequence[int]) -> None:
    """Remember what devices serve, right before they are asked."""
    serves, row = tables.device_models.c, rollout_devices.c
    for at in range(0, len(device_ids), BATCH):
        part = device_ids[at : at + BATCH]
        statement = select(serves.device_id, serves.counter, serves.manifest_digest)
        for number, counter, manifest in connection.execute(
            statement.where(
                serves.model == rollout.spec.model, serves.device_id.in_(part), serves.manifest_digest != rollout.spec.manifest
            )
        ).all():
            here = (row.rollout_id == rollout.id, row.device_id == number)
            connection.execute(
                update(rollout_devices).where(*here).values(previous_counter=counter, previous_manifest=manifest)
            )
