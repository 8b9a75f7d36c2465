"""Rules as TOML: what is watched, from when on it is an alert, who is told, and what is done.

    [[rule]]
    name = "silent-devices"
    signal = "device.silent"
    above = 0.05          # fires above this …
    clear_below = 0.02    # … and is over below that
    for = "10min"
    min_samples = 20
    level = "critical"
    notify = "on-call"
    runbook = "https://example.org/runbooks/silent-devices"
    actions = ["halt-rollout"]

    [[contact]]
    name = "on-call"
    urls = ["${ON_CALL_URL}"]

    [[escalation]]
    name = "on-call"
    steps = [{ after = "0min", contact = "on-call" }, { after = "15min", contact = "lead" }]

A file is read whole or not at all, and every mistake is named with what was probably meant. A rule of the user's file replaces
the shipped one of the same name; ``is_enabled = false`` switches it off.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from edgekit.errors import UsageError
from edgekit.fleet.alerting.signals import LABELS, SIGNALS
from edgekit.schema.base import Record

Level = Literal["info", "warning", "critical"]
Action = Literal["halt-rollout", "roll-back", "recall", "recalibrate"]
NoData = Literal["keep", "resolve"]
_DURATION = re.compile(r"(\d{1,7}(?:\.\d{1,3})?)(ms|s|min|h|d)\Z")
_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_DRIFT = ("drift.", "prediction_drift")
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)\Z")
MAX_RULES = 500


class Rule(Record, frozen=True, kw_only=True):
    """One rule, checked: times in milliseconds."""

    name: str
    signal: str
    above: float | None = None
    below: float | None = None
    clear: float | None = None
    """Hysteresis: over when the value is past this; without it, when it is past the threshold itself."""
    for_ms: int = 0
    clear_for_ms: int = 0
    min_samples: int = 1
    level: Level = "warning"
    labels: dict[str, str] = {}
    """Only signals with these labels; ``*`` stands for any characters."""
    group_by: tuple[str, ...] = ()
    """Signals that agree in these labels are one alert; empty: all of the signal's labels."""
    notify: str = ""
    """A contact or an escalation."""
    repeat_ms: int = 4 * 3_600_000
    """Told again after so long while it fires and nobody has acknowledged it; 0: once."""
    runbook: str = ""
    summary: str = ""
    actions: tuple[Action, ...] = ()
    is_dry_run: bool = False
    """Actions are written down and not carried out."""
    allows_drift_actions: bool = False
    """Drift alone says nothing against the release: control devices drift as well. Who wants it all the same, says so."""
    no_data: NoData = "keep"
    no_data_for_ms: int = 3_600_000
    inhibited_by: tuple[str, ...] = ()
    """Names of rules: while one of them fires with the same labels, this one tells nobody."""
    is_enabled: bool = True

    def is_breached(self, value: float) -> bool:
        """Whether a value is past the threshold."""
        return value > self.above if self.above is not None else self.below is not None and value < self.below

    def is_clear(self, value: float) -> bool:
        """Whether a value is back."""
        if self.above is not None:
            return value <= self.above if self.clear is None else value < self.clear
        assert self.below is not None
        return value >= self.below if self.clear is None else value > self.clear

    @property
    def threshold(self) -> str:
        """For people: ``above 0.05``."""
        return f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"


class Contact(Record, frozen=True, kw_only=True):
    """Where somebody is reached: apprise URLs, ``webhook+https://…``, ``alertmanager+http://…``; secrets as ``${NAME}``."""

    name: str
    urls: tuple[str, ...]
    secret: str = ""
    """Of webhooks: ``${NAME}``, signs the body."""


class Step(Record, frozen=True, kw_only=True):
    """Who is told so long after the alert began, unless somebody acknowledged it."""

    after_ms: int
    contact: str


class Escalation(Record, frozen=True, kw_only=True):
    """A chain of contacts. Within the quiet hours (UTC, ``22:00-07:00``) only critical alerts are told."""

    name: str
    steps: tuple[Step, ...]
    quiet: str = ""


