"""The plots of a report: from the records of a run to figures with their sentence.

Each figure is drawn for three widths; the style sheet shows the one that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgekit.compiler.gate import LATENCY_TIE
from edgekit.compiler.markup import Markup, element
from edgekit.compiler.plot import Axis, Limit, Point, Shape, find_front, scatter, shape
from edgekit.compiler.plot_rows import Bar, bars
from edgekit.compiler.report_words import (
    NBSP,
    SHARES,
    TIMES,
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

WIDTHS = {"wide": 1000, "middle": 600, "narrow": 340}
TINY_STEP = 1e-6
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
    mark = element("g", shape(kind, 10.0, 10.0), class_=f"mark {class_}")
    return element("svg", mark, viewBox="0 0 20 20", width=16, height=16, class_="icon", aria_hidden="true")


def figure(draw: Callable[[str, int], Markup], caption: str, legend: Markup | None = None) -> Markup:
    """A figure for every width, its key and its sentence."""
    pictures = [element("div", draw(name, width), class_=f"plot {name}") for name, width in WIDTHS.items()]
    return element("figure", *pictures, legend, element("figcaption", caption))


def trade_off(result: OptimizeResult, quantity: str) -> Markup | None:
    """Quality against ``latency_ms`` or ``size_mb``; None where fewer than one candidate has both."""
    is_latency = quantity == "latency_ms"
    drawn = [item for item in result.candidates if item.evaluation and (item.latency if is_latency else item.artifact)]
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
    limits = _limits(result, quantity, scale)
    x_axis = Axis(
        title=f"latency, median, {unit} (faster is left)" if is_latency else f"size of the file, {unit} (smaller is left)",
        format_tick=tick,
        is_lower_better=True,
        limits=limits,
    )
    y_axis = Axis(
        title=metric_title(metric) + (", %" if metric in SHARES else ""),
        format_tick=tick,
        is_lower_better=is_lower,
        limits=_quality_limits(result),
    )
    caption = _front_caption([item.name for index, item in enumerate(drawn) if index in front], result, is_latency=is_latency)
    label = f"{metric_title(metric)} against {'latency' if is_latency else 'size'} of {len(drawn)} candidates. {caption}"

    def draw(name: str, width: int) -> Markup:
        return scatter(points, x_axis, y_axis, width=width, height=340 if name == "narrow" else 430, label=label)

    return figure(draw, caption, _legend(drawn, result))


def _front_caption(names: Sequence[str], result: OptimizeResult, *, is_latency: bool) -> str:
    """Who is on the front, and what the chosen one has to do with it."""
    shown = f"On the Pareto front of these two figures: {listing(names)}"
    parts = [f"{shown}; nothing else is better in one without being worse in the other."]
    if result.chosen.name not in names:
        parts.append(f"{result.chosen.name} is not on this front: the verdict weighs all figures, the budget and the noise.")
    parts.append(f"Thin bars are 95{NBSP}% intervals.")
    if is_latency and not is_on_target(result):
        parts.append(f"Times are this host's, not those of {result.target.name}.")
    return " ".join(parts)


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
    return value * 100 if metric in SHARES else value


def _point(
    item: Candidate, result: OptimizeResult, place: tuple[float, float], *, is_latency: bool, is_on_front: bool
) -> Point:
    report = item.evaluation
    assert report is not None
    kind, class_ = look(item, result)
    interval = None
    if report.drop_low is not None and report.drop_high is not None and report.drop_low < report.drop_high:
        sign = -1 if report.is_higher_better else 1
        ends = sorted(_y(report.metric, report.baseline + sign * drop) for drop in (report.drop_low, report.drop_high))
        interval = (ends[0], ends[1])
    cost = milliseconds(item.latency.p50_ms) if is_latency and item.latency else size(_x(item, is_latency=False))
    shown = f"{quality(report.metric, report.value)} ({change_words(report)})"
    return Point(
        name=item.name, x=place[0], y=place[1], shape=kind, kind=class_, y_interval=interval, is_on_front=is_on_front,
        x_interval=(item.latency.p50_low_ms, item.latency.p50_high_ms) if is_latency and item.latency else None,
        title=f"{item.name}: {shown}, {cost}; {STATUS_WORDS[item.verdict.status]}",
        rank={"chosen": 0, "baseline": 1}.get(class_, 2 if is_on_front else 3),
    )  # fmt: skip


def _limits(result: OptimizeResult, quantity: str, scale: float) -> tuple[Limit, ...]:
    """Upper limits of the budget on a quantity, the hardware's own among them."""
    names = {"latency_ms": ("latency_ms",), "size_mb": ("size_mb", "flash_mb")}[quantity]
    factor = 1.0 if quantity == "latency_ms" else BYTES_PER_MB / scale
    checks = [check for check in result.chosen.verdict.checks if check.name in names]
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
    return tuple(limits)


