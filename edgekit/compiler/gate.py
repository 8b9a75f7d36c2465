"""The gate: which candidate wins, and why, in words. Pure: no files, no clock, no measurement.

The winner is the fastest candidate that meets the budget, with a margin for the size of the sample. Differences inside the
noise are ties, decided by size, then by accuracy, then by the plan's order. The optimized fp32 model is always among them, so
"stay with fp32" is a legal answer. When nothing meets the budget the least bad is named, accuracy first: a wrong answer sooner
is worth nothing.

    >>> budget = parse_budget("top1_drop<=0.01, latency_ms<=5")
    >>> [(term.name, term.quantity, term.limit) for term in budget.terms]
    [('top1_drop', 'drop', 0.01), ('latency_ms', 'latency_ms', 5.0)]
    >>> budget.metric
    'top1'
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, assert_never

import msgspec

from edgekit.errors import UsageError
from edgekit.evaluation.metric import SQNR_CAP_DB, Metric, metric_names
from edgekit.schema.candidate import BudgetCheck, Quantity, Status, Verdict
from edgekit.schema.measurement import EvalReport, LatencyReport

Operator = Literal["<=", ">="]
METRICS = metric_names()
RESOURCES: dict[str, Quantity] = {"latency_ms": "latency_ms", "size_mb": "size_mb", "ram_mb": "ram_mb"}
RESOURCE_TERMS = frozenset({*RESOURCES, "flash_mb"})
DEFAULT_DROP = 0.01
DEFAULT_AGREEMENT = 0.99
DEFAULT_SQNR_DB = 20.0
LATENCY_TIE = 0.02
"""Two sessions of one file differ by up to this share, by where their memory lies: a nearer ratio is a tie whatever it is."""
SIZE_TIE = 0.05
"""Files that differ by less than this share of the smaller one count as equally large."""
UPDATE_TIE = 0.01
"""An update must be smaller by this share to decide."""
BYTES_PER_MB = 1e6
ROUNDING = 1e-9
_RAM_NOTE = "peak of a process of its own on this host, Python and runtime included"
_TERM = re.compile(r"\s*(?P<name>[A-Za-z_][\w.:]*)\s*(?P<operator><=|>=|==|<|>|=)\s*(?P<limit>[-+]?[\w.+-]*)\s*\Z")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a budget: ``name`` as the user wrote it."""

    name: str
    quantity: Quantity
    operator: Operator
    limit: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a candidate must keep to. ``metric`` is the metric that the terms name, or None where they name none."""

    terms: tuple[Term, ...]
    text: str
    metric: str | None = None
    is_default: bool = False


def parse_budget(text: str, *, metric: str | None = None) -> Budget:
    """Parse ``"top1_drop<=0.01, latency_ms<=5, size_mb<=2"``.

    Args:
        text: comma-separated ``name op number``; names are ``drop``, ``<metric>_drop``, ``<metric>``, ``latency_ms``,
            ``size_mb`` and ``ram_mb``.
        metric: the metric that was asked for, where one was.

    Raises:
        UsageError: ``budget.unparsable`` with the place, ``budget.metric`` when a term names another metric than the one
            asked for or than another term does.
    """
    terms: list[Term] = []
    named: str | None = None
    start = 0
    for part in text.split(","):
        term, found = _parse_term(text, start, part, metric)
        if found and named and found != named:
            raise UsageError("budget.metric", f'budget "{text}" names two metrics, {named} and {found}; expected one.')
        named = found or named
        if any(other.name == term.name and other.operator == term.operator for other in terms):
            _refuse(text, start + _indent(part), f'"{term.name}" stands here a second time')
        terms.append(term)
        start += len(part) + 1
    return Budget(terms=tuple(terms), text=text, metric=named)


def default_budget(metric: Metric, baseline: float) -> Budget:
    """What counts as good enough when nothing was asked for.

    Fidelity metrics have limits of their own; errors in the labels' unit may grow by 1 % of the baseline's, others may drop
    by 0.01.
    """
    match metric.name:
        case "agreement":
            term = Term(name="agreement", quantity="value", operator=">=", limit=DEFAULT_AGREEMENT)
        case "sqnr_db":
            term = Term(name="sqnr_db", quantity="value", operator=">=", limit=DEFAULT_SQNR_DB)
        case _:
            limit = DEFAULT_DROP * abs(baseline) if metric.unit.startswith("label") else DEFAULT_DROP
            term = Term(name=f"{metric.name}_drop", quantity="drop", operator="<=", limit=limit)
    return Budget(terms=(term,), text=f"{term.name}{term.operator}{term.limit:g}", metric=metric.name, is_default=True)


def _indent(part: str) -> int:
    return len(part) - len(part.lstrip())


def _refuse(text: str, position: int, problem: str, hint: str = "") -> NoReturn:
    names = "drop, <metric>_drop, <metric>, latency_ms, size_mb, ram_mb"
    raise UsageError(
        "budget.unparsable",
        f"budget does not parse: {problem}\n  {text}\n  {' ' * position}^",
        hint=hint or f'Write terms such as "top1_drop<=0.01, latency_ms<=5"; names: {names}; metrics: {", ".join(METRICS)}.',
    )


def _parse_term(text: str, start: int, part: str, metric: str | None) -> tuple[Term, str | None]:
    """One term and the metric that it names."""
    if not part.strip():
        _refuse(text, start, "a term is missing here")
    match = _TERM.match(part)
    if match is None:
        _refuse(text, start + _indent(part), f'"{part.strip()}" is not "name<=number" or "name>=number"')
    name, operator = match["name"], match["operator"]
    if operator not in ("<=", ">="):
        _refuse(text, start + match.start("operator"), f'operator "{operator}"; expected "<=" or ">="')
    try:
        limit = float(match["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        _refuse(text, start + match.start("limit"), f'"{match["limit"]}" is not a number')
    quantity, named = _classify(text, start + match.start("name"), name, metric)
    if quantity in ("drop", *RESOURCES) and operator != "<=":
        _refuse(text, start + match.start("operator"), f'"{name}" has an upper limit; expected "<="')
    return Term(name=name, quantity=quantity, operator=operator, limit=limit), named  # type: ignore[arg-type]


def _classify(text: str, position: int, name: str, metric: str | None) -> tuple[Quantity, str | None]:
    if name in RESOURCES:
        return RESOURCES[name], None
    if name == "drop":
        return "drop", None
    base = name.removesuffix("_drop")
    own = short_metric(metric) if metric else None
    if base not in (*METRICS, own):
        known = [*RESOURCES, "drop", *METRICS, *(f"{item}_drop" for item in METRICS)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        _refuse(text, position, f'there is no "{name}"', f'Did you mean "{near[0]}"?' if near else "")
    if own is not None and base != own:
        raise UsageError(
            "budget.metric",
            f'budget "{text}": the term {name} is about {base}, the metric is {metric}.',
            hint=f"Write {own}_drop, or ask for --metric {base}.",
        )
    return ("drop" if name.endswith("_drop") else "value"), base


def short_metric(metric: str) -> str:
    """The name of a metric inside a budget: the function's name for ``package.module:function``."""
    return metric.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the gate knows of a candidate; ``failure`` says why it could not be made or run."""

    name: str
    size_bytes: int = 0
    evaluation: EvalReport | None = None
    latency: LatencyReport | None = None
    ram_mb: float | None = None
    failure: str | None = None
    update_bytes: int | None = None
    """What a device with the previous release downloads; known only of those that are compared by it."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Verdict by name, the chosen name, the sentence for people, and who is on the Pareto front."""

    verdicts: dict[str, Verdict]
    chosen: str
    is_budget_met: bool
    sentence: str
    pareto: frozenset[str]


