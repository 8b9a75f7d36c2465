"""What needs somebody now, from every part of the server, most urgent first; and what was merely noticed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal
from urllib.parse import quote

from edgekit.fleet.alerting.engine import Alert
from edgekit.fleet.rollout.records import RolloutView
from edgekit.fleet.views import Attention
from edgekit.schema.base import Record

Urgency = Literal["critical", "warning", "info"]
_ORDER: dict[Urgency, int] = {"critical": 0, "warning": 1, "info": 2}
MAX_NAMED = 6
SYMBOLS: dict[Urgency, str] = {"critical": "▲", "warning": "!", "info": "i"}


class Need(Record, frozen=True, kw_only=True):
    """One thing, with the page where something can be done about it."""

    urgency: Urgency
    title: str
    detail: str
    href: str
    time_ms: int

    @property
    def symbol(self) -> str:
        """So that colour is not all that tells."""
        return SYMBOLS[self.urgency]


def _urgency(alert: Alert) -> Urgency:
    return "critical" if alert.level == "critical" else "info" if alert.level == "info" else "warning"


def _of_alerts(alerts: Sequence[Alert]) -> Need:
    """Alerts of one rule: one thing, however many sites or models it is about."""
    first = max(alerts, key=lambda alert: alert.fired_ms)
    title = first.summary or first.rule
    title = title[:1].upper() + title[1:]
    if len(alerts) == 1:
        bound = f"{first.value:.3g}, bound {first.threshold}" if first.threshold else f"{first.value:.3g}"
        detail, href = f"{_where(first)}: {bound}" if first.labels else bound, f"/alerts/{first.id}"
    else:
        places = sorted(filter(None, (_where(alert) for alert in alerts)))
        title, detail, href = f"{title} ({len(alerts)})", "; ".join(places[:8]), f"/alerts?level={first.level}"
    return Need(urgency=_urgency(first), title=title, detail=detail, href=href, time_ms=first.fired_ms or first.since_ms)


def _where(alert: Alert) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(alert.labels.items()))


def _of_rollout(view: RolloutView) -> Need | None:
    release = f"{view.spec.model}@{view.spec.version}"
    at = {"href": f"/rollouts/{view.id}", "time_ms": view.updated_ms}
    match view.progress.state:
        case "halted":
            title, urgency = f"The rollout of {release} is halted", "critical"
        case "rolling_back":
            title, urgency = f"{release} is being rolled back", "critical"
        case "paused":
            title, urgency = f"The rollout of {release} is paused", "info"
        case "running" if view.spec.needs_approval and "approv" in view.waits_for:
            title, urgency = f"The rollout of {release} waits for an approval", "warning"
        case _:
            return None
    return Need(urgency=urgency, title=title, detail=view.progress.reason or view.waits_for, **at)  # type: ignore[arg-type]


def _of_attention(item: Attention) -> Need:
    who = f"{item.devices} devices" if item.devices > 1 else f"{item.site}/{item.device}"
    where = f"/events?kind={item.kind}" if item.kind else f"/devices?site={quote(item.site)}&state={_state(item)}"
    one = f"/devices/{quote(item.site)}/{quote(item.device)}"
    many = f" at {item.site}" if item.devices > 1 and not item.kind else ""
    return Need(
        urgency=item.severity,
        title=f"{who}{many} {_verb(item)}",
        detail=item.detail,
        href=where if item.devices > 1 else one,
        time_ms=item.time_ms,
    )


def _verb(item: Attention) -> str:
    if item.devices > 1 and item.title.startswith(("is ", "has ", "lost its")):
        return item.title.replace("is ", "are ", 1).replace("lost its connection", "lost their connection")
    return item.title


def _state(item: Attention) -> str:
    return "stale" if "silent" in item.title else "offline"


def needs(alerts: Iterable[Alert], rollouts: Sequence[RolloutView], now_ms: int) -> tuple[Need, ...]:
    """Open alerts that nobody has in hand, and rollouts that wait for a person; what is said of one rollout is said once."""
    waiting = {view.id: need for view in rollouts if (need := _of_rollout(view)) is not None}
    by_rule: dict[tuple[str, str], list[Alert]] = {}
    for alert in alerts:
        is_said = alert.labels.get("rollout", "") in {str(number) for number in waiting}
        if not (is_said or alert.is_acknowledged(now_ms) or alert.muted):
            by_rule.setdefault((alert.rule, alert.level), []).append(alert)
    found = [*waiting.values(), *(_of_alerts(same) for same in by_rule.values())]
    return tuple(sorted(found, key=lambda need: (_ORDER[need.urgency], -need.time_ms)))


def noticed(attention: Iterable[Attention]) -> tuple[Need, ...]:
    """What devices said in the last day; what is the same of several of them is one thing."""
    found: dict[tuple[str, str], list[Attention]] = {}
    for item in attention:
        is_alone = item.devices == 1 and not item.kind
        found.setdefault((item.title, "" if is_alone else f"{item.site}/{item.device}"), []).append(item)
    return tuple(_of_attention(same[0]) if len(same) == 1 else _of_several(same) for same in found.values())


def _of_several(items: Sequence[Attention]) -> Need:
    names = [f"{item.site}/{item.device}" for item in items]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    verb = items[0].title.replace("is ", "are ", 1) if items[0].title.startswith("is ") else items[0].title
    return Need(
        urgency=items[0].severity,
        title=f"{len(items)} devices {verb.replace('lost its connection', 'lost their connection')}",
        detail=", ".join(names[:MAX_NAMED]) + more,
        href=f"/devices?state={_state(items[0])}",
        time_ms=max(item.time_ms for item in items),
    )
