"""The contract's reactions: what is refused, clipped, filled in, or passed and counted, by input and by column.

The right case is the fast one: one pass for the smallest and one for the largest value (NaN fails both comparisons) says that
nothing is wrong, nothing is copied, and only then a request costs what it always did. What is wrong is looked at column by
column. Order: missing (NaN, and the declared missing value), then unknown categories, then ranges; a value is judged once.
Infinity is refused always, unless it is clipped.

    >>> from edgekit.schema.contract import Contract, InputSpec
    >>> spec = InputSpec(name="x", dtype="float32", shape=("batch", 2), minimum=0, maximum=1, out_of_range="clip")
    >>> guarded = Guard(Contract(inputs=(spec,), outputs=())).apply({"x": np.array([[0.5, 7.0]], np.float32)})
    >>> guarded.feeds["x"].tolist(), [verdict.text for verdict in guarded.verdicts]
    ([[0.5, 1.0]], ['x: 1 out of range, clipped'])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np

from edgekit.dataset.contract import check_structure
from edgekit.dataset.data import Array
from edgekit.errors import DataError, UsageError
from edgekit.schema.contract import Action, ColumnSpec, Contract, InputSpec

Fault = Literal["missing", "unknown category", "out of range", "not finite"]
_CODES: dict[Fault, str] = {
    "missing": "data.missing_value",
    "unknown category": "data.unknown_category",
    "out of range": "data.out_of_range",
    "not finite": "data.not_finite",
}
_DONE: dict[Action, str] = {"reject": "rejected", "clip": "clipped", "impute": "imputed", "pass": "passed"}
_FEW_ROWS = 8
"""Up to here a look into a set beats a search in an array."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was done with one kind of fault in one input or column. ``count``: samples that had it."""

    name: str
    action: Action
    count: int
    fault: Fault

    @property
    def text(self) -> str:
        """For people: ``x.temperature: 3 out of range, clipped``."""
        return f"{self.name}: {self.count} {self.fault}, {_DONE[self.action]}"


@dataclass(frozen=True, slots=True)
class GuardedFeeds:
    """What the model is fed, and what was done to it. ``samples`` have the axis 0, ``out_of_range`` of them break a range."""

    feeds: Mapping[str, Array]
    verdicts: tuple[Verdict, ...] = ()
    samples: int = 1
    out_of_range: int = 0


class RefusedError(DataError):
    """A request that the contract refuses, with the verdict to count."""

    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class _Rule:
    """The rules of one column, or of a whole input (``place`` None), with everything inherited."""

    name: str
    place: int | None
    low: float
    high: float
    spec: ColumnSpec
    """With every reaction set."""

    def find_missing(self, values: Array) -> Array:
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        return missing if self.spec.missing_value is None else missing | (values == self.spec.missing_value)


def _inherit(spec: InputSpec, column: ColumnSpec | None) -> ColumnSpec:
    """The column's rules, the input's where it has none of its own."""
    own = column or ColumnSpec(name=spec.name)

    def first(mine: Any, other: Any) -> Any:
        return other if mine is None else mine

    return ColumnSpec(
        name=own.name,
        minimum=first(own.minimum, spec.minimum),
        maximum=first(own.maximum, spec.maximum),
        out_of_range=own.out_of_range or spec.out_of_range,
        missing=own.missing or spec.missing,
        missing_value=first(own.missing_value, spec.missing_value),
        fill=first(own.fill, spec.fill),
        categories=own.categories or spec.categories,
        unknown=own.unknown or spec.unknown,
    )


