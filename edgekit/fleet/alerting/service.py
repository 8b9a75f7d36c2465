"""Alerts at work: a turn gathers the signals, decides by the engine, writes, acts; another sends what is to be delivered.

What an alert became and what is to be delivered of it are one transaction, a delivery is tried until it is taken or given up,
and an action counts as done when it was: a server that is killed in between goes on where it was. The receiver knows a message
that comes twice by its id, and the actions may be taken twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from edgekit.errors import EdgekitError, UsageError
from edgekit.fleet import audit
from edgekit.fleet.alerting import engine
from edgekit.fleet.alerting.delivery import Courier, Message, make_message, shown
from edgekit.fleet.alerting.engine import REOPEN_MS, ActionDue, Alert, Notification, Outcome, Silence
from edgekit.fleet.alerting.rules import Contact, Level, load_rules
from edgekit.fleet.alerting.signals import Signal, Source
from edgekit.fleet.alerting.tables import alert_events, alerts, deliveries, silences
from edgekit.fleet.alerting.views import AlertEvent, AlertPage, AlertView, DeliveryView
from edgekit.fleet.services import Services
from edgekit.fleet.tables import upsert

if TYPE_CHECKING:
    from edgekit.fleet.work.orders import WorkKind

logger = logging.getLogger(__name__)

SYSTEM = "system:alerts"
MAX_ATTEMPTS = 8
FIRST_RETRY_MS = 15_000
BATCH = 50
RECENT_MS = 60_000
COOL_DOWN_MS = 3_600_000
"""The same action on the same model is taken once in so long."""
_NEVER = frozenset({"delivery.address", "delivery.private", "delivery.no_contact"})


class Alerts:
    """The alerts of one fleet.

    Args:
        services: for the actions, and whose parts offer signals.
        sources: what gathers the signals.
        courier: delivers.
        base_url: of the dashboard, for links.
    """

    def __init__(
        self, services: Services, *, sources: Sequence[Source], courier: Courier | None = None, base_url: str = ""
    ) -> None:
        """Read the rules.

        Raises:
            UsageError: ``rules.unreadable``, ``rules.malformed``.
        """
        self._services, self._store = services, services.store
        self.sources, self.courier, self._base_url = list(sources), courier or Courier(), base_url
        self._rules_file = services.config.rules
        self.book = load_rules(self._rules_file)
        self._stamp = self._file_stamp()
        self.rules_error = ""
        self._gathered: tuple[int, list[Signal]] = (0, [])

    # rules

    def _file_stamp(self) -> tuple[int, int]:
        try:
            found = Path(self._rules_file).stat() if self._rules_file else None
        except OSError:
            return (0, 0)
        return (found.st_mtime_ns, found.st_size) if found else (0, 0)

    def reload(self) -> None:
        """Read the rules again when the file changed; a mistake in it leaves the former ones."""
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.book = load_rules(self._rules_file)
        except UsageError as error:
            self.rules_error = error.message
            logger.error("event=rules_refused error=%r", error.message)  # noqa: TRY400 - it says all
            return
        self.rules_error = ""
        logger.info("event=rules_loaded rules=%d", len(self.book.rules))

    # turns

    def gather(self, now_ms: int) -> list[Signal]:
        """Every signal of now; a source that fails is logged, and the others still speak."""
        found: list[Signal] = []
        for source in self.sources:
            try:
                found.extend(source(now_ms))
            except Exception:
                logger.exception("event=signals_failed")
        return found

    def recent_signals(self, now_ms: int) -> list[Signal]:
        """The signals of the last turn; gathered now where another server takes the turns."""
        gathered_ms, signals = self._gathered
        return signals if now_ms - gathered_ms < RECENT_MS else self.gather(now_ms)

    def turn(self, now_ms: int) -> None:
        """Gather, decide, write, act."""
        self.reload()
        signals = self.gather(now_ms)
        self._gathered = (now_ms, signals)
        with self._store.write() as connection:
            before = _load_current(connection, now_ms)
            outcome = engine.step(before, signals, self.book, _load_silences(connection, now_ms), now_ms)
            due = {action.key: action for action in outcome.actions}
            outcome.alerts = [_without_due(alert, outcome.actions) if alert.key in due else alert for alert in outcome.alerts]
            numbers = self._save(connection, before, outcome, now_ms)
            self._queue(connection, outcome.notifications, numbers, now_ms)
        found = {alert.key: msgspec.structs.replace(alert, id=numbers.get(alert.key, 0)) for alert in outcome.alerts}
        for action in outcome.actions:
            self._act(action, found[action.key], now_ms)

    def _save(self, connection: Connection, before: Iterable[Alert], outcome: Outcome, now_ms: int) -> dict[str, int]:
        """Write what became of the alerts; their numbers by key."""
        old = {alert.key: alert for alert in before}
        numbers: dict[str, int] = {}
        for alert in outcome.alerts:
            was = old.pop(alert.key, None)
            if was is not None and was.id and not _is_new_episode(was, alert):
                numbers[alert.key] = was.id
                if msgspec.structs.replace(alert, id=was.id) != was:
                    _update(connection, msgspec.structs.replace(alert, id=was.id))
            else:
                numbers[alert.key] = _insert(connection, alert)
        for gone in old.values():
            if gone.state == "pending":
                connection.execute(delete(alert_events).where(alert_events.c.alert_id == gone.id))
                connection.execute(delete(alerts).where(alerts.c.id == gone.id))
        for change in outcome.changes:
            if change.key in numbers:
                _note(connection, numbers[change.key], SYSTEM, change.what, change.detail, now_ms)
        return numbers

    def _queue(self, connection: Connection, notes: Iterable[Notification], numbers: dict[str, int], now_ms: int) -> None:
        for note in notes:
            row = connection.execute(select(alerts).where(alerts.c.id == numbers[note.key])).one()
            alert = _alert(row)
            contact = self.book.contact(note.contact)
            message = make_message(alert, note.kind, number=note.number, url=self._link(alert))
            for channel in range(len(contact.urls) if contact else 1):
                statement = upsert(deliveries, self._store.engine.dialect.name).values(
                    alert_id=alert.id,
                    contact=note.contact,
                    channel=channel,
                    kind=note.kind,
                    number=note.number,
                    body=msgspec.msgpack.encode(message),
                    status="pending",
                    attempts=0,
                    next_ms=now_ms,
                    created_ms=now_ms,
                    error="",
                )
                connection.execute(statement.on_conflict_do_nothing())
            _note(connection, alert.id, SYSTEM, f"told {note.contact}", note.kind, now_ms)

    def _link(self, alert: Alert) -> str:
        return f"{self._base_url}/alerts/{alert.id}" if self._base_url else ""

    # actions

    def _act(self, due: ActionDue, alert: Alert, now_ms: int) -> None:
        """Carry out one action, and write down what came of it."""
        model, reason = alert.labels.get("model", ""), f"alert {alert.id}: {alert.summary or alert.rule}"
        if due.is_dry_run:
            said = f"would {due.action} {model or 'every model'} (dry run)"
        elif self._acted_lately(due.action, model, now_ms):
            said = f"{due.action} of {model}: done less than {COOL_DOWN_MS // 60_000} min ago"
        else:
            try:
                said = self._carry_out(due.action, alert, model, reason, now_ms)
            except EdgekitError as error:
                said = f"{due.action} failed: {error.message}"
                logger.error("event=action_failed alert=%d error=%r", alert.id, error.message)  # noqa: TRY400 - it says all
        with self._store.write() as connection:
            now = _load(connection, alert.id)
            _update(connection, msgspec.structs.replace(now, actions_done=(*now.actions_done, due.action)))
            _note(connection, alert.id, SYSTEM, due.action, said, now_ms)
            audit.record(
                connection,
                actor=SYSTEM,
                action=f"alert.{due.action}",
                subject=f"alert:{alert.id}",
                reason=said,
                now_ms=now_ms,
                fields={"model": model, "is_dry_run": due.is_dry_run},
            )

    def _acted_lately(self, action: str, model: str, now_ms: int) -> bool:
        row = alert_events.c
        statement = (
            select(row.id)
            .join(alerts, alerts.c.id == row.alert_id)
            .where(row.what == action, alerts.c.model == model, row.time_ms > now_ms - COOL_DOWN_MS)
            .where(row.detail.startswith("done:"))
            .limit(1)
        )
        with self._store.read() as connection:
            return connection.execute(statement).first() is not None

    def _carry_out(self, action: str, alert: Alert, model: str, reason: str, now_ms: int) -> str:
        rollouts, work = self._services.rollouts, self._services.work
        if action in {"halt-rollout", "roll-back"}:
            if rollouts is None:
                return f"{action}: this server runs no rollouts"
            manifest = self._manifest_of(model, alert.labels.get("version", ""))
            do = rollouts.halt if action == "halt-rollout" else rollouts.roll_back
            numbers = do(model=model, manifest=manifest, actor=SYSTEM, reason=reason, now_ms=now_ms)
            return f"done: rollout {', '.join(map(str, numbers))}" if numbers else f"{action}: no rollout of it is under way"
        if work is None:
            return f"{action}: this server keeps no work orders"
        order = work.open(
            kind=cast("WorkKind", action),
            model=model,
            manifest=self._manifest_of(model, alert.labels.get("version", "")),
            reason=reason,
            alert_id=alert.id,
            actor=SYSTEM,
            now_ms=now_ms,
        )
        return f"done: work order {order.id}"

    def _manifest_of(self, model: str, version: str) -> str:
        catalog = self._services.catalog
        if catalog is None or not version:
            return ""
        found = [release for release in catalog.releases(model=model) if release.info.version == version]
        return found[-1].manifest_digest if found else ""

    # delivering

    def deliver(self, now_ms: int) -> int:
        """Send what is due; how many were taken."""
        with self._store.read() as connection:
            statement = select(deliveries).where(deliveries.c.status == "pending", deliveries.c.next_ms <= now_ms)
            due = connection.execute(statement.order_by(deliveries.c.id).limit(BATCH)).all()
        return sum(self._deliver_one(row, now_ms) for row in due)

    def _deliver_one(self, row: Row[Any], now_ms: int) -> bool:
        message = msgspec.msgpack.decode(row.body, type=Message)
        attempts, error = row.attempts + 1, None
        try:
            self.courier.deliver(self._contact(row.contact), row.channel, message)
        except EdgekitError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - a foreign library must not hold up the other deliveries
            error = UsageError("delivery.failed", f"{type(failure).__name__}")
        values: dict[str, Any] = {"attempts": attempts, "status": "sent", "error": ""}
        if error is not None:
            is_over = attempts >= MAX_ATTEMPTS or error.code in _NEVER
            wait = min(FIRST_RETRY_MS * 2 ** (attempts - 1), 3_600_000)
            values |= {"status": "failed" if is_over else "pending", "error": error.message[:500], "next_ms": now_ms + wait}
            logger.warning("event=delivery_failed delivery=%d attempts=%d error=%r", row.id, attempts, error.message)
        with self._store.write() as connection:
            connection.execute(update(deliveries).where(deliveries.c.id == row.id).values(**values))
            if values["status"] == "failed" and row.alert_id:
                _note(connection, row.alert_id, SYSTEM, "delivery failed", f"{row.contact}: {values['error']}", now_ms)
        return error is None

    def _contact(self, name: str) -> Contact:
        found = self.book.contact(name)
        if found is None:
            raise UsageError("delivery.no_contact", f"{name}: no such contact in the rules any more.")
        return found

    # what people say

    def _change(self, alert_id: int, what: str, detail: str, actor: str, now_ms: int, **fields: Any) -> None:
        with self._store.write() as connection:
            alert = _load(connection, alert_id)
            if alert.state == "resolved":
                raise UsageError("alert.state", f"alert {alert_id} is over.")
            _update(connection, msgspec.structs.replace(alert, **fields))
            _note(connection, alert_id, actor, what, detail, now_ms)
            audit.record(
                connection, actor=actor, action=f"alert.{what}", subject=f"alert:{alert_id}", reason=detail, now_ms=now_ms
            )

    def acknowledge(self, alert_id: int, *, actor: str, comment: str = "", for_ms: int = 0, now_ms: int) -> None:
        """Somebody has it in hand: nobody else is told, as long as it lasts or for a time.

        Raises:
            UsageError: ``alert.unknown``, ``alert.state``.
        """
        until = now_ms + for_ms if for_ms else 0
        self._change(
            alert_id, "acknowledged", comment, actor, now_ms,
            acknowledged_by=actor, acknowledged_until_ms=until, comment=comment,
        )  # fmt: skip

    def unacknowledge(self, alert_id: int, *, actor: str, comment: str = "", now_ms: int) -> None:
        """Nobody has it in hand any more. Errors as :meth:`acknowledge`."""
        self._change(alert_id, "unacknowledged", comment, actor, now_ms, acknowledged_by="", acknowledged_until_ms=0)

    def assign(self, alert_id: int, *, assignee: str, actor: str, now_ms: int) -> None:
        """It is somebody's. Errors as :meth:`acknowledge`."""
        self._change(alert_id, "assigned", assignee, actor, now_ms, assignee=assignee[:200])

    def comment(self, alert_id: int, *, text: str, actor: str, now_ms: int) -> None:
        """Say something about it. Errors as :meth:`acknowledge`, but also of one that is over."""
        with self._store.write() as connection:
            _load(connection, alert_id)
            _note(connection, alert_id, actor, "comment", text, now_ms)

    def silence(self, silence: Silence, *, actor: str, now_ms: int) -> int:
        """Tell nobody of what matches, for a time; its number.

        Raises:
            UsageError: ``silence.matchers``, ``silence.time``.
        """
        if not silence.matchers:
            raise UsageError("silence.matchers", "a silence of everything hides everything.", hint='Name at least rule="*".')
        if silence.until_ms <= max(silence.from_ms, now_ms):
            raise UsageError("silence.time", "the silence would be over before it begins.")
        with self._store.write() as connection:
            number = connection.execute(
                insert(silences)
                .values(
                    matchers=msgspec.json.encode(silence.matchers).decode(),
                    from_ms=silence.from_ms,
                    until_ms=silence.until_ms,
                    daily=silence.daily,
                    by=actor,
                    why=silence.why[:2000],
                )
                .returning(silences.c.id)
            ).scalar_one()
            audit.record(
                connection,
                actor=actor,
                action="silence.made",
                subject=f"silence:{number}",
                reason=silence.why,
                now_ms=now_ms,
                fields=dict(silence.matchers),
            )
        return int(number)

    def end_silence(self, number: int, *, actor: str, now_ms: int) -> None:
        """People are told again.

        Raises:
            UsageError: ``silence.unknown``.
        """
        with self._store.write() as connection:
            ended = connection.execute(
                update(silences).where(silences.c.id == number, silences.c.until_ms > now_ms).values(until_ms=now_ms)
            )
            if not ended.rowcount:
                raise UsageError("silence.unknown", f"silence {number}: no such silence is in force.")
            audit.record(connection, actor=actor, action="silence.ended", subject=f"silence:{number}", now_ms=now_ms)

    # what is shown

    def silences(self, now_ms: int) -> tuple[Silence, ...]:
        """Those that are not over."""
        with self._store.read() as connection:
            return tuple(_load_silences(connection, now_ms))

    def open_alerts(self, *, model: str = "", level: Level | None = None) -> tuple[Alert, ...]:
        """Alerts that fire now."""
        statement = select(alerts).where(alerts.c.state == "firing").order_by(alerts.c.id.desc())
        if model:
            statement = statement.where(alerts.c.model == model)
        if level:
            statement = statement.where(alerts.c.level == level)
        with self._store.read() as connection:
            return tuple(_alert(row) for row in connection.execute(statement))

    def page(self, now_ms: int, *, state: str = "", level: str = "", before: int | None = None, limit: int = 50) -> AlertPage:
        """Alerts, newest first.

        Args:
            now_ms: the time.
            state: ``firing`` or ``resolved``; empty is both.
            level: only of this level.
            before: the ``next`` of the page before.
            limit: most on a page.
        """
        row = alerts.c
        statement = select(alerts).where(row.state == state if state else row.state != "pending")
        statement = statement.where(row.level == level) if level else statement
        statement = statement.where(row.id < before) if before is not None else statement
        with self._store.read() as connection:
            found = [_alert(item) for item in connection.execute(statement.order_by(row.id.desc()).limit(limit + 1))]
        views = tuple(AlertView(alert=alert, is_acknowledged=alert.is_acknowledged(now_ms)) for alert in found[:limit])
        return AlertPage(alerts=views, next=found[limit - 1].id if len(found) > limit else None)

    def view(self, alert_id: int, now_ms: int) -> AlertView:
        """One alert with its timeline and deliveries.

        Raises:
            UsageError: ``alert.unknown``.
        """
        with self._store.read() as connection:
            alert = _load(connection, alert_id)
            events = connection.execute(
                select(alert_events).where(alert_events.c.alert_id == alert_id).order_by(alert_events.c.id)
            ).all()
        timeline = tuple(
            AlertEvent(time_ms=item.time_ms, actor=item.actor, what=item.what, detail=item.detail) for item in events
        )
        return AlertView(
            alert=alert,
            is_acknowledged=alert.is_acknowledged(now_ms),
            timeline=timeline,
            deliveries=self.deliveries(alert_id=alert_id),
        )

    def deliveries(self, *, alert_id: int | None = None, status: str = "", limit: int = 100) -> tuple[DeliveryView, ...]:
        """Deliveries, newest first."""
        row = deliveries.c
        statement = select(deliveries).order_by(row.id.desc()).limit(limit)
        statement = statement.where(row.alert_id == alert_id) if alert_id is not None else statement
        statement = statement.where(row.status == status) if status else statement
        with self._store.read() as connection:
            return tuple(self._delivery(item) for item in connection.execute(statement))

    def _delivery(self, item: Row[Any]) -> DeliveryView:
        contact = self.book.contact(item.contact)
        is_known = contact is not None and item.channel < len(contact.urls)
        return DeliveryView(
            id=item.id,
            alert_id=item.alert_id,
            contact=item.contact,
            channel=shown(contact.urls[item.channel]) if contact is not None and is_known else "",
            kind=item.kind,
            status=item.status,
            attempts=item.attempts,
            created_ms=item.created_ms,
            next_ms=item.next_ms if item.status == "pending" else 0,
            error=item.error,
        )

    def test_contact(self, name: str, *, actor: str, now_ms: int) -> int:
        """Queue a test message to each address of a contact; how many.

        Raises:
            UsageError: ``contact.unknown``.
        """
        contact = self.book.contact(name)
        if contact is None:
            known = ", ".join(each.name for each in self.book.contacts) or "none"
            raise UsageError("contact.unknown", f"{name}: no such contact.", hint=f"The rules name {known}.")
        alert = Alert(
            rule="test", labels={}, level="info", state="firing", summary=f"a test, asked for by {actor}", fired_ms=now_ms
        )
        message = make_message(alert, "firing", number=now_ms)
        with self._store.write() as connection:
            for channel in range(len(contact.urls)):
                connection.execute(
                    insert(deliveries).values(
                        alert_id=0, contact=name, channel=channel, kind="test", number=now_ms % 2**31,
                        body=msgspec.msgpack.encode(message), status="pending", attempts=0, next_ms=now_ms,
                        created_ms=now_ms, error="",
                    )
                )  # fmt: skip
            audit.record(connection, actor=actor, action="contact.tested", subject=f"contact:{name}", now_ms=now_ms)
        return len(contact.urls)


