"""Figures and claims of a report in words: a claim is made only where its interval allows it.

>>> size(100_413).replace(NBSP, " "), milliseconds(0.0686).replace(NBSP, " "), plain(0.0004)
('100.4 kB', '0.0686 ms', '0.0004')
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from edgekit.compiler.gate import LATENCY_TIE
from edgekit.compiler.result import OptimizeResult
from edgekit.schema.candidate import Candidate
from edgekit.schema.measurement import EvalReport, LatencyReport

NBSP = "\u00a0"
MINUS = "\u2212"
TIMES = "\u00d7"
NONE = "\u2014"
INFINITE = "\u221e"
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:%|ms|kB|MB|GB|dB|points)(?!\w))")
_FACTOR = re.compile(r"(?<![\w.-])(\d+(?:\.\d+)?)x(?= (?:as|faster|slower|smaller|larger|the time)\b)")
METRICS = {
    "top1": "top-1 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "agreement": "agreement with the baseline",
    "sqnr_db": "signal to quantization noise",
    "mse": "mean squared error",
    "mae": "mean absolute error",
}
SHARES = frozenset({"top1", "balanced_accuracy", "agreement"})
SIZE_SAME = 0.02
"""Files that differ by less are said to be as large."""
SMALL_POWER, LARGE_POWER = 6, 9
SILENT_DB = 200.0
"""The records' word for no noise at all."""
PLANNED = "quantize-planned"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, as people write it: very small and large ones as a power of ten."""
    if value == 0 or math.isnan(value):
        return "0" if value == 0 else NONE
    if math.isinf(value):
        return INFINITE if value > 0 else MINUS + INFINITE
    power = math.floor(math.log10(abs(value)))
    if -SMALL_POWER <= power <= LARGE_POWER:
        return f"{value:,.{max(digits - 1 - power, 0)}f}".replace("-", MINUS)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}{TIMES}10^{int(exponent)}".replace("-", MINUS)


def plain(value: float) -> str:
    """A number with up to four significant digits and no zeros at its end."""
    shown = significant(value, 4)
    return shown.rstrip("0").rstrip(".") if "." in shown and TIMES not in shown else shown


def milliseconds(value: float) -> str:
    """A duration."""
    return f"{significant(value)}{NBSP}ms"


def bare_ms(value: float | None) -> str:
    """Milliseconds without their unit."""
    return NONE if value is None else significant(value)


def decibels(value: float | None) -> str:
    """An SQNR; no noise at all is said in words."""
    if value is None or math.isnan(value):
        return NONE
    if value >= SILENT_DB:
        return "no noise"
    return f"{value:.1f}{NBSP}dB".replace("-", MINUS) if math.isfinite(value) else significant(value)


def percent(value: float, digits: int = 3) -> str:
    """A share in per cent; what is not quite all is not called all."""
    per_cent = 100 * value
    shown = f"{per_cent:.0f}" if per_cent >= 99.95 else f"{per_cent:.1f}" if per_cent >= 99.5 else significant(per_cent, digits)
    return f"{shown}{NBSP}%"


def signed(value: float, digits: int = 3) -> str:
    """A change with its sign."""
    sign = "+" if value > 0 else MINUS if value < 0 else "\u00b1"
    return f"{sign}{significant(abs(value), digits)}"


def interval(low: float, high: float) -> str:
    """From the lower to the upper end."""
    return f"{significant(low)} \u2026 {significant(high)}"


def counted(items: Sequence[object], noun: str) -> str:
    """How many there are, with the noun in its number."""
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


def finite(value: float | None) -> float | None:
    """None for what is not a number on paper."""
    return value if value is not None and math.isfinite(value) else None


def unknown_last(value: float) -> float:
    """For sorting upwards."""
    return math.inf if math.isnan(value) else value


def size(size_bytes: float) -> str:
    """A size in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{significant(size_bytes / factor, 4)}{NBSP}{unit}"
    return f"{size_bytes:.0f}{NBSP}bytes"


def times(value: float) -> str:
    """A factor."""
    return f"{significant(value)}{TIMES}"


def typeset(sentence: str) -> str:
    """A sentence of the gate or of a pass, with the page's signs: numbers stay with their units, factors have their sign.

    >>> typeset("1.68x faster (95 % interval 1.67 to 1.68)").replace(NBSP, "~").replace(TIMES, "*")
    '1.68* faster (95~% interval 1.67 to 1.68)'
    """
    return _FACTOR.sub(rf"\1{TIMES}", _BEFORE_UNIT.sub(NBSP, sentence))


def metric_title(metric: str) -> str:
    """What a metric is called in a sentence."""
    return METRICS.get(metric, metric)


def quality(metric: str, value: float) -> str:
    """A metric's value in its unit."""
    if not math.isfinite(value):
        return significant(value)
    if metric in SHARES:
        return f"{value * 100:.2f}{NBSP}%"
    if metric == "sqnr_db" and value >= SILENT_DB:
        return decibels(value)
    return f"{significant(value, 4)}{NBSP}dB" if metric == "sqnr_db" else significant(value, 4)


def difference(metric: str, value: float, *, is_bare: bool = False) -> str:
    """A signed difference of two values; shares differ by percentage points."""
    if not math.isfinite(value):
        return significant(value)
    sign = "+" if value > 0 else MINUS if value < 0 else "\u00b1"
    if metric in SHARES:
        return f"{sign}{abs(value) * 100:.2f}" + ("" if is_bare else f"{NBSP}points")
    unit = f"{NBSP}dB" if metric == "sqnr_db" and not is_bare else ""
    return f"{sign}{significant(abs(value), 3)}{unit}"


