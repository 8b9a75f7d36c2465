from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.fleet.alerting.engine import Silence, is_within, step
from edgekit.fleet.alerting.rules import parse_rules
from edgekit.fleet.alerting.signals import Signal

MINUTE = 60_000
RULES = """
[[rule]]
name = "silent"
signal = "device.silent"
above = 0.05
clear_below = 0.02
for = "5min"
clear_for = "2min"
min_samples = 10
level = "critical"
notify = "chain"
repeat = "1h"

[[contact]]
name = "first"
urls = ["json://127.0.0.1"]
[[contact]]
name = "second"
urls = ["json://127.0.0.1"]

[[escalation]]
name = "chain"
steps = [{ after = "0min", contact = "first" }, { after = "15min", contact = "second" }]
"""


class Desk:
    """Steps with a clock, remembering everything."""

    def __init__(self, rules: str = RULES) -> None:
        self.book, self.alerts, self.silences, self.now = parse_rules(rules), [], [], 0
        self.told, self.done, self.changes = [], [], []

    def see(self, *signals, minutes: float = 1.0):
        self.now += round(minutes * MINUTE)
        outcome = step(self.alerts, signals, self.book, self.silences, self.now)
        self.alerts = outcome.alerts
        self.told += [(note.contact, note.kind) for note in outcome.notifications]
        self.done += [action.action for action in outcome.actions]
        self.changes += [change.what for change in outcome.changes]
        return self.alerts[0] if self.alerts else None

    def change(self, **fields):
        self.alerts = [msgspec.structs.replace(self.alerts[0], **fields)]


def silent(value: float, *, site: str = "lab", samples: int = 100) -> Signal:
    return Signal(name="device.silent", value=value, samples=samples, labels={"site": site})


def fire(desk: Desk) -> None:
    for _ in range(6):
        desk.see(silent(0.1))


def test_alert_fires_after_its_time_and_not_before():
    desk = Desk()
    states = [desk.see(silent(0.1)).state for _ in range(7)]
    assert states == ["pending"] * 5 + ["firing"] * 2
    assert desk.told == [("first", "firing")]


def test_short_peak_is_no_alert():
    desk = Desk()
    for value in (0.1, 0.1, 0.01, 0.1, 0.1, 0.01):
        desk.see(silent(value))
    assert desk.alerts == []
    assert desk.told == []


def test_few_samples_say_nothing():
    desk = Desk()
    for _ in range(10):
        desk.see(silent(0.9, samples=9))
    assert desk.alerts == []


def test_hysteresis_keeps_it_firing_between_the_marks():
    desk = Desk()
    fire(desk)
    for value in (0.04, 0.03, 0.021, 0.06, 0.03):
        assert desk.see(silent(value), minutes=3).state == "firing"
    assert desk.see(silent(0.01)).state == "firing"
    assert desk.see(silent(0.01), minutes=2).state == "resolved"
    assert desk.told[-2:] == [("first", "resolved"), ("second", "resolved")]


def test_alert_that_is_over_is_told_once_and_never_escalates():
    desk = Desk()
    fire(desk)
    desk.see(silent(0.0))
    desk.see(silent(0.0), minutes=3)
    desk.told.clear()
    for _ in range(200):
        desk.see(silent(0.0), minutes=60)
    assert desk.told == []


def test_escalation_until_somebody_acknowledges():
    desk = Desk()
    fire(desk)
    desk.see(silent(0.1), minutes=14)
    assert desk.told == [("first", "firing")]
    desk.see(silent(0.1), minutes=2)
    assert desk.told == [("first", "firing"), ("second", "escalated")]
    desk.see(silent(0.1), minutes=60)
    assert desk.told[-1] == ("second", "repeated")


def test_acknowledged_alert_is_quiet_as_long_as_it_lasts():
    desk = Desk()
    fire(desk)
    desk.change(acknowledged_by="operator")
    for _ in range(60 * 24):
        desk.see(silent(0.1), minutes=60)
    assert desk.told == [("first", "firing")]


def test_acknowledgement_that_runs_out_lets_it_escalate():
    desk = Desk()
    fire(desk)
    desk.change(acknowledged_by="operator", acknowledged_until_ms=desk.now + 30 * MINUTE)
    desk.see(silent(0.1), minutes=20)
    assert desk.told == [("first", "firing")]
    desk.see(silent(0.1), minutes=11)
    assert ("second", "escalated") in desk.told


def test_acknowledgement_ends_with_the_alert():
    desk = Desk()
    fire(desk)
    desk.change(acknowledged_by="operator")
    desk.see(silent(0.0))
    desk.see(silent(0.0), minutes=3)
    fire(desk)
    assert desk.told.count(("first", "firing")) == 2


def test_figures_that_stop_coming_end_nothing():
    desk = Desk()
    fire(desk)
    for _ in range(10):
        assert desk.see(minutes=60).state == "firing"
    assert desk.told.count(("second", "repeated")) >= 8  # and it goes on to be told


def test_no_data_may_end_it_where_the_rule_says_so():
    desk = Desk(RULES.replace('level = "critical"', 'level = "critical"\nno_data = "resolve"\nno_data_for = "30min"'))
    fire(desk)
    assert desk.see(minutes=20).state == "firing"
    assert desk.see(minutes=11).state == "resolved"


def test_flapping_is_one_alert():
    desk = Desk()
    fire(desk)
    desk.see(silent(0.0))
    desk.see(silent(0.0), minutes=3)
    fire(desk)
    assert (len(desk.alerts), desk.alerts[0].flaps, desk.alerts[0].state) == (1, 1, "firing")
    assert desk.changes == ["firing", "resolved", "reopened", "firing"]