def _without_due(alert: Alert, due: Iterable[ActionDue]) -> Alert:
    """An alert before its actions are done."""
    waiting = {action.action for action in due if action.key == alert.key}
    return msgspec.structs.replace(alert, actions_done=tuple(each for each in alert.actions_done if each not in waiting))


def _is_new_episode(was: Alert, now: Alert) -> bool:
    """Whether an alert of the same key is another one: the former was over, and it did not come back at once."""
    return was.state == "resolved" and now.state != "resolved" and now.flaps == was.flaps


def _alert(row: Row[Any]) -> Alert:
    return msgspec.structs.replace(msgspec.msgpack.decode(row.record, type=Alert), id=row.id)


def _load(connection: Connection, alert_id: int) -> Alert:
    row = connection.execute(select(alerts).where(alerts.c.id == alert_id)).one_or_none()
    if row is None:
        raise UsageError("alert.unknown", f"alert {alert_id}: no such alert.")
    return _alert(row)


def _load_current(connection: Connection, now_ms: int) -> list[Alert]:
    """The alerts that the engine must know: not over, or over a moment ago."""
    row = alerts.c
    statement = select(alerts).where(or_(row.state != "resolved", row.resolved_ms > now_ms - REOPEN_MS)).order_by(row.id)
    return list({alert.key: alert for alert in map(_alert, connection.execute(statement))}.values())


