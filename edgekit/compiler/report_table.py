"""The tables of a report: the budget's terms and all candidates. Wide ones scroll inside their own box."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.compiler.markup import Child, Markup, element
from edgekit.compiler.report_figures import STATUS_WORDS, icon, look
from edgekit.compiler.report_words import (
    NONE,
    TIMES,
    change,
    change_interval,
    difference,
    is_tie,
    metric_title,
    plain,
    quality,
    significant,
    size,
)
from edgekit.compiler.result import OptimizeResult
from edgekit.schema.candidate import BudgetCheck, Candidate
from edgekit.schema.measurement import EvalReport, LatencyReport

Cell = tuple[Child, str | None]


def table(head: Sequence[Cell], rows: Sequence[tuple[str, Sequence[Cell]]], *, label: str) -> Markup:
    """A table in its own scrolling box; the first cell of a row is its heading. Cells are (content, class)."""
    top = element("tr", *(element("th", content, class_=class_, scope="col") for content, class_ in head))
    body = [
        element(
            "tr",
            *(
                element("th", content, class_=kind, scope="row") if index == 0 else element("td", content, class_=kind)
                for index, (content, kind) in enumerate(cells)
            ),
            class_=class_ or None,
        )
        for class_, cells in rows
    ]
    inner = element("table", element("thead", top), element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def candidate_table(result: OptimizeResult) -> Markup:
    """Every candidate with what it measured, its verdict and the reason."""
    figures = (metric_title(result.request.metric), "change", "median, ms", f"against {result.baseline.name}", "size")
    head: list[Cell] = [("candidate", None), ("verdict", None), *((title, "number") for title in figures)]
    rows = [(_row_class(item), _candidate_cells(item, result)) for item in result.candidates]
    return table(head, rows, label="All candidates")


def _row_class(item: Candidate) -> str:
    return item.verdict.status if item.verdict.status in ("chosen", "failed") else ""


def _candidate_cells(item: Candidate, result: OptimizeResult) -> list[Cell]:
    shape, kind = look(item, result)
    words = STATUS_WORDS[item.verdict.status]
    reason = item.verdict.reason.removeprefix(words).lstrip("; ")
    name = element("span", icon(shape, kind), item.name, class_="with-icon")
    return [
        (name, None),
        (element("span", element("b", words), element("small", reason)), f"verdict {item.verdict.status}"),
        *_quality_cells(item.evaluation),
        *_latency_cells(item.latency),
        (size(item.artifact.size_bytes) if item.artifact else NONE, "number"),
    ]


def _quality_cells(report: EvalReport | None) -> list[Cell]:
    if report is None:
        return [(NONE, "number"), (NONE, "number")]
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