class RuleBook(Record, frozen=True, kw_only=True):
    """Everything that a rules file says."""

    rules: tuple[Rule, ...] = ()
    contacts: tuple[Contact, ...] = ()
    escalations: tuple[Escalation, ...] = ()

    def rule(self, name: str) -> Rule | None:
        """A rule by name."""
        return next((rule for rule in self.rules if rule.name == name), None)

    def contact(self, name: str) -> Contact | None:
        """A contact by name."""
        return next((contact for contact in self.contacts if contact.name == name), None)

    def chain(self, notify: str) -> Escalation | None:
        """The escalation of that name, or a chain of one step to the contact of that name."""
        found = next((chain for chain in self.escalations if chain.name == notify), None)
        if found is None and self.contact(notify) is not None:
            return Escalation(name=notify, steps=(Step(after_ms=0, contact=notify),))
        return found


# --- reading


def parse_span(text: Any, where: str) -> int:
    """Milliseconds of ``90s``, ``10min``, ``4h``.

    >>> parse_span("10min", "for")
    600000

    Raises:
        UsageError: ``rules.malformed``.
    """
    found = _DURATION.match(text) if isinstance(text, str) else None
    if not found:
        raise _wrong(f"{where} is {text!r}: expected a time such as 90s, 10min or 4h.")
    return round(float(found[1]) * _UNITS_MS[found[2]])


def _wrong(message: str, hint: str = "") -> UsageError:
    return UsageError("rules.malformed", message, hint=hint or 'Check it with "edgekit fleet rules check FILE".')


_RULE_KEYS = {
    "name", "signal", "above", "below", "clear_below", "clear_above", "for", "clear_for", "min_samples", "level", "labels",
    "group_by", "notify", "repeat", "runbook", "summary", "actions", "is_dry_run", "allows_drift_actions", "no_data",
    "no_data_for", "inhibited_by", "is_enabled",
}  # fmt: skip
_SPANS = {"for": "for_ms", "clear_for": "clear_for_ms", "repeat": "repeat_ms", "no_data_for": "no_data_for_ms"}