def _values(alert: Alert) -> dict[str, Any]:
    return {
        "key": alert.key[:1000],
        "rule": alert.rule,
        "state": alert.state,
        "level": alert.level,
        "model": alert.labels.get("model", ""),
        "fired_ms": alert.fired_ms,
        "resolved_ms": alert.resolved_ms,
        "record": msgspec.msgpack.encode(alert),
    }


def _insert(connection: Connection, alert: Alert) -> int:
    return int(connection.execute(insert(alerts).values(**_values(alert)).returning(alerts.c.id)).scalar_one())


def _update(connection: Connection, alert: Alert) -> None:
    connection.execute(update(alerts).where(alerts.c.id == alert.id).values(**_values(alert)))


def _note(connection: Connection, alert_id: int, actor: str, what: str, detail: str, now_ms: int) -> None:  # noqa: PLR0917
    connection.execute(
        insert(alert_events).values(alert_id=alert_id, time_ms=now_ms, actor=actor, what=what[:64], detail=detail[:2000])
    )


def _load_silences(connection: Connection, now_ms: int) -> list[Silence]:
    return [
        Silence(
            id=row.id,
            matchers=msgspec.json.decode(row.matchers),
            from_ms=row.from_ms,
            until_ms=row.until_ms,
            daily=row.daily,
            by=row.by,
            why=row.why,
        )
        for row in connection.execute(select(silences).where(silences.c.until_ms > now_ms).order_by(silences.c.id))
    ]