def judge(candidates: Sequence[Measured], budget: Budget, *, baseline: str, target: str = "") -> Judgement:
    """Judge all candidates of a run.

    Args:
        candidates: in the plan's order; the baseline is among them and has not failed.
        budget: the terms, those of the hardware included.
        baseline: name of the fp32 model as given.
        target: name of the target, for the notes.
    """
    usable = [item for item in candidates if item.failure is None]
    origin = next(item for item in usable if item.name == baseline)
    checks = {item.name: check_budget(item, budget, target=target) for item in usable}
    meeting = [item for item in usable if all(check.is_met for check in checks[item.name])]
    safe = [item for item in meeting if is_safe(item, budget)]
    nearest = min(usable, key=lambda item: _badness(item, checks[item.name]))
    chosen = prefer_update(safe or meeting, pick_fastest(safe or meeting)) if meeting else nearest
    verdicts = {item.name: _verdict(item, chosen, origin, checks.get(item.name, ()), meeting) for item in candidates}
    for item in meeting:
        if item not in safe and item is not chosen and item.evaluation is not None:
            text = f"meets the budget only just: {item.evaluation.samples} samples leave it in doubt; more of them would decide"
            note = (
                ""
                if is_tie(item, chosen)
                else f"; takes {ratio_of(item)[0] / ratio_of(chosen)[0]:.2f}x the time of {chosen.name}"
            )
            verdicts[item.name] = msgspec.structs.replace(verdicts[item.name], reason=text + note)
    return Judgement(
        verdicts=verdicts,
        chosen=chosen.name,
        is_budget_met=bool(meeting),
        sentence=_sentence(chosen, origin, candidates, checks, target or "the target")
        if meeting
        else _apology(chosen, origin, checks),
        pareto=find_pareto(usable),
    )