def test_one_broken_release_is_one_alert_and_not_five_thousand():
    desk = Desk(
        """
        [[rule]]
        name = "release"
        signal = "error.share"
        above = 0.01
        group_by = ["model", "version"]
        """
    )
    signals = [
        Signal(name="error.share", value=0.1 + n / 1e5, labels={"model": "kws", "version": "2", "device": f"cam-{n}"})
        for n in range(5000)
    ]
    desk.see(*signals)
    (alert,) = desk.alerts
    assert (alert.members, alert.value) == (5000, pytest.approx(0.14999))
    assert alert.top[0].startswith("device=cam-4999")
    assert len(alert.top) == 10


def test_silence_mutes_its_own_and_ends():
    desk = Desk()
    desk.silences = [Silence(matchers={"rule": "sil*", "site": "lab"}, from_ms=0, until_ms=60 * MINUTE)]
    fire(desk)
    assert desk.alerts[0].muted == "silenced"
    other = [silent(0.1, site="office")]
    for _ in range(6):
        desk.see(silent(0.1), *other)
    assert desk.told == [("first", "firing")]
    desk.see(silent(0.1), *other, minutes=60)
    assert desk.told.count(("first", "firing")) == 2


def test_silence_of_every_night():
    desk = Desk()
    night = Silence(matchers={"rule": "*"}, from_ms=0, until_ms=10**12, daily="22:00-06:00")
    desk.silences, desk.now = [night], 23 * 60 * MINUTE
    fire(desk)
    assert desk.told == []
    desk.see(silent(0.1), minutes=7 * 60)
    assert desk.told[0] == ("first", "firing")


def test_child_of_a_firing_alert_tells_nobody():
    desk = Desk(
        RULES
        + """
        [[rule]]
        name = "gone"
        signal = "device.offline"
        above = 0.5
        """
    )
    desk.book = msgspec.structs.replace(
        desk.book,
        rules=tuple(msgspec.structs.replace(r, inhibited_by=("gone",)) if r.name == "silent" else r for r in desk.book.rules),
    )
    gone = Signal(name="device.offline", value=0.9, labels={"site": "lab"})
    for _ in range(8):
        desk.see(silent(0.1), silent(0.1, site="office"), gone)
    by_site = {alert.labels["site"]: alert.muted for alert in desk.alerts if alert.rule == "silent"}
    assert by_site == {"lab": "inhibited by gone", "office": ""}
    assert desk.told == [("first", "firing")]


def test_quiet_hours_hold_back_what_is_not_critical():
    rules = RULES.replace('name = "chain"\nsteps', 'name = "chain"\nquiet = "22:00-07:00"\nsteps')
    desk = Desk(rules.replace('level = "critical"', 'level = "warning"'))
    desk.now = 23 * 60 * MINUTE
    fire(desk)
    assert desk.told == []
    desk.see(silent(0.1), minutes=8 * 60)
    assert desk.told == [("first", "firing"), ("second", "escalated")]
    loud = Desk(rules)
    loud.now = 23 * 60 * MINUTE
    fire(loud)
    assert loud.told == [("first", "firing")]


def test_action_is_due_once():
    desk = Desk(RULES.replace('level = "critical"', 'level = "critical"\nactions = ["halt-rollout"]'))
    fire(desk)
    for _ in range(10):
        desk.see(silent(0.1))
    assert desk.done == ["halt-rollout"]


def test_rule_that_is_gone_ends_its_alert():
    desk = Desk()
    fire(desk)
    desk.book = msgspec.structs.replace(desk.book, rules=())
    assert desk.see(silent(0.1)).state == "resolved"


def test_below_is_the_same_the_other_way():
    desk = Desk('[[rule]]\nname = "gap"\nsignal = "accuracy.gap"\nbelow = -0.05\nclear_above = -0.02\n')
    gap = lambda value: Signal(name="accuracy.gap", value=value, labels={"model": "kws"})  # noqa: E731
    assert desk.see(gap(-0.04)) is None
    assert desk.see(gap(-0.06)).state == "firing"
    assert desk.see(gap(-0.03)).state == "firing"
    assert desk.see(gap(-0.01)).state == "resolved"


@pytest.mark.parametrize(
    ("hours", "hour", "inside"), [("22:00-06:00", 23, True), ("22:00-06:00", 6, False), ("08:00-09:00", 8, True)]
)
def test_hours_of_the_day(hours, hour, inside):
    assert is_within(hours, hour * 3_600_000) is inside


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 200), st.booleans()), max_size=80))
def test_restart_at_any_step_changes_nothing(path):
    """The states are all there is to remember: written down and read back, the same follows."""
    through, again = Desk(), Desk()
    for value, samples, is_there in path:
        signals = [silent(value, samples=samples)] if is_there else []
        through.see(*signals)
        again.alerts = [msgspec.msgpack.decode(msgspec.msgpack.encode(a), type=type(a)) for a in again.alerts]
        again.see(*signals)
    assert (through.alerts, through.told, through.changes) == (again.alerts, again.told, again.changes)


@given(st.lists(st.floats(0, 1), max_size=100))
def test_who_is_told_of_an_end_was_told_of_a_beginning(path):
    desk = Desk()
    for value in path:
        desk.see(silent(value), minutes=3)
    begun = 0
    for _, kind in desk.told:
        begun += kind == "firing"
        assert kind != "resolved" or begun
