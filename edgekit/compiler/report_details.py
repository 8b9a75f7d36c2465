"""The end of a report: lineage, data, machine, and what to know before relying on the figures."""

from __future__ import annotations

import json

from edgekit.compiler.markup import Markup, element
from edgekit.compiler.report_figures import is_on_target
from edgekit.compiler.report_table import Cell, Row, fold, table
from edgekit.compiler.report_words import NBSP, NONE, milliseconds, significant, size, typeset
from edgekit.compiler.result import DataDescription, OptimizeResult
from edgekit.schema.base import Scalar
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import short

LONG = 90
"""Characters of a setting before its fold."""


def digest(value: str) -> Markup:
    """The start of a digest; the whole one on pointing at it and in ``report.json``."""
    return element("code", short(value), title=value, class_="digest")


def lineage(result: OptimizeResult) -> Markup:
    """From the source to the file, pass by pass."""
    source = result.chosen.source
    first = element(
        "li",
        element("h3", "source"),
        element("p", source.spec, f" ({source.kind}, {size(source.size_bytes)}) ", digest(source.digest)),
    )
    return element("ol", first, *(_step(step) for step in result.chosen.lineage), class_="lineage")


def _step(step: PassStep) -> Markup:
    took = element("span", f"{significant(step.seconds, 2)}{NBSP}s", class_="quiet")
    settings = [_setting(name, value) for name, value in step.settings.items()]
    versions = ", ".join(f"{name} {version}" for name, version in step.versions.items())
    return element(
        "li",
        element("h3", step.name, " ", took),
        element("ul", *settings, class_="settings") if settings else None,
        element("p", "gives ", digest(step.output), f", made with {versions}" if versions else None, class_="quiet"),
        *(element("p", typeset(note)) for note in step.notes),
    )


def _setting(name: str, value: Scalar) -> Markup:
    words = _value(value)
    if len(words) <= LONG:
        return element("li", element("code", f"{name} = {words}"))
    return element("li", fold(f"{name}: {_extent(words)}", element("code", words)))


def _extent(words: str) -> str:
    """How long a folded setting is: its entries where it is a list or a mapping."""
    try:
        found = json.loads(words)
    except ValueError:
        return f"{len(words):,} characters"
    return f"{len(found):,} entries" if isinstance(found, list | dict) else f"{len(words):,} characters"


def _value(value: Scalar) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def data_sets(result: OptimizeResult) -> Markup:
    """Where the data came from, how much, and whether classes are balanced."""
    head: list[Cell] = [
        ("role", None),
        ("samples", "number"),
        ("digest", "fact"),
        ("source", "fact whole"),
        ("classes", "fact whole"),
    ]
    rows = [
        (
            "",
            [
                (item.role, None),
                (f"{item.samples:,}", "number"),
                (digest(item.digest), "fact"),
                (item.source, "fact whole"),
                (_balance(item), "fact whole"),
            ],
        )
        for item in result.data
    ]
    return table(head, rows, label="Data sets", class_="as-cards")


def _balance(item: DataDescription) -> str:
    if not item.has_labels:
        return "no labels"
    counts = item.class_counts
    if not counts or not min(counts.values()):
        return f"labelled, {len(item.class_names)} classes" if item.class_names else "labelled"
    low, high = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    span = f"{counts[low]:,} ({low}) to {counts[high]:,} ({high}) samples each"
    return f"{len(counts)} classes, {'balanced' if counts[high] <= 1.5 * counts[low] else 'not balanced'}: {span}"


def machine(result: OptimizeResult) -> Markup:
    """The host and the target side by side."""
    host, target = result.host, result.target
    rows: list[tuple[str, str, str]] = [
        ("processor", host.cpu, target.cpu),
        ("architecture", host.arch, target.arch),
        ("instructions", " ".join(host.isa) or NONE, " ".join(target.isa) or NONE),
        ("cores", str(host.cores), str(target.cores)),
        ("memory", size(host.ram_mb * 1e6), size(target.ram_mb * 1e6)),
        ("runtime", f"{host.runtime} {host.runtime_version}", target.runtime),
        ("system", f"{host.os}, Python {host.python}", NONE),
        ("frequency governor", host.governor or "unknown", NONE),
    ]
    head: list[Cell] = [("", None), ("measured on", None), (f"target {target.name}", None)]
    cells: list[Row] = [("", [(name, None), (here, None), (there, None)]) for name, here, there in rows]
    return table(head, cells, label="Machine", class_="facts")


def notes(result: OptimizeResult) -> Markup:
    """What a careful reader asks: measured where, on which instructions, how surely; then the run's own warnings."""
    items = [*result.warnings, _place(result)]
    report, timing = result.chosen.evaluation, result.chosen.latency
    if report is not None:
        isa = " ".join(report.isa) or "unknown instructions"
        items.append(
            f"Quality was evaluated on {report.samples:,} samples with {isa}; int8 answers differ between instruction sets."
        )
        if report.drop_low is None:
            items.append(f"{report.metric} is not a mean over samples: its change has no interval here.")
        if report.extra:
            shown = ", ".join(f"{name} {significant(value, 4)}" for name, value in sorted(report.extra.items()))
            items.append(f"More about {result.chosen.name}: {shown}.")
    if timing is not None:
        share = f"{timing.noise * 100:.1f}{NBSP}%"
        items.append(
            f"Latency is of single samples: {timing.runs:,} runs after {timing.warmup_runs} to warm up, "
            f"{timing.threads} thread{'s' if timing.threads != 1 else ''}, mean {milliseconds(timing.mean_ms)}, "
            f"noise floor {share}."
        )
        if timing.peak_rss_mb is not None:
            items.append(f"Peak memory of the process: {size(timing.peak_rss_mb * 1e6)}.")
    failed = [item.name for item in result.candidates if item.verdict.status == "failed"]
    if failed:
        items.append(f"{len(failed)} of {len(result.candidates)} candidates could not be made or run; the table says why.")
    return element("ul", *(element("li", typeset(item)) for item in items), class_="notes")


def _place(result: OptimizeResult) -> str:
    if not any(item.latency for item in result.candidates):
        return "No latency was measured."
    if is_on_target(result):
        return f"Latency was measured on hardware that matches the target {result.target.name}."
    return f"Latency was measured on this host, which is not {result.target.name}; order and ratios may differ there."
