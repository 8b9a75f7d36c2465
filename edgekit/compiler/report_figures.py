"""The plots of a report: from the records of a run to figures with their sentence.

Each figure is drawn for three widths; the style sheet shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgekit.compiler.gate import LATENCY_TIE
from edgekit.compiler.markup import Markup, element
from edgekit.compiler.plot import Axis, Interval, Limit, Point, Shape, find_front, scatter, shape
from edgekit.compiler.plot_rows import CLIP, Bar, bars
from edgekit.compiler.report_words import (
    NBSP,
    SHARES,
    TIMES,
    change_interval,
    change_words,
    is_tie,
    metric_title,
    milliseconds,
    quality,
    significant,
    size,
    speed,
)
from edgekit.compiler.result import OptimizeResult
from edgekit.schema.candidate import Candidate
from edgekit.schema.measurement import EvalReport, LatencyReport

WIDTHS = {"wide": 1000, "middle": 600, "narrow": 340}
TINY_STEP = 1e-6
QUIET_DB = 80.0
"""Answers with less noise than this are as good as without; they are drawn here, so that others can be told apart."""
SHOWN = 15
"""Rows of a picture that has a folded table with all of them."""
BYTES_PER_KB, BYTES_PER_MB = 1e3, 1e6
STATUS_SHAPES: dict[str, Shape] = {"chosen": "star", "passed": "circle", "missed": "triangle", "failed": "cross"}
STATUS_WORDS = {"chosen": "chosen", "passed": "meets the budget", "missed": "misses the budget", "failed": "failed"}


def look(candidate: Candidate, result: OptimizeResult) -> tuple[Shape, str]:
    """Symbol and CSS class of a candidate."""
    status = candidate.verdict.status
    if candidate.name == result.baseline.name and status != "chosen":
        return "square", "baseline"
    return STATUS_SHAPES[status], status


def icon(kind: Shape, class_: str) -> Markup:
    """A symbol in running text; the words beside it say the same."""
    return icon_of(shape(kind, 10.0, 10.0), f"mark {class_}")


def icon_of(sign: Markup, class_: str) -> Markup:
    """Anything drawn on 20 by 20 as a symbol in running text."""
    inner = element("g", sign, class_=class_)
    return element("svg", inner, viewBox="0 0 20 20", width=16, height=16, class_="icon", aria_hidden="true")


def figure(draw: Callable[[str, int], Markup], caption: str, legend: Markup | None = None) -> Markup:
    """A figure for every width, its key and its sentence."""
    pictures = [element("div", draw(name, width), class_=f"plot {name}") for name, width in WIDTHS.items()]
    return element("figure", *pictures, legend, element("figcaption", caption))


def trade_off(result: OptimizeResult, quantity: str) -> Markup | None:
    """Quality against ``latency_ms`` or ``size_mb``; None where no candidate has both."""
    is_latency = quantity == "latency_ms"
    drawn = [item for item in result.candidates if _is_drawable(item, is_latency=is_latency)]
    reports = [item.evaluation for item in drawn if item.evaluation]
    if not reports:
        return None
    metric, is_lower = reports[0].metric, not reports[0].is_higher_better
    scale, unit = _unit(drawn, is_latency=is_latency)
    places = [
        (_x(item, is_latency=is_latency) / scale, _y(metric, report.value)) for item, report in zip(drawn, reports, strict=True)
    ]
    front = find_front(places, is_y_lower_better=is_lower)
    points = [
        _point(item, result, place, is_latency=is_latency, is_on_front=index in front)
        for index, (item, place) in enumerate(zip(drawn, places, strict=True))
    ]
    x_title = f"latency, median, {unit} (faster is left)" if is_latency else f"size of the file, {unit} (smaller is left)"
    x_axis = Axis(title=x_title, format_tick=tick, is_lower_better=True, limits=_limits(result, quantity, scale))
    y_title = metric_title(metric) + (", %" if metric in SHARES else ", dB" if metric == "sqnr_db" else "")
    y_axis = Axis(title=y_title, format_tick=tick, is_lower_better=is_lower, limits=_quality_limits(result))
    on_front = sorted(front, key=lambda index: places[index])
    caption = _front_caption([drawn[index].name for index in on_front], drawn, result, is_latency=is_latency)
    label = f"{metric_title(metric)} against {'latency' if is_latency else 'size'}, {len(drawn)} candidates; table: Candidates."

    def draw(name: str, width: int) -> Markup:
        return scatter(points, x_axis, y_axis, width=width, height=340 if name == "narrow" else 430, label=label)

    return figure(draw, caption, _legend(drawn, points, result))


def _is_drawable(item: Candidate, *, is_latency: bool) -> bool:
    """Whether a candidate has both figures, as numbers that fit on paper."""
    cost = item.latency.p50_ms if is_latency and item.latency else 0.0
    has_cost = item.latency is not None if is_latency else item.artifact is not None
    return has_cost and item.evaluation is not None and math.isfinite(cost) and math.isfinite(item.evaluation.value)


def _front_caption(names: Sequence[str], drawn: Sequence[Candidate], result: OptimizeResult, *, is_latency: bool) -> str:
    """Who is on the front, and what the chosen one has to do with it."""
    shown = f"On the Pareto front of these two figures: {listing(names)}"
    parts = [f"{shown}; nothing else is better in one without being worse in the other."]
    if result.chosen.name not in names:
        parts.append(f"{result.chosen.name} is not on this front: the verdict weighs all figures, the budget and the noise.")
    if any(item.evaluation and item.evaluation.metric == "sqnr_db" and item.evaluation.value > QUIET_DB for item in drawn):
        parts.append(f"More than {QUIET_DB:g}{NBSP}dB is drawn as {QUIET_DB:g}{NBSP}dB.")
    parts += [f"Thin bars are 95{NBSP}% intervals.", *_left_out(drawn, result)]
    if is_latency and not is_on_target(result):
        parts.append(f"Times are this host's, not those of {result.target.name}.")
    return " ".join(parts)


def _left_out(drawn: Sequence[Candidate], result: OptimizeResult) -> list[str]:
    """Who is not in a picture, so that nobody takes it for all."""
    names = {item.name for item in drawn}
    missing = [item.name for item in result.candidates if item.name not in names]
    return [f"Not drawn, since a figure is missing: {listing(missing)}."] if missing else []


def _unit(drawn: Sequence[Candidate], *, is_latency: bool) -> tuple[float, str]:
    if is_latency:
        return 1.0, "ms"
    largest = max(item.artifact.size_bytes for item in drawn if item.artifact)
    return (BYTES_PER_MB, "MB") if largest >= BYTES_PER_MB else (BYTES_PER_KB, "kB")


def _x(item: Candidate, *, is_latency: bool) -> float:
    if is_latency:
        return item.latency.p50_ms if item.latency else 0.0
    return float(item.artifact.size_bytes) if item.artifact else 0.0


def _y(metric: str, value: float) -> float:
    if metric == "sqnr_db":
        return min(value, QUIET_DB)
    return value * 100 if metric in SHARES else value


def _point(
    item: Candidate, result: OptimizeResult, place: tuple[float, float], *, is_latency: bool, is_on_front: bool
) -> Point:
    report = item.evaluation
    assert report is not None
    kind, class_ = look(item, result)
    timing = item.latency if is_latency else None
    cost = milliseconds(item.latency.p50_ms) if is_latency and item.latency else size(_x(item, is_latency=False))
    shown = f"{quality(report.metric, report.value)} ({change_words(report)})"
    return Point(
        name=item.name, x=place[0], y=place[1], shape=kind, kind=class_, is_on_front=is_on_front,
        x_interval=_finite(timing.p50_low_ms, timing.p50_high_ms) if timing else None, y_interval=_quality_interval(report),
        title=f"{item.name}: {shown}, {cost}; {STATUS_WORDS[item.verdict.status]}",
        rank={"chosen": 0, "baseline": 1}.get(class_, 2 if is_on_front else 3),
    )  # fmt: skip


def _quality_interval(report: EvalReport) -> Interval:
    """The interval of the change, around the baseline's value."""
    interval = change_interval(report)
    if interval is None or interval[0] >= interval[1]:
        return None
    return _finite(*(_y(report.metric, report.baseline + end) for end in interval))