def _bounds(spec: ColumnSpec, kind: np.dtype[Any]) -> tuple[float, float]:
    """The range in the input's own type; without one, all that is finite."""
    low, high = spec.minimum, spec.maximum
    if kind.kind == "f":
        limits = np.finfo(kind)
        return (
            float(limits.min) if low is None else max(low, float(limits.min)),
            float(limits.max) if high is None else min(high, float(limits.max)),
        )
    least, most = (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    return (least if low is None else max(least, math.ceil(low)), most if high is None else min(most, math.floor(high)))


def _rules(spec: InputSpec) -> list[_Rule]:
    kind = np.dtype(spec.dtype)
    columns: tuple[ColumnSpec | None, ...] = spec.columns or (None,)
    rules = []
    for place, column in enumerate(columns):
        merged = _inherit(spec, column)
        low, high = _bounds(merged, kind)
        name = spec.name if column is None else f"{spec.name}.{column.name}"
        rules.append(_Rule(name, None if column is None else place, low, high, merged))
    return rules


class _InputGuard:
    """One input, made ready once."""

    def __init__(self, spec: InputSpec) -> None:
        kind = np.dtype(spec.dtype)
        self.name = spec.name
        self._rules = _rules(spec)
        first = self._rules[0]
        is_uniform = all((rule.low, rule.high) == (first.low, first.high) for rule in self._rules)
        self._low: Any = first.low if is_uniform else np.array([rule.low for rule in self._rules], kind)
        self._high: Any = first.high if is_uniform else np.array([rule.high for rule in self._rules], kind)
        self._is_uniform = is_uniform
        self._is_ranged = kind.kind == "f" or not is_uniform or (first.low, first.high) != _bounds(ColumnSpec(name=""), kind)
        self._watched = [
            (rule.place, value)
            for rule in self._rules
            if (value := rule.spec.missing_value) is not None and rule.low <= value <= rule.high
        ]
        self._coded = [
            (rule.place, frozenset(codes), np.array(sorted(codes), np.float64))
            for rule in self._rules
            if (codes := rule.spec.categories)
        ]

    def is_right(self, array: Array) -> bool:
        """Whether nothing at all is wrong with the values."""
        if self._is_ranged and not self._is_within(array):
            return False
        for place, value in self._watched:
            if ((array if place is None else array[..., place]) == value).any():
                return False
        return all(
            _is_known(array if place is None else array[..., place], known, codes) for place, known, codes in self._coded
        )

    def _is_within(self, array: Array) -> bool:
        if not self._is_uniform:
            return bool(((array >= self._low) & (array <= self._high)).all())
        if not array.ndim:
            return bool(self._low <= array <= self._high)
        if not array.size:
            return True
        low, high = np.minimum.reduce(array, axis=None), np.maximum.reduce(array, axis=None)
        return bool(self._low <= low and high <= self._high)

    def _suspects(self, array: Array) -> list[_Rule]:
        """The columns with a value that is not within its range, or that only a closer look can judge."""
        if self._rules[0].place is None:
            return self._rules
        within = (array >= self._low) & (array <= self._high)
        places = set(np.flatnonzero(~within.reshape(-1, len(self._rules)).all(axis=0)).tolist())
        places.update(place for place, _value in self._watched if place is not None)
        places.update(place for place, _known, _codes in self._coded if place is not None)
        return [self._rules[place] for place in sorted(places)]

    def react(self, array: Array) -> tuple[Array, list[Verdict], int]:
        """Do what is declared.

        Returns:
            The array, a copy where a value changed; the verdicts; how many samples have a value out of range.

        Raises:
            RefusedError: what the contract refuses.
        """
        changed, verdicts = array, []
        outside = np.zeros(len(array) if array.ndim else 1, bool)
        for rule in self._suspects(array):
            values = array if rule.place is None else array[..., rule.place]
            for fault, action, mask in _judge(rule, values):
                rows = _rows(mask)
                verdict = Verdict(rule.name, action, int(np.count_nonzero(rows)), fault)
                if action == "reject":
                    _refuse(rule, values, mask, verdict)
                verdicts.append(verdict)
                if fault == "out of range":
                    outside |= rows
                if action == "pass":
                    continue
                changed = array.copy() if changed is array else changed
                target = changed[...] if rule.place is None else changed[..., rule.place]
                target[mask] = rule.spec.fill if action == "impute" else np.clip(values[mask], rule.low, rule.high)
        return changed, verdicts, int(np.count_nonzero(outside))


def _is_known(values: Array, known: frozenset[float], codes: Array) -> bool:
    if values.size <= _FEW_ROWS:
        return known.issuperset(values.ravel().tolist())
    return bool(np.isin(values, codes).all())


def _judge(rule: _Rule, values: Array) -> list[tuple[Fault, Action, Array]]:
    """The faults of a column, each with what is to be done and where."""
    spec, found = rule.spec, list[tuple[Fault, Action, Array]]()
    missing = rule.find_missing(values)
    if missing.any():
        found.append(("missing", _fillable(spec.missing, spec.fill), missing))
    rest = ~missing
    if spec.categories:
        unknown = rest & ~np.isin(values, np.array(spec.categories, np.float64))
        if unknown.any():
            found.append(("unknown category", _fillable(spec.unknown, spec.fill), unknown))
        rest &= ~unknown
    outside: Array = rest & ((values < rule.low) | (values > rule.high))
    if not outside.any():
        return found
    infinite = outside & np.isinf(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    can_clip = spec.out_of_range == "clip"
    if infinite.any() and not can_clip:
        return [*found, ("not finite", "reject", infinite)]
    return [*found, ("out of range", spec.out_of_range or "pass", outside)]


def _fillable(action: Action | None, fill: float | None) -> Action:
    """The declared action; without anything to fill in, a value that should be filled in is refused."""
    return "reject" if action is None or (action == "impute" and fill is None) else action


def _rows(mask: Array) -> Array:
    return np.asarray(mask.reshape(len(mask), -1).any(axis=1) if mask.ndim else mask.reshape(1))


def _refuse(rule: _Rule, values: Array, mask: Array, verdict: Verdict) -> NoReturn:
    what: str = verdict.fault
    bad = np.argwhere(mask)
    value = float(values[mask][0])
    fault: Fault = "not finite" if verdict.fault == "missing" and math.isnan(value) else verdict.fault
    match fault:
        case "not finite":
            what = "NaN or infinite"
        case "out of range":
            what = f"outside {rule.low:g}..{rule.high:g}"
        case "unknown category":
            what = f"none of {', '.join(f'{code:g}' for code in rule.spec.categories[:8])}"
        case "missing":
            what = "the declared missing value"
    first = f"[{', '.join(str(int(place)) for place in bad[0])}]"
    label = f'input "{rule.name}"' if rule.place is None else f'input "{rule.name.rpartition("." + rule.spec.name)[0]}"'
    column = "" if rule.place is None else f', column "{rule.spec.name}"'
    values_are = "value is" if len(bad) == 1 else "values are"
    error = RefusedError(
        _CODES[fault],
        f"{label}{column}: {len(bad)} {values_are} {what}, the first at {first}: {value:g}.",
        hint="The model's contract says what is refused, clipped, filled in or passed.",
    )
    error.verdicts = (verdict,)
    raise error


class Guard:
    """A contract, made ready to judge requests."""

    def __init__(self, contract: Contract) -> None:
        self._structure = contract
        self._inputs = [_InputGuard(spec) for spec in contract.inputs]

    def apply(self, feeds: Mapping[str, Array]) -> GuardedFeeds:
        """Judge one request.

        Args:
            feeds: every input by name; never changed.

        Returns:
            The same feeds where nothing was changed, else copies of what was.

        Raises:
            DataError: what :func:`edgekit.dataset.contract.check_structure` refuses.
            RefusedError: ``data.not_finite``, ``data.missing_value``, ``data.unknown_category`` or ``data.out_of_range``.
        """
        check_structure(self._structure, feeds)
        samples = 1
        wrong: list[_InputGuard] = []
        for guard in self._inputs:
            array = feeds[guard.name]
            if array.ndim and len(array) > samples:
                samples = len(array)
            if not guard.is_right(array):
                wrong.append(guard)
        if not wrong:
            return GuardedFeeds(feeds, (), samples)
        changed, verdicts, outside = dict(feeds), list[Verdict](), 0
        for guard in wrong:
            changed[guard.name], more, rows = guard.react(feeds[guard.name])
            verdicts += more
            outside = max(outside, rows)
        return GuardedFeeds(changed, tuple(verdicts), samples, outside)


def check_rules(contract: Contract) -> None:
    """Refuse a contract that contradicts itself.

    Raises:
        UsageError: ``contract.range``, ``contract.fill``, ``contract.columns`` or ``contract.value``, naming input and column.
    """
    for spec in contract.inputs:
        if spec.columns:
            _check_columns(spec)
        for rule in _rules(spec):
            _check_rule(rule, spec)


def _check_columns(spec: InputSpec) -> None:
    names = [column.name for column in spec.columns]
    last = spec.shape[-1] if spec.shape else 0
    if len(spec.shape) < 2 or (isinstance(last, int) and last != len(names)):
        text = f'input "{spec.name}": {len(names)} columns are declared, its last axis has {last}.'
        raise UsageError("contract.columns", text, hint="Declare every column of the last axis, in order.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError("contract.columns", f'input "{spec.name}": two columns are called "{twice}".')


def _check_rule(rule: _Rule, spec: InputSpec) -> None:
    column, kind = rule.spec, np.dtype(spec.dtype)
    if column.minimum is not None and column.maximum is not None and column.minimum > column.maximum:
        text = f"{rule.name}: minimum {column.minimum:g} is above maximum {column.maximum:g}."
        raise UsageError("contract.range", text, hint="Swap them.")
    if column.out_of_range == "clip" and column.minimum is None and column.maximum is None:
        raise UsageError("contract.range", f'{rule.name}: out_of_range = "clip" needs a minimum or a maximum.')
    is_filled = column.missing == "impute" or (column.unknown == "impute" and column.categories)
    if is_filled and column.fill is None:
        text = f"{rule.name}: a value is to be imputed, and there is no fill."
        raise UsageError("contract.fill", text, hint="Declare fill, the value that takes its place: for example the median.")
    for what, value in (("fill", column.fill), ("missing_value", column.missing_value), *_named(column.categories)):
        if value is not None and (not math.isfinite(value) or (kind.kind != "f" and not _fits(value, kind))):
            raise UsageError("contract.value", f"{rule.name}: {what} {value:g} is no value of {spec.dtype}.")


def _named(codes: tuple[float, ...]) -> list[tuple[str, float]]:
    return [("category", code) for code in codes]


def _fits(value: float, kind: np.dtype[Any]) -> bool:
    low, high = _bounds(ColumnSpec(name=""), kind)
    return value == int(value) and low <= value <= high