def check_budget(item: Measured, budget: Budget, *, target: str = "") -> tuple[BudgetCheck, ...]:
    """Each term against what was measured."""
    return tuple(_check(item, term, target) for term in budget.terms)


def is_quality_met(item: Measured, budget: Budget) -> bool:
    """Whether the terms about quality are met with a margin; latency, size and memory are not looked at."""
    quality = [term for term in budget.terms if term.quantity in ("drop", "value")]
    return all(_check(item, term, "").is_met for term in quality) and is_safe(item, budget)


def is_safe(item: Measured, budget: Budget) -> bool:
    """Whether the quality would still meet the budget at the bad end of its 95 % interval.

    The fastest of many candidates that just meet a limit on some samples misses it on others: its luck is what chose it.
    """
    report = item.evaluation
    if report is None or report.drop_high is None:
        return True
    margin = max(0.0, report.drop_high - report.drop)
    sign = 1.0 if report.is_higher_better else -1.0
    worse = msgspec.structs.replace(report, value=report.value - sign * margin, drop=report.drop + margin)
    quality = [term for term in budget.terms if term.quantity in ("drop", "value")]
    return all(_check(dataclasses.replace(item, evaluation=worse), term, "").is_met for term in quality)


def _check(item: Measured, term: Term, target: str) -> BudgetCheck:
    value, note = _value_of(item, term.quantity, target)
    if value is None:
        return BudgetCheck(
            name=term.name, operator=term.operator, limit=term.limit, value=None, is_met=True, note=note or "not measured"
        )
    slack = ROUNDING * max(1.0, abs(term.limit))  # 3 of 300 samples is 0.01, whatever the floats say
    is_met = value <= term.limit + slack if term.operator == "<=" else value >= term.limit - slack
    if is_met and item.evaluation and (doubt := _doubt(item.evaluation, term)):
        note = doubt
    return BudgetCheck(
        name=term.name,
        operator=term.operator,
        limit=term.limit,
        value=value,
        is_met=is_met,
        note="; ".join(part for part in (term.note, note) if part),
    )


def _doubt(report: EvalReport, term: Term) -> str:
    """The end of the 95 % interval that would miss the limit, in words; empty where there is none."""
    if report.drop_high is None or term.quantity not in ("drop", "value"):
        return ""
    worst = report.drop_high
    if term.quantity == "value":
        worst = report.baseline - worst if report.is_higher_better else report.baseline + worst
    is_beyond = worst > term.limit if term.operator == "<=" else worst < term.limit
    return f"the 95 % interval reaches {worst:.4f}: more evaluation samples would decide" if is_beyond else ""