def _finite(low: float, high: float) -> Interval:
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _limits(result: OptimizeResult, quantity: str, scale: float) -> tuple[Limit, ...]:
    """Upper limits of the budget on a quantity, the hardware's own among them."""
    names = {"latency_ms": ("latency_ms",), "size_mb": ("size_mb", "flash_mb")}[quantity]
    factor = 1.0 if quantity == "latency_ms" else BYTES_PER_MB / scale
    checks = [check for check in result.chosen.verdict.checks if check.name in names and math.isfinite(check.limit)]
    return tuple(
        Limit(value=check.limit * factor, is_upper=True, label=f"{check.name} \u2264 {check.limit:g}") for check in checks
    )


def _quality_limits(result: OptimizeResult) -> tuple[Limit, ...]:
    """Limits of the budget on the metric or its drop, as values of the metric."""
    report = result.chosen.evaluation
    if report is None:
        return ()
    limits = []
    short = report.metric.rpartition(":")[2]
    for check in result.chosen.verdict.checks:
        if check.name in ("drop", f"{short}_drop"):
            value = report.baseline - check.limit if report.is_higher_better else report.baseline + check.limit
            limits.append(
                Limit(
                    value=_y(report.metric, value),
                    is_upper=not report.is_higher_better,
                    label=f"{check.name} \u2264 {check.limit:g}",
                )
            )
        elif check.name == short:
            sign = "\u2264" if check.operator == "<=" else "\u2265"
            limits.append(
                Limit(
                    value=_y(report.metric, check.limit),
                    is_upper=check.operator == "<=",
                    label=f"{check.name} {sign} {check.limit:g}",
                )
            )
    return tuple(limit for limit in limits if math.isfinite(limit.value))


