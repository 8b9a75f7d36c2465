"""What the rules make of the signals: a pure function from states to states, with what is to be told and done.

An alert is pending until its threshold was passed for the rule's time, fires, and is over when the value came back past the
clear mark for long enough. A signal that stops coming ends nothing by itself. Acknowledged, silenced and inhibited say who is
told, not what is the case: an alert that is over is told as over to those who were told of it, and never again after that.

>>> len(step((), (), RuleBook(), (), 0).alerts)
0
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import msgspec

from edgekit.fleet.alerting.rules import Action, Escalation, Level, Rule, RuleBook
from edgekit.fleet.alerting.signals import Signal
from edgekit.schema.base import Record

AlertState = Literal["pending", "firing", "resolved"]
NotificationKind = Literal["firing", "escalated", "repeated", "resolved"]
REOPEN_MS = 10 * 60_000
"""An alert that comes back so soon after its end is the same one, flapping."""
KEPT_MS = 30 * 86_400_000
"""So long an alert that is over stays among the states."""
MAX_TOP = 10
DEFAULT_CHAIN = "default"


class Alert(Record, frozen=True, kw_only=True):
    """One alert. ``id`` is 0 until it is stored."""

    rule: str
    labels: dict[str, str]
    level: Level
    state: AlertState
    id: int = 0
    summary: str = ""
    threshold: str = ""
    runbook: str = ""
    value: float = 0.0
    worst: float = 0.0
    """The furthest value since it began."""
    samples: int = 0
    members: int = 0
    """How many signals are past the threshold now."""
    top: tuple[str, ...] = ()
    """The worst of them, with their figures."""
    evidence: dict[str, str | float] = {}
    since_ms: int = 0
    fired_ms: int = 0
    cleared_ms: int = 0
    """Since when the value is back; 0: it is not."""
    resolved_ms: int = 0
    seen_ms: int = 0
    """When there was a signal last."""
    flaps: int = 0
    acknowledged_by: str = ""
    acknowledged_until_ms: int = 0
    """0: as long as the alert lasts."""
    assignee: str = ""
    comment: str = ""
    steps_told: int = 0
    told_ms: int = 0
    told: tuple[str, ...] = ()
    """Contacts that know of it."""
    times_told: int = 0
    actions_done: tuple[Action, ...] = ()
    muted: str = ""
    """Why nobody is told now: ``silenced``, ``inhibited by …``, or empty."""

    @property
    def key(self) -> str:
        """What makes it the same alert: rule and labels."""
        return fingerprint(self.rule, self.labels)

    def is_acknowledged(self, now_ms: int) -> bool:
        """Whether somebody has it in hand."""
        return bool(self.acknowledged_by) and (not self.acknowledged_until_ms or now_ms < self.acknowledged_until_ms)


class Silence(Record, frozen=True, kw_only=True):
    """Nobody is told of alerts that match, for a time; with ``daily`` (``02:00-04:00``, UTC) only in these hours of the day."""

    matchers: dict[str, str]
    """Label, or ``rule``, and a pattern with ``*``."""
    from_ms: int
    until_ms: int
    id: int = 0
    daily: str = ""
    by: str = ""
    why: str = ""

    def matches(self, alert: Alert, now_ms: int) -> bool:
        """Whether it mutes an alert now."""
        if not self.from_ms <= now_ms < self.until_ms or (self.daily and not is_within(self.daily, now_ms)):
            return False
        found = {**alert.labels, "rule": alert.rule}
        return all(fnmatch.fnmatchcase(found.get(label, ""), pattern) for label, pattern in self.matchers.items())


class Notification(Record, frozen=True, kw_only=True):
    """Somebody is to be told; ``number`` counts within the alert, so that the same one is never sent twice."""

    key: str
    contact: str
    kind: NotificationKind
    number: int


class ActionDue(Record, frozen=True, kw_only=True):
    """Something is to be done."""

    key: str
    action: Action
    is_dry_run: bool


class Change(Record, frozen=True, kw_only=True):
    """An alert changed its state: for the timeline."""

    key: str
    what: str
    detail: str = ""


@dataclass
class Outcome:
    """What a step gives."""

    alerts: list[Alert] = field(default_factory=list)
    notifications: list[Notification] = field(default_factory=list)
    actions: list[ActionDue] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


def fingerprint(rule: str, labels: dict[str, str]) -> str:
    """A rule with its labels, in order."""
    return "|".join([rule, *(f"{label}={value}" for label, value in sorted(labels.items()))])


def is_within(hours: str, now_ms: int) -> bool:
    """Whether it is between two times of the day, UTC; the span may go over midnight.

    >>> is_within("22:00-07:00", 3 * 3_600_000)
    True
    """
    first, _, last = hours.partition("-")
    now = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%H:%M")
    return first <= now < last if first <= last else now >= first or now < last


def step(
    alerts: Iterable[Alert], signals: Iterable[Signal], book: RuleBook, silences: Sequence[Silence], now_ms: int
) -> Outcome:
    """One step.

    Args:
        alerts: the states as the last step left them, with what people said since.
        signals: all that is known now.
        book: the rules.
        silences: those that are not over.
        now_ms: the time.
    """
    known = {alert.key: alert for alert in alerts}
    by_name: dict[str, list[Signal]] = {}
    for signal in signals:
        by_name.setdefault(signal.name, []).append(signal)
    outcome = Outcome()
    after: dict[str, Alert] = {}
    for rule in book.rules:
        if rule.is_enabled:
            for alert in _judge(rule, by_name.get(rule.signal, ()), known, now_ms, outcome):
                after[alert.key] = alert
    for key, alert in known.items():
        if key not in after and not _is_forgotten(alert, now_ms):
            after[key] = _orphan(alert, book, now_ms, outcome)
    for alert in _mute(list(after.values()), book, silences, now_ms):
        outcome.alerts.append(_tell(alert, book, now_ms, outcome))
    return outcome


def _is_forgotten(alert: Alert, now_ms: int) -> bool:
    return alert.state == "pending" or (alert.state == "resolved" and now_ms - alert.resolved_ms > KEPT_MS)


def _orphan(alert: Alert, book: RuleBook, now_ms: int, outcome: Outcome) -> Alert:
    """An alert whose rule is gone or switched off, or whose signal did not come."""
    rule = book.rule(alert.rule)
    if alert.state == "firing" and (rule is None or not rule.is_enabled):
        return _resolve(alert, now_ms, outcome, "its rule is gone")
    return alert


def _judge(rule: Rule, signals: Sequence[Signal], known: dict[str, Alert], now_ms: int, outcome: Outcome) -> Iterable[Alert]:
    groups: dict[str, list[Signal]] = {}
    labels_of: dict[str, dict[str, str]] = {}
    for signal in signals:
        if _is_meant(rule, signal) and signal.samples >= rule.min_samples:
            labels = {name: signal.labels.get(name, "") for name in rule.group_by} if rule.group_by else dict(signal.labels)
            key = fingerprint(rule.name, labels)
            groups.setdefault(key, []).append(signal)
            labels_of[key] = labels
    for key, found in groups.items():
        alert = _see(rule, labels_of[key], found, known.get(key), now_ms, outcome)
        if alert is not None:
            yield alert
    for key, alert in known.items():
        if alert.rule == rule.name and key not in groups and alert.state == "firing":
            yield _without_data(rule, alert, now_ms, outcome)


def _is_meant(rule: Rule, signal: Signal) -> bool:
    return all(fnmatch.fnmatchcase(signal.labels.get(label, ""), pattern) for label, pattern in rule.labels.items())


def _without_data(rule: Rule, alert: Alert, now_ms: int, outcome: Outcome) -> Alert:
    if rule.no_data == "resolve" and now_ms - alert.seen_ms >= rule.no_data_for_ms:
        return _resolve(alert, now_ms, outcome, "no more figures come")
    return alert


def _see(  # noqa: PLR0917 - one step of the state machine
    rule: Rule, labels: dict[str, str], found: Sequence[Signal], alert: Alert | None, now_ms: int, outcome: Outcome
) -> Alert | None:
    """An alert after figures came; None where there is nothing to remember."""
    is_high = rule.above is not None
    ordered = sorted(found, key=lambda signal: signal.value, reverse=is_high)
    worst, breaching = ordered[0], [signal for signal in ordered if rule.is_breached(signal.value)]
    if alert is None or alert.state == "resolved":
        if not breaching:
            return alert
        alert = _begin(rule, labels, alert, now_ms, outcome)
    furthest = max(alert.worst, worst.value) if is_high else min(alert.worst, worst.value)
    alert = msgspec.structs.replace(
        alert,
        level=rule.level,
        summary=rule.summary,
        threshold=rule.threshold,
        runbook=rule.runbook,
        value=worst.value,
        worst=furthest if alert.members else worst.value,
        samples=worst.samples,
        members=len(breaching),
        top=tuple(_describe(signal) for signal in breaching[:MAX_TOP]) or alert.top,
        evidence=dict(worst.evidence),
        seen_ms=now_ms,
    )
    if breaching:
        alert = msgspec.structs.replace(alert, cleared_ms=0)
        if alert.state == "pending" and now_ms - alert.since_ms >= rule.for_ms:
            outcome.changes.append(Change(key=alert.key, what="firing", detail=f"{alert.value:.4g}, {rule.threshold}"))
            alert = msgspec.structs.replace(alert, state="firing", fired_ms=now_ms)
        return alert
    if alert.state == "pending":
        back = msgspec.structs.replace(alert, state="resolved", resolved_ms=now_ms)
        return back if alert.flaps else None
    if not all(rule.is_clear(signal.value) for signal in found):
        return msgspec.structs.replace(alert, cleared_ms=0)
    cleared = alert.cleared_ms or now_ms
    alert = msgspec.structs.replace(alert, cleared_ms=cleared)
    return _resolve(alert, now_ms, outcome, f"{alert.value:.4g}") if now_ms - cleared >= rule.clear_for_ms else alert


def _describe(signal: Signal) -> str:
    labels = ", ".join(f"{label}={value}" for label, value in sorted(signal.labels.items()) if value)
    return f"{labels or signal.name}: {signal.value:.4g}"


def _begin(rule: Rule, labels: dict[str, str], before: Alert | None, now_ms: int, outcome: Outcome) -> Alert:
    """A new alert, or the one that was over a moment ago."""
    if before is not None and now_ms - before.resolved_ms < REOPEN_MS:
        outcome.changes.append(Change(key=before.key, what="reopened", detail="it came back"))
        return msgspec.structs.replace(before, state="pending", since_ms=now_ms, resolved_ms=0, flaps=before.flaps + 1, told=())
    return Alert(rule=rule.name, labels=labels, level=rule.level, state="pending", since_ms=now_ms)


def _resolve(alert: Alert, now_ms: int, outcome: Outcome, why: str) -> Alert:
    outcome.changes.append(Change(key=alert.key, what="resolved", detail=why))
    number = alert.times_told
    for contact in alert.told:
        number += 1
        outcome.notifications.append(Notification(key=alert.key, contact=contact, kind="resolved", number=number))
    return msgspec.structs.replace(
        alert,
        state="resolved",
        resolved_ms=now_ms,
        members=0,
        times_told=number,
        told=(),
        steps_told=0,
        acknowledged_by="",
        acknowledged_until_ms=0,
    )


def _mute(alerts: Sequence[Alert], book: RuleBook, silences: Sequence[Silence], now_ms: int) -> Iterable[Alert]:
    firing = [alert for alert in alerts if alert.state == "firing"]
    for alert in alerts:
        yield msgspec.structs.replace(alert, muted=_why_muted(alert, firing, book, silences, now_ms))


def _why_muted(alert: Alert, firing: Sequence[Alert], book: RuleBook, silences: Sequence[Silence], now_ms: int) -> str:
    if alert.state != "firing":
        return ""
    if any(silence.matches(alert, now_ms) for silence in silences):
        return "silenced"
    rule = book.rule(alert.rule)
    for other in firing:
        if rule is not None and other.rule in rule.inhibited_by and _agree(alert.labels, other.labels):
            return f"inhibited by {other.rule}"
    return ""


def _agree(left: dict[str, str], right: dict[str, str]) -> bool:
    """Whether two alerts speak of the same: labels that both have are equal."""
    return all(left[label] == right[label] for label in left.keys() & right.keys())


def _tell(alert: Alert, book: RuleBook, now_ms: int, outcome: Outcome) -> Alert:
    """Who is told of a firing alert now, and what is done."""
    rule = book.rule(alert.rule)
    if alert.state != "firing" or alert.muted or rule is None:
        return alert
    due = tuple(action for action in rule.actions if action not in alert.actions_done)
    outcome.actions.extend(ActionDue(key=alert.key, action=action, is_dry_run=rule.is_dry_run) for action in due)
    alert = msgspec.structs.replace(alert, actions_done=(*alert.actions_done, *due))
    chain = book.chain(rule.notify or DEFAULT_CHAIN)
    if chain is None or alert.is_acknowledged(now_ms) or _is_quiet(chain, alert, now_ms):
        return alert
    return _escalate(alert, rule, chain, now_ms, outcome)


def _is_quiet(chain: Escalation, alert: Alert, now_ms: int) -> bool:
    return bool(chain.quiet) and alert.level != "critical" and is_within(chain.quiet, now_ms)


def _escalate(alert: Alert, rule: Rule, chain: Escalation, now_ms: int, outcome: Outcome) -> Alert:
    for number, stage in enumerate(chain.steps):
        if number >= alert.steps_told and now_ms - alert.fired_ms >= stage.after_ms:
            kind: NotificationKind = "firing" if number == 0 else "escalated"
            alert = _note(alert, stage.contact, kind, now_ms, outcome)
            alert = msgspec.structs.replace(alert, steps_told=number + 1)
    is_due = bool(alert.told) and rule.repeat_ms > 0 and now_ms - alert.told_ms >= rule.repeat_ms
    if is_due and alert.steps_told:
        return _note(alert, chain.steps[alert.steps_told - 1].contact, "repeated", now_ms, outcome)
    return alert


def _note(alert: Alert, contact: str, kind: NotificationKind, now_ms: int, outcome: Outcome) -> Alert:
    number = alert.times_told + 1
    outcome.notifications.append(Notification(key=alert.key, contact=contact, kind=kind, number=number))
    told = alert.told if contact in alert.told else (*alert.told, contact)
    return msgspec.structs.replace(alert, told=told, told_ms=now_ms, times_told=number)