def _value_of(item: Measured, quantity: Quantity, target: str) -> tuple[float | None, str]:
    match quantity:
        case "drop":
            return (item.evaluation.drop, "") if item.evaluation else (None, "not evaluated")
        case "value":
            return (item.evaluation.value, "") if item.evaluation else (None, "not evaluated")
        case "size_mb":
            return item.size_bytes / BYTES_PER_MB, ""
        case "ram_mb":
            return item.ram_mb, "could not be measured here; not counted" if item.ram_mb is None else _RAM_NOTE
        case "latency_ms":
            if item.latency is None:
                return None, "not measured"
            note = "" if item.latency.is_on_target else f"measured on this host, not on {target or 'the target'}"
            return item.latency.p50_ms, note
        case _:
            assert_never(quantity)


def _badness(item: Measured, checks: Sequence[BudgetCheck]) -> tuple[float, float, float, int]:
    """How far a candidate is from the budget: accuracy first, then the rest, then slow, then large."""
    quality = sum(_excess(check) for check in checks if check.name not in RESOURCE_TERMS)
    rest = sum(_excess(check) for check in checks if check.name in RESOURCE_TERMS)
    return quality, rest, item.latency.p50_ms if item.latency else math.inf, item.size_bytes


def _excess(check: BudgetCheck) -> float:
    """By what share of the limit it is missed; 0 when met."""
    if check.is_met or check.value is None:
        return 0.0
    return abs(check.value - check.limit) / max(abs(check.limit), 1e-6)


def ratio_of(item: Measured) -> tuple[float, float, float]:
    """Latency against the baseline with its interval; the baseline itself is 1."""
    report = item.latency
    if report is None or report.ratio is None:
        return 1.0, 1.0, 1.0
    low = report.ratio if report.ratio_low is None else report.ratio_low
    high = report.ratio if report.ratio_high is None else report.ratio_high
    return report.ratio, low, high


def is_tie(left: Measured, right: Measured) -> bool:
    """Whether two latencies of one interleaved run cannot be told apart: intervals overlap, or nearer than the noise."""
    (a, a_low, a_high), (b, b_low, b_high) = ratio_of(left), ratio_of(right)
    noise = max(LATENCY_TIE, *(item.latency.noise if item.latency else 0.0 for item in (left, right)))
    return (a_low <= b_high and b_low <= a_high) or abs(a / b - 1) <= noise


def pick_fastest(candidates: Sequence[Measured]) -> Measured:
    """The fastest; among those that tie with it the smallest; among equally large ones the most accurate.

    Where accuracy differs by less than its interval, the answers nearest to float32 decide (SQNR): a lucky sample does not.
    """
    fastest = min(candidates, key=lambda item: ratio_of(item)[0])
    tied = [item for item in candidates if is_tie(fastest, item)]
    smallest = min(item.size_bytes for item in tied)
    small = [item for item in tied if item.size_bytes <= smallest * (1 + SIZE_TIE)]
    best = min(small, key=_drop)
    near = [item for item in small if item is best or _is_as_accurate(item, best)]
    return max(near, key=_fidelity) if all(math.isfinite(_fidelity(item)) for item in near) else best


def prefer_update(candidates: Sequence[Measured], winner: Measured) -> Measured:
    """The candidate with the smallest update among those that tie with the winner in latency and size.

    Only measured updates count, and only against the winner's own: a winner whose update nobody measured stays.
    """
    if winner.update_bytes is None:
        return winner
    fastest = min(candidates, key=lambda item: ratio_of(item)[0])
    tied = [item for item in candidates if item is winner or (is_tie(item, winner) and is_tie(item, fastest))]
    known = [item for item in tied if item.update_bytes is not None]
    alike = [item for item in known if item.size_bytes <= winner.size_bytes * (1 + SIZE_TIE)]
    best = min(alike, key=lambda item: item.update_bytes or 0)
    return best if (best.update_bytes or 0) < winner.update_bytes * (1 - UPDATE_TIE) else winner


def _is_as_accurate(item: Measured, best: Measured) -> bool:
    """Whether an item's interval of the drop reaches the best one's."""
    low = item.evaluation.drop_low if item.evaluation else None
    return low is not None and low <= _drop(best)


def _fidelity(item: Measured) -> float:
    """SQNR to the float32 model in dB; infinite where it is not known."""
    report = item.evaluation
    if report is None:
        return math.inf
    return report.value if report.metric == "sqnr_db" else report.extra.get("sqnr_db", math.inf)


