"""The tables of a report: the budget's terms and all candidates. Wide ones scroll inside their own box."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekit.compiler.markup import Child, Markup, element, join
from edgekit.compiler.report_figures import STATUS_WORDS, icon, look
from edgekit.compiler.report_words import (
    NBSP,
    NONE,
    TIMES,
    change,
    change_interval,
    counted,
    difference,
    interval_words,
    is_absolute,
    is_tie,
    metric_title,
    plain,
    quality,
    significant,
    size,
    typeset,
)
from edgekit.compiler.result import OptimizeResult
from edgekit.schema.candidate import BudgetCheck, Candidate
from edgekit.schema.measurement import EvalReport, LatencyReport

Cell = tuple[Child, str | None]
Row = tuple[str, list[Cell]]
SHOWN_ROWS = 8
"""Candidates before the fold; the chosen one and the baseline come first."""


def table(head: Sequence[Cell], rows: Sequence[tuple[str, Sequence[Cell]]], *, label: str, class_: str = "") -> Markup:
    """A table in its own scrolling box; the first cell of a row is its heading. Cells are (content, class).

    Args:
        head: one cell a column.
        rows: class of the row, and one cell a column.
        label: what the table is, for those who cannot see it.
        class_: ``as-cards`` where every row becomes a card on a phone, its cells named by their column.
    """
    names = [content if isinstance(content, str) else None for content, _ in head]
    top = element("tr", *(element("th", content, class_=class_, scope="col") for content, class_ in head))
    body = [
        element(
            "tr",
            *(
                element("th", content, class_=kind, scope="row", role="rowheader")
                if index == 0
                else element("td", content, class_=kind, data_label=names[index], role="cell")
                for index, (content, kind) in enumerate(cells)
            ),
            class_=row_class or None,
            role="row",
        )
        for row_class, cells in rows
    ]
    inner = element("table", element("thead", top), element("tbody", *body, role="rowgroup"), role="table")
    return element("div", inner, class_=f"scroll {class_}".strip(), tabindex="0", role="region", aria_label=label)


def names(head: Sequence[Cell], rows: Sequence[Row], label: str) -> Markup:
    """A table whose first column may be long: it breaks rather than push the figures out of sight."""
    return table(head, rows, label=label, class_="names")


def named(name: str, op_type: str) -> Markup:
    """A layer with its operator."""
    return element("span", name, " ", element("small", op_type))


def fold(summary: str, *content: Child) -> Markup:
    """What most readers need not see."""
    return element("details", element("summary", summary), *content)


def candidate_table(result: OptimizeResult) -> Markup:
    """Every candidate with what it measured, its verdict and the reason: the chosen one, the baseline, then by verdict."""
    reports = [item.evaluation for item in result.candidates if item.evaluation]
    changes = () if reports and all(is_absolute(report) for report in reports) else ("change",)
    title = metric_title(result.request.metric)
    figures = (title, *changes, "median, ms", f"time against {result.baseline.name}", "size")
    head: list[Cell] = [("candidate", None), ("verdict", None), *((title, "number") for title in figures)]
    rows = [
        (_row_class(item), _candidate_cells(item, result, has_change=bool(changes)))
        for item in sorted(result.candidates, key=lambda item: _order(item, result))
    ]
    first, rest = table(head, rows[:SHOWN_ROWS], label="Candidates", class_="as-cards"), rows[SHOWN_ROWS:]
    if not rest:
        return first
    return join(first, fold(counted(rest, "more candidate"), table(head, rest, label="More candidates", class_="as-cards")))


def _order(item: Candidate, result: OptimizeResult) -> tuple[bool, bool, int, float]:
    """The chosen one, the baseline, those that meet the budget, that miss it, that failed; the faster first."""
    time = item.latency.p50_ms if item.latency else math.inf
    order = list(STATUS_WORDS).index(item.verdict.status)
    return item.name != result.chosen.name, item.name != result.baseline.name, order, time


def _row_class(item: Candidate) -> str:
    return item.verdict.status if item.verdict.status in ("chosen", "failed") else ""


def _candidate_cells(item: Candidate, result: OptimizeResult, *, has_change: bool) -> list[Cell]:
    shape, kind = look(item, result)
    words = STATUS_WORDS[item.verdict.status]
    reason = item.verdict.reason.removeprefix(words).lstrip("; ")
    name = element("span", icon(shape, kind), item.name, class_="with-icon")
    return [
        (name, None),
        (
            element("span", element("b", words), element("small", typeset(reason)) if reason else None),
            f"verdict {item.verdict.status}",
        ),
        *_quality_cells(item.evaluation)[: 2 if has_change else 1],
        *_latency_cells(item.latency),
        (size(item.artifact.size_bytes) if item.artifact else NONE, "number"),
    ]


def _quality_cells(report: EvalReport | None) -> list[Cell]:
    if report is None:
        return [(NONE, "number"), (NONE, "number")]
    if is_absolute(report):
        ends = interval_words(report).removeprefix(f"95{NBSP}% interval ")
        value = element("span", quality(report.metric, report.value), element("small", ends) if ends else None)
        return [(value, "number"), (NONE, "number")]
    interval = change_interval(report)
    range_ = None
    if interval is not None and interval[0] < interval[1]:
        low, high = (difference(report.metric, value, is_bare=True) for value in interval)
        range_ = element("small", f"{low} to {high}")
    shown = element("span", difference(report.metric, change(report), is_bare=True), range_)
    return [(quality(report.metric, report.value), "number"), (shown, "number")]


def _latency_cells(report: LatencyReport | None) -> list[Cell]:
    if report is None:
        return [(NONE, "number")] * 2
    tail = [element("small", f"p90 {significant(report.p90_ms)}"), element("small", f"p99 {significant(report.p99_ms)}")]
    latency: Cell = (element("span", significant(report.p50_ms), *tail), "number")
    if report.ratio is None:
        return [latency, (NONE, "number")]
    range_ = None
    if report.ratio_low is not None and report.ratio_high is not None:
        range_ = element("small", f"{report.ratio_low:.3f} to {report.ratio_high:.3f}")
    shown = f"{report.ratio:.2f}{TIMES}" + (" (tie)" if is_tie(report) else "")
    return [latency, (element("span", shown, range_), "number")]


def budget_table(result: OptimizeResult) -> Markup:
    """Each term of the budget against the chosen candidate."""
    source = "the default, since none was given" if result.request.is_default_budget else "as asked for"
    intro = element("p", "Budget (", source, "): ", element("code", result.request.budget), class_="quiet")
    checks = result.chosen.verdict.checks
    if not checks:
        return intro
    width = 4 if any(check.note for check in checks) else 3
    head: list[Cell] = [("limit", None), ("measured", "number"), ("result", None), ("note", "why")]
    rows = [("", _check_cells(check)[:width]) for check in checks]
    return element("div", intro, table(head[:width], rows, label="Budget"), class_="budget")


def _check_cells(check: BudgetCheck) -> list[Cell]:
    sign = "\u2264" if check.operator == "<=" else "\u2265"
    value = NONE if check.value is None else plain(check.value)
    result = "\u2717 missed" if not check.is_met else "\u2713 met" if check.value is not None else "? not measured"
    return [(f"{check.name} {sign} {check.limit:g}", None), (value, "number"), (result, None), (check.note, "why")]