def _check_keys(found: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = sorted(known)
    for key in found:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise _wrong(
                f"{where}: {key}: no such key.", f'Did you mean "{near[0]}"?' if near else f"Known: {', '.join(names)}."
            )


def _read_rule(found: Mapping[str, Any], file: str, number: int) -> Rule:
    name = found.get("name")
    where = f"{file}: rule {name or number}"
    if not isinstance(name, str) or not name:
        raise _wrong(f"{where}: it has no name.")
    _check_keys(found, _RULE_KEYS, where)
    values = {key: value for key, value in found.items() if key not in {*_SPANS, "clear_below", "clear_above"}}
    values |= {field: parse_span(found[key], f"{where}: {key}") for key, field in _SPANS.items() if key in found}
    if "above" in found and "clear_below" in found:
        values["clear"] = found["clear_below"]
    if "below" in found and "clear_above" in found:
        values["clear"] = found["clear_above"]
    try:
        rule = msgspec.convert(values, Rule)
    except msgspec.ValidationError as error:
        raise _wrong(f"{where}: {error}.") from error
    _check_rule(rule, found, where)
    return rule


def _check_rule(rule: Rule, found: Mapping[str, Any], where: str) -> None:
    if rule.signal not in SIGNALS:
        near = difflib.get_close_matches(rule.signal, SIGNALS, n=1)
        raise _wrong(
            f"{where}: {rule.signal}: no such signal.",
            f'Did you mean "{near[0]}"?' if near else f"Signals: {', '.join(SIGNALS)}.",
        )
    if (rule.above is None) == (rule.below is None):
        raise _wrong(f"{where}: give above or below, one of them.")
    if ("clear_below" in found and rule.above is None) or ("clear_above" in found and rule.below is None):
        raise _wrong(f"{where}: above goes with clear_below, below with clear_above.")
    if rule.clear is not None and rule.is_breached(rule.clear):
        raise _wrong(f"{where}: it would be over while it still fires: clear is past the threshold.")
    for label in (*rule.labels, *rule.group_by):
        if label not in LABELS:
            near = difflib.get_close_matches(label, LABELS, n=1)
            raise _wrong(f"{where}: {label}: no such label.", f'Did you mean "{near[0]}"?' if near else "")
    is_drift = rule.signal.startswith(_DRIFT)
    if is_drift and {"roll-back", "halt-rollout", "recall"} & set(rule.actions) and not rule.allows_drift_actions:
        raise _wrong(
            f"{where}: drift of inputs says nothing against a release, so it takes none back.",
            "Watch accuracy or the rollout's gates instead, or say allows_drift_actions = true.",
        )


def parse_rules(text: str, *, file: str = "rules") -> RuleBook:
    """Read rules.

    Raises:
        UsageError: ``rules.malformed``.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _wrong(f"{file}: {error}.") from error
    _check_keys(found, {"rule", "contact", "escalation"}, file)
    rules = tuple(_read_rule(item, file, number) for number, item in enumerate(found.get("rule", []), 1))
    if len(rules) > MAX_RULES:
        raise _wrong(f"{file}: {len(rules)} rules, at most {MAX_RULES} are read.")
    contacts = tuple(_read_contact(item, file) for item in found.get("contact", []))
    escalations = tuple(_read_escalation(item, file) for item in found.get("escalation", []))
    for what, names in (("rule", [r.name for r in rules]), ("contact", [c.name for c in contacts])):
        twice = next((name for name in names if names.count(name) > 1), "")
        if twice:
            raise _wrong(f"{file}: {what} {twice} is there twice.")
    return RuleBook(rules=rules, contacts=contacts, escalations=escalations)


def _read_contact(found: Mapping[str, Any], file: str) -> Contact:
    _check_keys(found, Contact.__struct_fields__, f"{file}: contact {found.get('name', '')}")
    try:
        return msgspec.convert(found, Contact)
    except msgspec.ValidationError as error:
        raise _wrong(f"{file}: contact {found.get('name', '')}: {error}.") from error


def _read_escalation(found: Mapping[str, Any], file: str) -> Escalation:
    where = f"{file}: escalation {found.get('name', '')}"
    _check_keys(found, Escalation.__struct_fields__, where)
    steps = []
    for step in found.get("steps", []):
        _check_keys(step, ("after", "contact"), where)
        steps.append(
            Step(after_ms=parse_span(step.get("after", "0s"), f"{where}: after"), contact=str(step.get("contact", "")))
        )
    quiet = str(found.get("quiet", ""))
    if quiet and not all(_CLOCK.match(part) for part in quiet.split("-")):
        raise _wrong(f"{where}: quiet is {quiet!r}: expected hours such as 22:00-07:00.")
    if not steps or [step.after_ms for step in steps] != sorted(step.after_ms for step in steps):
        raise _wrong(f"{where}: expected steps in the order of their times.")
    return Escalation(name=str(found.get("name", "")), steps=tuple(steps), quiet=quiet)


def join(shipped: RuleBook, own: RuleBook, *, file: str = "rules") -> RuleBook:
    """The shipped rules with the user's over them.

    Raises:
        UsageError: ``rules.malformed`` when a rule or an escalation names nobody that is known.
    """
    rules = {rule.name: rule for rule in (*shipped.rules, *own.rules)}
    contacts = {contact.name: contact for contact in (*shipped.contacts, *own.contacts)}
    chains = {chain.name: chain for chain in (*shipped.escalations, *own.escalations)}
    book = RuleBook(rules=tuple(rules.values()), contacts=tuple(contacts.values()), escalations=tuple(chains.values()))
    for rule in own.rules:
        if rule.notify and book.chain(rule.notify) is None:
            raise _wrong(f"{file}: rule {rule.name}: {rule.notify}: neither a contact nor an escalation.")
        for other in rule.inhibited_by:
            if other not in rules:
                raise _wrong(f"{file}: rule {rule.name}: inhibited_by {other}: no such rule.")
    for chain in book.escalations:
        for step in chain.steps:
            if step.contact not in contacts:
                raise _wrong(f"{file}: escalation {chain.name}: {step.contact}: no such contact.")
    return book


def shipped_rules() -> RuleBook:
    """The rules that come with edgekit."""
    text = (resources.files("edgekit.fleet.alerting") / "rules.toml").read_text()
    return parse_rules(text, file="edgekit's rules")


def load_rules(path: str) -> RuleBook:
    """The shipped rules, with a file's over them where one is given.

    Raises:
        UsageError: ``rules.unreadable``, ``rules.malformed``.
    """
    if not path:
        return shipped_rules()
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("rules.unreadable", f"{path}: cannot be read: {error}.") from error
    return join(shipped_rules(), parse_rules(text, file=path), file=path)


LEVELS: tuple[Level, ...] = get_args(Level)