def _drop(item: Measured) -> float:
    return item.evaluation.drop if item.evaluation else 0.0


def find_pareto(candidates: Sequence[Measured]) -> frozenset[str]:
    """Names of candidates that no other one beats in drop, latency and size together."""
    points = {
        item.name: (item.evaluation.drop if item.evaluation else 0.0, ratio_of(item)[0], item.size_bytes) for item in candidates
    }

    def is_beaten(name: str) -> bool:
        own = points[name]
        others = (other for other in points.values() if other != own)
        return any(all(a <= b for a, b in zip(other, own, strict=True)) for other in others)

    return frozenset(name for name in points if not is_beaten(name))


def _verdict(
    item: Measured, chosen: Measured, origin: Measured, checks: Sequence[BudgetCheck], meeting: Sequence[Measured]
) -> Verdict:
    if item.failure is not None:
        return Verdict(status="failed", is_budget_met=False, reason=item.failure)
    is_met = all(check.is_met for check in checks)
    status: Status = "chosen" if item is chosen else "passed" if is_met else "missed"
    if item is chosen:
        reason = _why_chosen(item, origin, checks, meeting)
    elif is_met:
        reason = _why_not(item, chosen, origin)
    else:
        reason = _join([describe_misses(checks), *_slow_note(item, origin)])
    return Verdict(status=status, is_budget_met=is_met, reason=reason, checks=tuple(checks))


def describe_misses(checks: Iterable[BudgetCheck]) -> str:
    """The terms that are not met, in words."""
    parts = []
    for check in checks:
        if not check.is_met and check.value is not None:
            words = "at most" if check.operator == "<=" else "at least"
            note = f" ({check.note})" if check.note else ""
            parts.append(f"{check.name} is {check.value:.4g}, the budget wants {words} {check.limit:g}{note}")
    return "; ".join(parts)


def _join(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)


def _is_slower(item: Measured, origin: Measured) -> bool:
    return item is not origin and not is_tie(item, origin) and ratio_of(item)[0] > 1


def _slow_note(item: Measured, origin: Measured) -> list[str]:
    return [f"{ratio_of(item)[0]:.2f}x slower than {origin.name} here"] if _is_slower(item, origin) else []


def _speed(item: Measured, origin: Measured) -> str:
    ratio, low, high = ratio_of(item)
    if item is origin:
        return "the model as given"
    if is_tie(item, origin):
        return f"as fast as {origin.name} (within the noise)"
    if ratio > 1:
        return f"{ratio:.2f}x slower than {origin.name} (95 % interval {low:.2f} to {high:.2f})"
    return f"{1 / ratio:.2f}x faster than {origin.name} (95 % interval {1 / high:.2f} to {1 / low:.2f})"


def _quality(item: Measured) -> str:
    report = item.evaluation
    if report is None:
        return ""
    if report.metric == "sqnr_db" and report.baseline >= SQNR_CAP_DB:  # against no noise at all a difference says nothing
        return f"{report.metric} {report.value:.1f}"
    change = f"{abs(report.drop):.4f} {'worse' if report.drop > 0 else 'better'}" if report.drop else "unchanged"
    return f"{report.metric} {report.value:.4f} ({change})"


def _size(item: Measured) -> str:
    return f"{item.size_bytes / BYTES_PER_MB:.3f} MB"


def _why_chosen(item: Measured, origin: Measured, checks: Sequence[BudgetCheck], meeting: Sequence[Measured]) -> str:
    if not meeting:
        return _join([f"no candidate meets the budget; this one is nearest: {describe_misses(checks)}"])
    tied = [other.name for other in meeting if other is not item and is_tie(other, item)]
    facts = _facts(item, origin)
    if len(meeting) == 1:
        return f"the only candidate that meets the budget: {facts}"
    if larger := _larger_update(item, meeting):
        text = f"an update of {_kilobytes(item)} from the previous release, {larger.name} needs {_kilobytes(larger)}"
        return f"ties with {', '.join(tied)} in latency; its update is the smallest: {text}: {facts}"
    if tied:
        return f"ties with {', '.join(tied)} in latency, none of which is smaller, or as small and more accurate: {facts}"
    return f"the fastest of {len(meeting)} candidates that meet the budget: {facts}"