def change(report: EvalReport) -> float:
    """Value minus baseline."""
    return -report.drop if report.is_higher_better else report.drop


def change_interval(report: EvalReport) -> tuple[float, float] | None:
    """The 95 % interval of :func:`change`."""
    if report.drop_low is None or report.drop_high is None:
        return None
    return (-report.drop_high, -report.drop_low) if report.is_higher_better else (report.drop_low, report.drop_high)


def is_absolute(report: EvalReport) -> bool:
    """Whether the value itself is what was lost: noise against a baseline that has none, so that a change says nothing."""
    return report.metric == "sqnr_db" and report.baseline >= SILENT_DB


def interval_words(report: EvalReport) -> str:
    """The interval of the change, or of the value where a change says nothing; empty where there is none, or no width."""
    ends = change_interval(report)
    if ends is None or ends[0] == ends[1]:
        return ""
    if is_absolute(report):
        low, high = (decibels(report.baseline + value) for value in ends)
    else:
        low, high = (difference(report.metric, value, is_bare=True) for value in ends)
    return f"95{NBSP}% interval {low} to {high}"


def change_words(report: EvalReport) -> str:
    """The change with its interval."""
    shown, ends = difference(report.metric, change(report)), interval_words(report)
    if is_absolute(report):
        return ends
    return f"{shown} ({ends})" if ends else shown


def is_tie(report: LatencyReport) -> bool:
    """Whether the latency cannot be told from the baseline's."""
    if report.ratio is None:
        return True
    low, high = _ratio_interval(report)
    return low <= 1 <= high or abs(report.ratio - 1) <= max(report.noise, LATENCY_TIE)


def _ratio_interval(report: LatencyReport) -> tuple[float, float]:
    ratio = report.ratio or 1.0
    low = ratio if report.ratio_low is None else report.ratio_low
    return low, ratio if report.ratio_high is None else report.ratio_high


def speed(report: LatencyReport) -> str:
    """How much faster or slower than the baseline."""
    if report.ratio is None:
        return "the baseline"
    if is_tie(report):
        return "as fast, within the noise"
    if report.ratio <= 0:
        return f"{INFINITE}{TIMES} faster"
    return f"{times(1 / report.ratio)} faster" if report.ratio < 1 else f"{times(report.ratio)} slower"


def speed_interval(report: LatencyReport) -> str:
    """The interval of the factor that :func:`speed` names."""
    if report.ratio is None or report.ratio_low is None or report.ratio_high is None or min(_ratio_interval(report)) <= 0:
        return ""
    low, high = report.ratio_low, report.ratio_high
    if report.ratio < 1:
        low, high = 1 / high, 1 / low
    return f"95{NBSP}% interval {significant(low)} to {times(high)}"


def smaller(candidate: Candidate, baseline: Candidate) -> str:
    """How much smaller or larger than the baseline; empty where one has no file."""
    if candidate.artifact is None or baseline.artifact is None or not candidate.artifact.size_bytes:
        return ""
    factor = baseline.artifact.size_bytes / candidate.artifact.size_bytes
    if abs(factor - 1) <= SIZE_SAME:
        return "as large"
    return f"{times(factor)} smaller" if factor > 1 else f"{times(1 / factor)} larger"


def loss(report: EvalReport) -> str:
    """The change of quality as a claim."""
    title, interval = metric_title(report.metric), change_interval(report)
    if is_absolute(report) and report.drop:
        return f"at {quality(report.metric, report.value)} of {title}"
    if report.drop == 0 and (interval is None or interval[0] <= 0 <= interval[1]):
        return f"with the same {title}"
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return f"with no measurable change in {title}"
    return f"at {difference(report.metric, change(report))} of {title}"


def is_loss(gain: str) -> bool:
    """Whether words of :func:`speed` or :func:`smaller` say that something got worse."""
    return any(word in gain for word in ("slower", "larger"))


def headline(result: OptimizeResult) -> str:
    """The answer in one sentence."""
    chosen, baseline = result.chosen, result.baseline
    if not result.is_budget_met:
        return f"No candidate meets the budget; {chosen.name} comes nearest."
    if chosen.name == baseline.name:
        return f"Keep {chosen.name}: nothing that was tried is better within the budget."
    gains = []
    if chosen.latency is not None and chosen.latency.ratio is not None:
        gains.append(speed(chosen.latency).split(",")[0] + ("" if chosen.latency.is_on_target else " here"))
    gains += [part for part in [smaller(chosen, baseline)] if part]
    against = f" {'as' if gains and gains[-1].startswith('as ') else 'than'} {baseline.name}" if gains else ""
    is_mixed = len(gains) > 1 and is_loss(gains[0]) != is_loss(gains[1])
    parts = [(" but " if is_mixed else " and ").join(gains) + against] if gains else []
    if chosen.evaluation is not None:
        parts.append(loss(chosen.evaluation))
    return f"Use {chosen.name}: {', '.join(parts)}." if parts else f"Use {chosen.name}."


def subject(result: OptimizeResult) -> str:
    """The candidate that ``is_int8`` of a layer speaks of: the chosen one, or the search's mix where another was chosen."""
    planned = [item.name for item in (result.chosen, *result.candidates) if any(step.name == PLANNED for step in item.lineage)]
    if planned:
        return planned[0]
    is_quantized = any(step.name.startswith("quantize") for step in result.chosen.lineage)
    is_told = any(item.is_int8 for item in result.findings.layers)
    return result.chosen.name if is_told or not is_quantized else "the search\u2019s mix"


def about(result: OptimizeResult) -> str:
    """Said where the figures are not those of the chosen candidate."""
    name = subject(result)
    return "" if name == result.chosen.name else f" All this is of {name}; {result.chosen.name} was chosen."