def tick(value: float, step: float) -> str:
    """A tick with as many decimals as its step needs."""
    if step < TINY_STEP:
        return significant(value)
    decimals = next((count for count in range(7) if abs(round(step, count) - step) < step * 1e-6), 7)
    return f"{value:,.{decimals}f}".replace("-", "\u2212")


def short_tick(value: float, step: float) -> str:
    """A tick whose zero is short, since it stands at the edge."""
    return tick(value, step) if value else "0"


def is_on_target(result: OptimizeResult) -> bool:
    """Whether the latencies were measured on the target's own hardware."""
    reports = [item.latency for item in result.candidates if item.latency]
    return bool(reports) and all(report.is_on_target for report in reports)


def listing(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _legend(drawn: Sequence[Candidate], points: Sequence[Point], result: OptimizeResult) -> Markup:
    """The key: only what occurs."""
    words = {"star": "chosen", "square": "baseline", "circle": "meets the budget", "triangle": "misses the budget"}
    seen = sorted({look(item, result) for item in drawn}, key=lambda entry: list(words).index(entry[0]))
    entries = [element("li", icon(kind, class_), words[kind]) for kind, class_ in seen]
    entries.append(key("front-key", "Pareto front"))
    if any(not point.is_on_front and point.rank for point in points):
        entries.append(key("muted-key", "pale: dominated"))
    return element("ul", *entries, class_="legend")


def key(class_: str, words: str) -> Markup:
    """An entry of a legend whose sign is drawn by the style sheet."""
    return element("li", element("span", class_=class_), words)


def bar_key(class_: str, words: str) -> Markup:
    """An entry of a legend that shows a bar."""
    bar = element("rect", x=1, y=5, width=18, height=10, class_="length")
    return element("li", icon_of(bar, class_), words)


def latency(result: OptimizeResult) -> Markup | None:
    """Latency of every candidate that was timed, the fastest first, with the noise floor around the baseline's median."""
    timed = [(item, item.latency) for item in result.candidates if item.latency and _is_timed(item.latency)]
    if not timed:
        return None
    timed.sort(key=lambda entry: entry[1].p50_ms)
    rows = [_bar(item, report, result) for item, report in timed]
    tie = max(LATENCY_TIE, *(report.noise for _, report in timed))
    middle = next((report.p50_ms for item, report in timed if item.name == result.baseline.name), None)
    band = None if middle is None else (middle * (1 - tie), middle * (1 + tie))
    limits = _limits(result, "latency_ms", 1.0)
    caption = _latency_caption([item for item, _ in timed], max(report.noise for _, report in timed), result)
    if max(row.p99 for row in rows) > CLIP * max(row.p90 for row in rows):
        caption += " An arrow: p99 lies beyond the plot; the table has it."
    label = f"Latency of {len(rows)} candidates; table: Candidates."
    entries = [key("p50-key", "median (p50)"), key("p90-key", "p90"), key("p99-key", "p99")]
    if band is not None:
        entries.append(key("band-key", f"within {tie * 100:.2g}{NBSP}% of {result.baseline.name}: a tie"))

    def draw(_name: str, width: int) -> Markup:
        return bars(rows, title="latency, ms", format_tick=tick, limits=limits, band=band, width=width, label=label)

    return figure(draw, caption, element("ul", *entries, class_="legend"))


def _is_timed(report: LatencyReport) -> bool:
    return all(math.isfinite(value) for value in (report.p50_ms, report.p90_ms, report.p99_ms, report.noise))


def _bar(item: Candidate, report: LatencyReport, result: OptimizeResult) -> Bar:
    kind, class_ = look(item, result)
    against = "" if report.ratio is None else f" ({'tie' if is_tie(report) else f'{report.ratio:.2f}{TIMES}'})"
    tail = f"p90 {milliseconds(report.p90_ms)}, p99 {milliseconds(report.p99_ms)}"
    return Bar(
        name=item.name, p50=report.p50_ms, p90=report.p90_ms, p99=report.p99_ms, shape=kind, kind=class_,
        note=significant(report.p50_ms) + against,
        title=f"{item.name}: p50 {milliseconds(report.p50_ms)}, {tail}; {speed(report)}",
    )  # fmt: skip


def _latency_caption(drawn: Sequence[Candidate], noise: float, result: OptimizeResult) -> str:
    place = "on the target's own hardware" if is_on_target(result) else f"on this host, not on {result.target.name}"
    parts = [
        f"Measured {place}, one sample a run, all candidates in turn; fastest first.",
        f"At the right the median and the time it takes against {result.baseline.name}.",
        f"Noise floor of this run ({result.baseline.name} against itself): {noise * 100:.1f}{NBSP}%;",
        f"nearer than that or than {LATENCY_TIE * 100:g}{NBSP}% is a tie.",
        *_left_out(drawn, result),
    ]
    return " ".join(parts)
