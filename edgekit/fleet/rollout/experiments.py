"""Experiments: two releases side by side on split devices, until an interval that may be looked at any time says enough.

The challenger's devices are asked for it by their desired state, the champion's stay. What is counted are answers of the
release itself, so that a device that has not switched yet counts for nobody.

>>> experiments.start(request, champion=old, challenger=new, actor="operator", now_ms=now)  # doctest: +SKIP
3
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Row, and_, func, insert, select, update

from edgekit.errors import UsageError
from edgekit.fleet import audit, tables
from edgekit.fleet.desired import DesiredDesk, Wish
from edgekit.fleet.groups import Groups
from edgekit.fleet.rollout import store as rows
from edgekit.fleet.rollout.plan import position
from edgekit.fleet.rollout.records import OPEN_STATES
from edgekit.fleet.rollout.sequential import Cluster, Judgement, judge
from edgekit.fleet.rollout.tables import experiment_devices, experiments
from edgekit.fleet.selector import Selector
from edgekit.fleet.store import Store
from edgekit.schema.base import Record
from edgekit.schema.desired import DesiredModel
from edgekit.schema.release import Release

logger = logging.getLogger(__name__)

Metric = Literal["accuracy", "error_share", "rejected_share"]
ExperimentState = Literal["running", "decided", "stopped"]
Arm = Literal["champion", "challenger"]
MIN_DEVICES = 2
DAY_MS = 86_400_000
SYSTEM = "system:experiments"


class ExperimentRequest(Record, frozen=True, kw_only=True):
    """What is asked for: ``champion`` and ``challenger`` are versions of the model."""

    model: str
    champion: str
    challenger: str
    to: str = ""
    split: float = 0.5
    """The challenger's share of the devices."""
    metric: Metric = "accuracy"
    margin: float = 0.02
    """A difference below that is none."""
    alpha: float = 0.05
    days: float = 14.0
    """After that it ends undecided."""
    reason: str = ""


class ExperimentSpec(Record, frozen=True, kw_only=True):
    """An experiment as it runs."""

    request: ExperimentRequest
    champion: DesiredModel
    challenger: DesiredModel


class ExperimentView(Record, frozen=True, kw_only=True):
    """An experiment as people see it."""

    id: int
    spec: ExperimentSpec
    state: ExperimentState
    began_ms: int
    ended_ms: int = 0
    created_by: str = ""
    reason: str = ""
    judgement: Judgement | None = None
    devices: dict[str, int] = {}
    """Of each arm."""
    serving: dict[str, int] = {}
    """Of these, how many serve their release."""