def tick(value: float, step: float) -> str:
    """A tick with as many decimals as its step needs."""
    if step < TINY_STEP:
        return significant(value)
    decimals = next((count for count in range(7) if abs(round(step, count) - step) < step * 1e-6), 7)
    return f"{value:,.{decimals}f}".replace("-", "\u2212")


def is_on_target(result: OptimizeResult) -> bool:
    """Whether the latencies were measured on the target's own hardware."""
    reports = [item.latency for item in result.candidates if item.latency]
    return bool(reports) and all(report.is_on_target for report in reports)


def listing(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _legend(drawn: Sequence[Candidate], result: OptimizeResult) -> Markup:
    """The key: only the symbols that occur."""
    words = {"star": "chosen", "square": "baseline", "circle": "meets the budget", "triangle": "misses the budget"}
    seen = {look(item, result) for item in drawn}
    entries = [
        element("li", icon(kind, class_), words[kind])
        for kind, class_ in sorted(seen, key=lambda entry: list(words).index(entry[0]))
    ]
    return element(
        "ul",
        *entries,
        element("li", element("span", class_="front-key"), "Pareto front"),
        element("li", element("span", class_="muted-key"), "pale: dominated"),
        class_="legend",
    )


def latency(result: OptimizeResult) -> Markup | None:
    """Latency of every candidate that was timed."""
    timed = [(item, item.latency) for item in result.candidates if item.latency]
    if not timed:
        return None
    rows = []
    for item, report in timed:
        kind, class_ = look(item, result)
        note = significant(report.p50_ms) + (
            "" if report.ratio is None else f" ({'tie' if is_tie(report) else f'{report.ratio:.2f}{TIMES}'})"
        )
        tail = f"p90 {milliseconds(report.p90_ms)}, p99 {milliseconds(report.p99_ms)}"
        title = f"{item.name}: p50 {milliseconds(report.p50_ms)}, {tail}; {speed(report)}"
        rows.append(
            Bar(
                name=item.name,
                p50=report.p50_ms,
                p90=report.p90_ms,
                p99=report.p99_ms,
                shape=kind,
                kind=class_,
                note=note,
                title=title,
            )
        )
    noise = max(report.noise for _, report in timed)
    place = "on the target's own hardware" if is_on_target(result) else f"on this host, not on {result.target.name}"
    caption = (
        f"Solid bar: median (p50), pale bar: p90, whisker: p99; measured {place}, one sample a run, all candidates in turn. "
        f"At the right the median and its ratio to the baseline's. Noise floor of this run (the baseline against itself): "
        f"{noise * 100:.1f}{NBSP}%; nearer than that or than {LATENCY_TIE * 100:g}{NBSP}% is a tie."
    )
    limits = _limits(result, "latency_ms", 1.0)
    label = f"Latency of {len(rows)} candidates. {caption}"

    def draw(_name: str, width: int) -> Markup:
        return bars(rows, title="ms", format_tick=tick, limits=limits, width=width, label=label)

    return figure(draw, caption)
