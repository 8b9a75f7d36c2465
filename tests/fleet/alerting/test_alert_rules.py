from __future__ import annotations

import pytest

from edgekit.errors import UsageError
from edgekit.fleet.alerting.rules import join, load_rules, parse_rules, shipped_rules
from edgekit.fleet.alerting.signals import SIGNALS

RULE = '[[rule]]\nname = "x"\nsignal = "error.share"\nabove = 0.1\n'


def test_shipped_rules_are_whole():
    book = shipped_rules()
    assert len(book.rules) > 10
    assert all(rule.runbook and rule.summary for rule in book.rules)
    assert join(book, parse_rules("")) == book


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[rule]\n", "at line 1"),
        ('[[rule]]\nsignal = "error.share"\nabove = 1\n', "rule 1: it has no name"),
        (RULE + "abov = 2\n", 'abov: no such key. Did you mean "above"'),
        (RULE.replace("error.share", "eror.share"), 'no such signal. Did you mean "error.share"'),
        (RULE + "below = 0.0\n", "give above or below"),
        ('[[rule]]\nname = "x"\nsignal = "error.share"\n', "give above or below"),
        (RULE + "clear_below = 0.2\n", "still fires"),
        (RULE + "clear_above = 0.2\n", "above goes with clear_below"),
        (RULE + 'for = "ten"\n', "for is 'ten'"),
        (RULE + 'level = "fatal"\n', "Invalid enum value 'fatal'"),
        (RULE + 'group_by = ["modell"]\n', 'Did you mean "model"'),
        (RULE + 'actions = ["explode"]\n', "Invalid enum value 'explode'"),
        (RULE + RULE, "rule x is there twice"),
        (RULE.replace("error.share", "drift.evidence") + 'actions = ["roll-back"]\n', "takes none back"),
        ('[[escalation]]\nname = "e"\nsteps = []\n', "expected steps"),
        ('[[contact]]\nname = "c"\nurl = "x"\n', 'Did you mean "urls"'),
        ('[[silence]]\nname = "c"\n', "silence: no such key"),
    ],
)
def test_mistake_is_named(text, words):
    with pytest.raises(UsageError) as caught:
        parse_rules(text, file="my.toml")
    assert caught.value.code == "rules.malformed"
    assert "my.toml" in caught.value.message
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RULE + 'notify = "nobody"\n', "nobody: neither a contact nor an escalation"),
        (RULE + 'inhibited_by = ["y"]\n', "no such rule"),
        ('[[escalation]]\nname = "e"\nsteps = [{ after = "1min", contact = "c" }]\n', "c: no such contact"),
    ],
)
def test_name_that_leads_nowhere(text, words):
    with pytest.raises(UsageError, match=words):
        join(shipped_rules(), parse_rules(text))


def test_own_rule_replaces_the_shipped_one(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nname = "requests-fail"\nsignal = "error.share"\nabove = 0.5\nis_enabled = false\n')
    book = load_rules(str(file))
    assert book.rule("requests-fail").above == 0.5
    assert not book.rule("requests-fail").is_enabled
    assert len(book.rules) == len(shipped_rules().rules)


def test_drift_may_act_where_somebody_says_so():
    text = RULE.replace("error.share", "drift.evidence") + 'actions = ["roll-back"]\nallows_drift_actions = true\n'
    assert parse_rules(text).rules[0].actions == ("roll-back",)


def test_every_shipped_rule_watches_a_known_signal():
    assert {rule.signal for rule in shipped_rules().rules} <= SIGNALS.keys()
