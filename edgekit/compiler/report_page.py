"""The page of a report: one self-contained HTML text, the answer first.

No script, no request: the style sheet is inside and allowed by its hash, pictures are inline SVG. All text from outside goes
through ``markup``, which escapes it.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from edgekit.compiler.markup import Child, Markup, element, join
from edgekit.compiler.report_audit import audits
from edgekit.compiler.report_classes import class_table, classes
from edgekit.compiler.report_details import data_sets, lineage, machine, notes
from edgekit.compiler.report_figures import icon, is_on_target, latency, look, trade_off
from edgekit.compiler.report_ladder import ladder, remarks
from edgekit.compiler.report_layers import costs, sensitivity
from edgekit.compiler.report_operators import savings
from edgekit.compiler.report_ranges import ranges
from edgekit.compiler.report_saturation import saturation
from edgekit.compiler.report_table import budget_table, candidate_table
from edgekit.compiler.report_words import (
    change,
    difference,
    headline,
    interval_words,
    is_absolute,
    metric_title,
    milliseconds,
    quality,
    size,
    smaller,
    speed,
    speed_interval,
    typeset,
)
from edgekit.compiler.result import OptimizeResult


def render_page(result: OptimizeResult) -> str:
    """The whole page."""
    style = files("edgekit.compiler").joinpath("report.css").read_text("utf-8")
    title = f"{result.chosen.name} for {result.target.name} \u00b7 edgekit optimize"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy(style)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element("body", element("main", *_sections(result)), _footer(result))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def policy(style: str) -> str:
    """Allows this style sheet and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


Content = tuple[str, str, tuple[Child, ...]]
"""Anchor, title and parts of a section."""


def _sections(result: OptimizeResult) -> list[Markup]:
    """The answer, links, and the sections that have something to show."""
    shown = [(anchor, title, parts) for anchor, title, parts in _contents(result) if any(parts)]
    links = [element("li", element("a", title, href=f"#{anchor}")) for anchor, title, _ in shown]
    contents = element("nav", element("ul", *links), class_="contents", aria_label="Contents")
    return [_opening(result), contents, *(section(anchor, title, *parts) for anchor, title, parts in shown)]


def _contents(result: OptimizeResult) -> list[Content]:
    quality = "Accuracy" if result.request.metric in {"top1", "balanced_accuracy"} else "Quality"
    return [
        ("accuracy-latency", f"{quality} against latency", (trade_off(result, "latency_ms"),)),
        ("accuracy-size", f"{quality} against size", (trade_off(result, "size_mb"),)),
        ("latency", "Latency", (latency(result),)),
        ("candidates", "Candidates", (candidate_table(result),)),
        ("classes", "By class", (classes(result), class_table(result))),
        ("savings", "Where the time was saved", (savings(result),)),
        ("sensitivity", "Where int8 hurts", (sensitivity(result),)),
        ("layer-costs", "What each layer costs", (costs(result),)),
        ("ranges", "Ranges", (ranges(result),)),
        ("saturation", "Saturation on x86 without dot-product instructions", (saturation(result),)),
        ("audit", "What the runtime really runs", (audits(result),)),
        ("ladder", "The ladder", (ladder(result),)),
        ("search-remarks", "What the search left out", (remarks(result),)),
        ("lineage", f"How {result.chosen.name} was made", (lineage(result),)),
        ("data", "Data", (data_sets(result),)),
        ("machine", "Machine", (machine(result),)),
        ("notes", "What to know about these figures", (notes(result),)),
    ]


def section(anchor: str, title: str, *parts: Child) -> Markup:
    """A section with its heading, at ``#anchor``."""
    heading = element("h2", title, id=f"{anchor}-title")
    return element("section", heading, *(part for part in parts if part), id=anchor, aria_labelledby=f"{anchor}-title")


def _opening(result: OptimizeResult) -> Markup:
    """The answer, the key figures, the budget."""
    is_met = result.is_budget_met
    badge = element(
        "p", "\u2713 Budget met" if is_met else "\u2717 Budget not met", class_=f"badge {'met' if is_met else 'unmet'}"
    )
    place = None
    if result.chosen.latency is not None and not is_on_target(result):
        place = element(
            "p",
            f"\u26a0 The latencies are this host's, not those of {result.target.name}: time it there before you rely on them.",
            class_="callout",
        )
    context = f"{result.request.model} for {result.target.title or result.target.name}"
    return element(
        "header", element("p", context, class_="context"), element("h1", headline(result)), badge,
        element("p", _lede(result.verdict), class_="lede"), place, _key_figures(result), budget_table(result),
    )  # fmt: skip


def _lede(verdict: str) -> str:
    """The gate's sentence; the badge beside it says already whether the budget is met."""
    return typeset(verdict.removeprefix("Budget met: ").removeprefix("Budget not met: "))


def _key_figures(result: OptimizeResult) -> Markup:
    chosen, baseline = result.chosen, result.baseline
    cards = []
    if chosen.evaluation is not None:
        report = chosen.evaluation
        before = f"{baseline.name}: {quality(report.metric, report.baseline)}"
        against = (
            f"of its answers against {baseline.name}" if is_absolute(report) else difference(report.metric, change(report))
        )
        words = "the baseline" if chosen.name == baseline.name else against
        cards.append(
            _card(metric_title(report.metric), quality(report.metric, report.value), words, interval_words(report), before)
        )
    if chosen.latency is not None:
        before = f"{baseline.name}: {milliseconds(baseline.latency.p50_ms)}" if baseline.latency else ""
        words, interval = speed(chosen.latency), speed_interval(chosen.latency)
        cards.append(_card("latency, median", milliseconds(chosen.latency.p50_ms), words, interval, before))
    if chosen.artifact is not None:
        before = f"{baseline.name}: {size(baseline.artifact.size_bytes)}" if baseline.artifact else ""
        words = "the baseline" if chosen.name == baseline.name else smaller(chosen, baseline)
        cards.append(_card("size of the file", size(chosen.artifact.size_bytes), words, before))
    return element("div", *cards, class_="cards")


def _card(title: str, value: str, words: str, *more: str) -> Markup:
    return element(
        "div", element("p", title, class_="card-title"), element("p", value, class_="card-value"),
        element("p", words), *(element("p", line, class_="quiet") for line in more if line), class_="card",
    )  # fmt: skip


def _footer(result: OptimizeResult) -> Markup:
    request, chosen = result.request, result.chosen
    shape, kind = look(chosen, result)
    made = f"edgekit {chosen.edgekit_version}, {chosen.created_at:%Y-%m-%d %H:%M} UTC"
    took = f"{len(result.candidates)} candidates in {result.seconds:.1f} s"
    how = f"effort {request.effort}, seed {request.seed}, {request.threads} thread{'s' if request.threads != 1 else ''}"
    return element(
        "footer", element("p", icon(shape, kind), join(f" {made}; {took}; {how}. The same facts for programs: report.json."))
    )