def _larger_update(item: Measured, meeting: Sequence[Measured]) -> Measured | None:
    """What the item was preferred to because its update is smaller, if anything."""
    own = item.update_bytes
    others = [other for other in meeting if other is not item and other.update_bytes is not None and is_tie(other, item)]
    larger = [other for other in others if own is not None and own < (other.update_bytes or 0) * (1 - UPDATE_TIE)]
    return min(larger, key=lambda other: other.update_bytes or 0, default=None)


def _kilobytes(item: Measured) -> str:
    return f"{(item.update_bytes or 0) / 1e3:.1f} kB"


def _why_not(item: Measured, chosen: Measured, origin: Measured) -> str:
    """Why a candidate that meets the budget was not chosen."""
    note = _slow_note(item, origin)
    if is_tie(item, chosen) and item.update_bytes is not None and chosen.update_bytes is not None:
        note.append(f"its update from the previous release has {_kilobytes(item)}, that of {chosen.name} {_kilobytes(chosen)}")
    if is_tie(item, chosen):
        if item.size_bytes > chosen.size_bytes * (1 + SIZE_TIE):
            share = item.size_bytes / chosen.size_bytes - 1
            return _join([f"meets the budget; ties with {chosen.name} in latency, but is {share * 100:.0f} % larger", *note])
        if _drop(item) < _drop(chosen) and _fidelity(item) < _fidelity(chosen):
            text = f"meets the budget; ties with {chosen.name} in latency, size and accuracy, and answers less like fp32"
            return _join([text, *note])
        if _drop(item) < _drop(chosen):
            return _join(["meets the budget; more accurate, but not as fast as the fastest candidate", *note])
        return _join([f"meets the budget; ties with {chosen.name} in latency and size, and is not more accurate", *note])
    factor = ratio_of(item)[0] / ratio_of(chosen)[0]
    if factor < 1:
        return _join([f"meets the budget; {chosen.name} was preferred inside a tie with the fastest", *note])
    return _join([f"meets the budget; takes {factor:.2f}x the time of {chosen.name}", *note])


def _facts(item: Measured, origin: Measured) -> str:
    return _join([_speed(item, origin), _quality(item), _size(item)])


def _apology(chosen: Measured, origin: Measured, checks: dict[str, tuple[BudgetCheck, ...]]) -> str:
    misses = describe_misses(checks[chosen.name])
    return f"Budget not met: {chosen.name} is nearest ({_facts(chosen, origin)}); {misses}."


def _sentence(
    chosen: Measured,
    origin: Measured,
    candidates: Sequence[Measured],
    checks: dict[str, tuple[BudgetCheck, ...]],
    target: str,
) -> str:
    is_here = chosen.latency is None or chosen.latency.is_on_target
    place = "" if is_here else f"times are this host's, not those of {target}"
    parts = [f"Budget met: {chosen.name}, {_facts(chosen, origin)}", _why_no_int8(chosen, candidates, checks), place]
    return _join(parts) + "."


def _why_no_int8(chosen: Measured, candidates: Sequence[Measured], checks: dict[str, tuple[BudgetCheck, ...]]) -> str:
    """Why the winner is not int8, when int8 was tried."""
    tried = [item for item in candidates if "int8" in item.name]
    if not tried or "int8" in chosen.name:
        return ""
    made = [item for item in tried if item.failure is None]
    if not made:
        return f"int8 was not possible: {tried[0].failure}".rstrip(".")
    allowed = [item for item in made if all(check.is_met for check in checks[item.name])]
    if not allowed:
        nearest = min(made, key=lambda item: _badness(item, checks[item.name]))
        return f"int8 costs too much: {nearest.name}: {describe_misses(checks[nearest.name])}"
    best = pick_fastest(allowed)
    if is_tie(best, chosen):
        return f"int8 does not pay here: {best.name} is no faster than {chosen.name}"
    return f"int8 does not pay here: {best.name} takes {ratio_of(best)[0] / ratio_of(chosen)[0]:.2f}x the time"