class Experiments:
    """The experiments of one fleet."""

    def __init__(self, store: Store, desk: DesiredDesk) -> None:
        self._store, self._desk, self._groups = store, desk, Groups(store)

    def start(self, request: ExperimentRequest, *, champion: Release, challenger: Release, actor: str, now_ms: int) -> int:
        """Begin: the challenger's devices are asked for it.

        Raises:
            UsageError: ``experiment.request``, ``experiment.busy``, ``rollout.busy``, ``desired.unsigned``.
        """
        _check(request, champion, challenger)
        spec = ExperimentSpec(request=request, champion=_named(champion), challenger=_named(challenger))
        selector, dynamic = Selector.parse(request.to), self._groups.dynamic()
        with self._store.write() as connection:
            _refuse_busy(connection, request.model)
            found = [
                item
                for item in rows.candidates(connection, selector, dynamic, model=request.model, now_ms=now_ms)
                if item.manifest in {spec.champion.manifest, spec.challenger.manifest}
            ]
            salt = f"experiment:{champion.manifest_digest}:{challenger.manifest_digest}"
            arms: dict[int, Arm] = {
                item.device_id: "challenger" if position(salt, item.site, item.device) < request.split else "champion"
                for item in found
            }
            counts = [sum(arm == side for arm in arms.values()) for side in ("champion", "challenger")]
            if min(counts) < MIN_DEVICES:
                raise UsageError(
                    "experiment.request",
                    f"{len(found)} devices serve {request.model}@{request.champion}: {counts[0]} and {counts[1]} on the sides.",
                    hint="Select more devices, or another split; they must serve the champion now.",
                )
            number = _create(connection, spec, actor, now_ms)
            connection.execute(
                insert(experiment_devices),
                [{"experiment_id": number, "device_id": device, "arm": arm} for device, arm in arms.items()],
            )
            self._ask(connection, spec, arms, now_ms)
            audit.record(
                connection,
                actor=actor,
                action="experiment.started",
                subject=f"experiment:{number}",
                reason=request.reason,
                now_ms=now_ms,
                fields={"champion": counts[0], "challenger": counts[1], "metric": request.metric},
            )
        self._desk.publish_pending()
        return number

    def _ask(self, connection: Connection, spec: ExperimentSpec, arms: dict[int, Arm], now_ms: int) -> None:
        release = {"champion": spec.champion, "challenger": spec.challenger}
        wishes = {device: Wish(model=spec.request.model, release=release[arm]) for device, arm in arms.items()}
        self._desk.want(connection, wishes, now_ms=now_ms)

    def turn(self, now_ms: int) -> None:
        """Judge every experiment that runs; one that says enough, or has run for its time, is decided."""
        with self._store.read() as connection:
            running = [_read(row) for row in connection.execute(select(experiments).where(experiments.c.state == "running"))]
            judged = [(number, spec, began, _judge(connection, number, spec, began)) for number, spec, began in running]
        for number, spec, began, judgement in judged:
            is_over = now_ms - began > spec.request.days * DAY_MS
            is_decided = judgement.verdict != "keep going" or is_over
            with self._store.write() as connection:
                values: dict[str, Any] = {"judgement": msgspec.msgpack.encode(judgement)}
                if is_decided:
                    reason = judgement.verdict if judgement.verdict != "keep going" else "its time is over, undecided"
                    values |= {"state": "decided", "ended_ms": now_ms, "reason": reason}
                    audit.record(
                        connection, actor=SYSTEM, action="experiment.decided", subject=f"experiment:{number}",
                        reason=reason, now_ms=now_ms,
                    )  # fmt: skip
                here = (experiments.c.id == number, experiments.c.state == "running")
                connection.execute(update(experiments).where(*here).values(**values))

    def stop(self, number: int, *, keep: Arm | None, actor: str, reason: str, now_ms: int) -> None:
        """End it: every device goes to one of the two releases, or stays with what it has.

        A device goes back to the champion as far as its other slot; a challenger that won is better rolled out in waves.

        Raises:
            UsageError: ``experiment.unknown``, ``experiment.state``, ``desired.unsigned``.
        """
        with self._store.write() as connection:
            row = _load(connection, number)
            _, spec, _ = _read(row)
            if row.state == "stopped":
                raise UsageError("experiment.state", f"experiment {number} is over.")
            if keep is not None:
                devices = connection.execute(
                    select(experiment_devices.c.device_id).where(experiment_devices.c.experiment_id == number)
                ).scalars()
                self._ask(connection, spec, dict.fromkeys(devices, keep), now_ms)
            connection.execute(
                update(experiments)
                .where(experiments.c.id == number)
                .values(state="stopped", ended_ms=row.ended_ms or now_ms, reason=(reason or row.reason)[:2000])
            )
            audit.record(
                connection, actor=actor, action="experiment.stopped", subject=f"experiment:{number}", reason=reason,
                now_ms=now_ms, fields={"keep": keep},
            )  # fmt: skip
        self._desk.publish_pending()

    def views(self) -> tuple[ExperimentView, ...]:
        """Every experiment, newest first."""
        with self._store.read() as connection:
            found = connection.execute(select(experiments).order_by(experiments.c.id.desc()).limit(100)).all()
            return tuple(_view(connection, row) for row in found)

    def view(self, number: int) -> ExperimentView:
        """One experiment.

        Raises:
            UsageError: ``experiment.unknown``.
        """
        with self._store.read() as connection:
            return _view(connection, _load(connection, number))


def _check(request: ExperimentRequest, champion: Release, challenger: Release) -> None:
    if champion.manifest_digest == challenger.manifest_digest:
        raise UsageError("experiment.request", f"{request.champion} and {request.challenger} are the same release.")
    if challenger.info.counter < champion.info.counter:
        raise UsageError(
            "experiment.request",
            f"{request.challenger} is older than {request.champion}: devices do not install older releases.",
            hint="Let the newer one be the challenger.",
        )
    if not 0 < request.split < 1 or not 0 < request.alpha < 1 or request.margin <= 0 or request.days <= 0:
        raise UsageError("experiment.request", "split and alpha lie between 0 and 1, margin and days above 0.")


