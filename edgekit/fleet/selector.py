"""Which devices: a short text that people type, as a condition on the database.

``site=lab,label.camera=dome,arch=aarch64`` is all of these; ``|`` stands between values of which one is enough; ``!=`` is none
of them; ``*`` in a value matches any characters. An empty text is every device.

| key | what |
| --- | --- |
| ``site``, ``device`` | where and who; ``device=lab/cam-7`` names both |
| ``arch``, ``cpu``, ``agent`` | hardware and agent version of its last birth |
| ``label.KEY`` | a label of its configuration |
| ``model``, ``version`` | a model that it serves; ``model=kws@2.0.0`` names both |
| ``group`` | a group of devices, by name |

>>> str(Selector.parse(" arch = aarch64 , site=lab|office "))
'arch=aarch64,site=lab|office'
>>> Selector.parse("colour=red")
Traceback (most recent call last):
edgekit.errors.UsageError: selector 'colour=red': colour: no such key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, not_, or_, select, true

from edgekit.errors import UsageError
from edgekit.fleet.tables import device_labels, device_models, devices, group_members, groups
from edgekit.schema.base import Record

KEYS = ("site", "device", "arch", "cpu", "agent", "model", "version", "group")
LABEL = "label."
MAX_TEXT = 1000
MAX_TERMS = 32
MAX_DEPTH = 4
"""Groups of groups."""
_TERM = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(!?=)\s*(.*?)\s*\Z", re.DOTALL)
_COLUMNS = {"site": devices.c.site, "arch": devices.c.arch, "cpu": devices.c.cpu, "agent": devices.c.agent_version}


class Term(Record, frozen=True, kw_only=True):
    """One condition: any of the values, or with ``is_not`` none of them."""

    key: str
    values: tuple[str, ...]
    is_not: bool = False

    def __str__(self) -> str:
        return f"{self.key}{'!=' if self.is_not else '='}{'|'.join(self.values)}"


class Selector(Record, frozen=True, kw_only=True):
    """Conditions that a device must all meet."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Read a selector.

        Raises:
            UsageError: ``selector.malformed``, ``selector.key``.
        """
        if len(text) > MAX_TEXT:
            raise UsageError("selector.malformed", f"selector of {len(text)} characters: at most {MAX_TEXT} are read.")
        parts = [part for part in text.split(",") if part.strip()]
        if len(parts) > MAX_TERMS:
            raise UsageError("selector.malformed", f"selector of {len(parts)} conditions: at most {MAX_TERMS} are read.")
        terms = [_parse_term(part, text) for part in parts]
        return cls(terms=tuple(sorted(terms, key=lambda term: (term.key, term.is_not, term.values))))

    def __str__(self) -> str:
        return ",".join(str(term) for term in self.terms)

    def clause(self, dynamic: Mapping[str, str] | None = None, *, _depth: int = 0) -> ColumnElement[bool]:
        """The condition on the table ``devices``.

        Args:
            dynamic: groups that are selectors themselves, by name; every other group lists its members.

        Raises:
            UsageError: ``selector.malformed`` when groups of groups go in a circle.
        """
        if _depth > MAX_DEPTH:
            raise UsageError("selector.malformed", f"selector {self}: groups of groups, more than {MAX_DEPTH} deep.")
        conditions = [_condition(term, dynamic or {}, _depth) for term in self.terms]
        return and_(*conditions) if conditions else true()

    def groups(self) -> tuple[str, ...]:
        """The groups that it names."""
        return tuple(value for term in self.terms if term.key == "group" for value in term.values)


def _parse_term(part: str, whole: str) -> Term:
    found = _TERM.match(part)
    values = tuple(dict.fromkeys(value.strip() for value in found[3].split("|") if value.strip())) if found else ()
    if not found or not values:
        raise UsageError(
            "selector.malformed",
            f"selector {whole!r}: {part.strip()!r} is no condition.",
            hint="Write key=value, with commas between conditions and | between values: site=lab|office,arch=aarch64.",
        )
    key = found[1]
    if key not in KEYS and not (key.startswith(LABEL) and len(key) > len(LABEL)):
        near = difflib.get_close_matches(key, KEYS, n=1)
        guess = f'Did you mean "{near[0]}"? ' if near else ""
        raise UsageError(
            "selector.key", f"selector {whole!r}: {key}: no such key.", hint=f"{guess}Keys: {', '.join(KEYS)}, label.NAME."
        )
    return Term(key=key, values=values, is_not=found[2] == "!=")


def _like(column: ColumnElement[Any], value: str) -> ColumnElement[bool]:
    """Equality, or a pattern where the value holds a star."""
    if "*" not in value:
        return column == value
    escaped = value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%")
    return column.like(escaped, escape="\\")


def _any(column: ColumnElement[Any], values: Sequence[str]) -> ColumnElement[bool]:
    return or_(*(_like(column, value) for value in values))


def _condition(term: Term, dynamic: Mapping[str, str], depth: int) -> ColumnElement[bool]:
    positive = _positive(term, dynamic, depth)
    return not_(positive) if term.is_not else positive


def _positive(term: Term, dynamic: Mapping[str, str], depth: int) -> ColumnElement[bool]:
    if term.key in _COLUMNS:
        return _any(_COLUMNS[term.key], term.values)
    if term.key.startswith(LABEL):
        row = device_labels.c
        found = select(row.device_id).where(row.key == term.key.removeprefix(LABEL), _any(row.value, term.values))
        return devices.c.id.in_(found)
    if term.key == "device":
        return or_(*(_is_device(value) for value in term.values))
    if term.key == "group":
        return or_(*(_is_member(value, dynamic, depth) for value in term.values))
    return devices.c.id.in_(_serving(term))


def _is_device(value: str) -> ColumnElement[bool]:
    site, slash, name = value.rpartition("/")
    here = _like(devices.c.device, name)
    return and_(_like(devices.c.site, site), here) if slash else here


def _serving(term: Term) -> Any:
    row = device_models.c
    if term.key == "version":
        return select(row.device_id).where(_any(row.version, term.values))
    pairs = [value.partition("@") for value in term.values]
    either = [
        and_(_like(row.model, model), _like(row.version, version)) if at else _like(row.model, model)
        for model, at, version in pairs
    ]
    return select(row.device_id).where(or_(*either))


def _is_member(name: str, dynamic: Mapping[str, str], depth: int) -> ColumnElement[bool]:
    if name in dynamic:
        return Selector.parse(dynamic[name]).clause(dynamic, _depth=depth + 1)
    row = group_members.c
    return devices.c.id.in_(select(row.device_id).join(groups, groups.c.id == row.group_id).where(groups.c.name == name))