def _named(release: Release) -> DesiredModel:
    return DesiredModel(counter=release.info.counter, manifest=release.manifest_digest)


def _refuse_busy(connection: Connection, model: str) -> None:
    row = experiments.c
    other = connection.execute(select(row.id).where(row.model == model, row.state != "stopped")).scalar()
    if other is not None:
        hint = f"edgekit fleet experiment stop {other}"
        raise UsageError("experiment.busy", f"experiment {other} of {model} is not stopped.", hint=hint)
    for rollout in rows.load_all(connection, model=model):
        if rollout.progress.state in OPEN_STATES:
            raise UsageError("rollout.busy", f"rollout {rollout.id} of {model} is {rollout.progress.state}.")


def _create(connection: Connection, spec: ExperimentSpec, actor: str, now_ms: int) -> int:
    return int(
        connection.execute(
            insert(experiments)
            .values(
                model=spec.request.model,
                state="running",
                spec=msgspec.msgpack.encode(spec),
                began_ms=now_ms,
                created_by=actor,
                ended_ms=0,
                reason="",
            )
            .returning(experiments.c.id)
        ).scalar_one()
    )


def _load(connection: Connection, number: int) -> Row[Any]:
    row = connection.execute(select(experiments).where(experiments.c.id == number)).one_or_none()
    if row is None:
        raise UsageError("experiment.unknown", f"experiment {number}: no such experiment.")
    return row


def _read(row: Row[Any]) -> tuple[int, ExperimentSpec, int]:
    return row.id, msgspec.msgpack.decode(row.spec, type=ExperimentSpec), row.began_ms


def _view(connection: Connection, row: Row[Any]) -> ExperimentView:
    number, spec, began = _read(row)
    side, serves = experiment_devices.c, tables.device_models.c
    counted = dict(
        tuple(item)
        for item in connection.execute(select(side.arm, func.count()).where(side.experiment_id == number).group_by(side.arm))
    )
    manifests = {"champion": spec.champion.manifest, "challenger": spec.challenger.manifest}
    serving = {}
    for arm, manifest in manifests.items():
        statement = (
            select(func.count())
            .select_from(experiment_devices)
            .join(tables.device_models, serves.device_id == side.device_id)
            .where(side.experiment_id == number, side.arm == arm, serves.manifest_digest == manifest)
        )
        serving[arm] = int(connection.execute(statement).scalar() or 0)
    judgement = msgspec.msgpack.decode(row.judgement, type=Judgement) if row.judgement else None
    if row.state == "running":
        judgement = _judge(connection, number, spec, began)
    return ExperimentView(
        id=number,
        spec=spec,
        state=row.state,
        began_ms=began,
        ended_ms=row.ended_ms,
        created_by=row.created_by,
        reason=row.reason,
        judgement=judgement,
        devices={arm: int(count) for arm, count in counted.items()},
        serving=serving,
    )


def _judge(connection: Connection, number: int, spec: ExperimentSpec, began_ms: int) -> Judgement:
    request = spec.request
    return judge(
        _clusters(connection, number, "champion", spec.champion.manifest, request, began_ms),
        _clusters(connection, number, "challenger", spec.challenger.manifest, request, began_ms),
        margin=request.margin,
        alpha=request.alpha,
        higher_is_better=request.metric == "accuracy",
    )


def _clusters(  # noqa: PLR0917 - one query's parts
    connection: Connection, number: int, arm: Arm, manifest: str, request: ExperimentRequest, began_ms: int
) -> list[Cluster]:
    """What each device of an arm counted, of windows in which it served its arm's release."""
    row, serves, side = tables.model_windows.c, tables.device_models.c, experiment_devices.c
    hits, trials = {
        "accuracy": (row.right, row.labelled),
        "error_share": (row.errors, row.requests),
        "rejected_share": (row.rejected, row.requests),
    }[request.metric]
    statement = (
        select(func.sum(hits), func.sum(trials))
        .join(experiment_devices, and_(side.device_id == row.device_id, side.experiment_id == number, side.arm == arm))
        .join(tables.device_models, and_(serves.device_id == row.device_id, serves.model_digest == row.model_digest))
        .where(serves.model == request.model, serves.manifest_digest == manifest, row.start_ms >= began_ms)
        .group_by(row.device_id)
    )
    return [Cluster(hits=int(hit or 0), trials=int(tried or 0)) for hit, tried in connection.execute(statement)]
