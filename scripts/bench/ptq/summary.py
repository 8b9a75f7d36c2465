"""Tables and figures over all models, for the terminal and for summary.md.

The figure that counts: edgekit's latency over that of the best alternative. The best alternative of a model is the fastest of
the peers' models that stay in the budget and of fp32 itself. Where edgekit's own model misses the budget, fp32 stands in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from measure import BASELINE, ModelReport, Row
from peers import TOOLS

from edgekit.cli.console import table
from edgekit.schema.base import Record

OWN = ("edgekit-fast", "edgekit")
HEADERS = ("tool", "quality", "drop", "SQNR dB", "in budget", "kB", "ratio, 1 thread", "2 threads", "s", "CPU s", "MB")


class Comparison(Record, frozen=True, kw_only=True):
    """One of edgekit's tools on one model against the best alternative; ``ratio`` below 1 is edgekit's win."""

    model: str
    tool: str
    best: str
    ratio: float
    is_in_budget: bool
    is_slower_than_fp32: bool


class Summary(Record, frozen=True, kw_only=True):
    """Everything of one benchmark run."""

    models: tuple[ModelReport, ...]
    comparisons: tuple[Comparison, ...]
    geometric_means: dict[str, float]
    seconds_over_nncf: dict[str, float]
    """Seconds of edgekit-fast over those of nncf, by model."""


def summarize(models: Sequence[ModelReport]) -> Summary:
    """Compare edgekit with the best alternative on every model."""
    comparisons = [item for report in models for tool in OWN if (item := compare_with_best(report, tool))]
    ratios = {tool: [item.ratio for item in comparisons if item.tool == tool] for tool in OWN}
    seconds = {}
    for report in models:
        own, peer = report.row("edgekit-fast"), report.row("nncf")
        if own and peer and not own.failure and not peer.failure:
            seconds[report.model] = own.seconds / peer.seconds
    return Summary(
        models=tuple(models),
        comparisons=tuple(comparisons),
        geometric_means={tool: geometric_mean(values) for tool, values in ratios.items() if values},
        seconds_over_nncf=seconds,
    )


def compare_with_best(report: ModelReport, tool: str, threads: int = 1) -> Comparison | None:
    """One of edgekit's tools against the fastest alternative in the budget; None where it was not run."""
    own = report.row(tool)
    if own is None:
        return None
    others = [row for row in report.rows if row.is_usable and (row.tool == BASELINE or TOOLS[row.tool].family != "edgekit")]
    best = min(others, key=lambda row: row.ratio(threads))
    own_ratio = own.ratio(threads) if own.is_usable else 1.0
    slower = any(item.threads == threads and item.verdict == "slower" for item in own.timings)
    return Comparison(
        model=report.model,
        tool=tool,
        best=best.tool,
        ratio=own_ratio / best.ratio(threads),
        is_in_budget=own.is_usable,
        is_slower_than_fp32=slower,
    )


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


# --- text -------------------------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """A row of the table; a failure has its cost and no figures."""
    cost = [f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}", f"{row.peak_rss_mb:.0f}"] if row.seconds else ["-"] * 3
    if row.quality is None:
        return [row.tool, *["-"] * 7, *cost]
    quality = row.quality
    first, *others = row.timings
    ratios = [f"{first.ratio:.3f} ({first.ratio_low:.3f} to {first.ratio_high:.3f})"]
    ratios += [f"{item.ratio:.3f}" for item in others] or ["-"]
    answer = "yes" if quality.is_in_budget else "no"
    facts = [f"{quality.value:.4f}", f"{quality.drop:+.4f}", f"{quality.sqnr_db:.1f}", answer, f"{row.size_bytes / 1000:.1f}"]
    return [row.tool, *facts, *ratios, *cost]


def failures(report: ModelReport) -> list[str]:
    """A line for each tool that made no model that runs."""
    return [f"{row.tool}: {row.failure}" for row in report.rows if row.failure]


def title(report: ModelReport) -> str:
    """What the table below is of."""
    timed = report.rows[0].timings
    fp32 = ", ".join(f"{item.p50_ms:.3f} ms with {item.threads} thread{'s' * (item.threads > 1)}" for item in timed)
    noise = max((item.noise for item in timed), default=0.0)
    return f"{report.model}: {report.metric} on {report.samples} samples; fp32 {fp32}; noise {100 * noise:.1f} %"


def figures(summary: Summary) -> list[str]:
    """The figures over all models, a line each."""
    lines = []
    for item in summary.comparisons:
        note = "" if item.is_in_budget else "; its own model misses the budget or failed, counted as fp32"
        lines.append(
            f"{item.model}: {item.tool} takes {item.ratio:.3f} of the latency of the best alternative, {item.best}{note}"
        )
    for tool, mean in summary.geometric_means.items():
        count = sum(item.tool == tool for item in summary.comparisons)
        lines.append(f"geometric mean over {count} models: {tool} {mean:.3f}")
    for tool in summary.geometric_means:
        slow = [item.model for item in summary.comparisons if item.tool == tool and item.is_slower_than_fp32]
        lines.append(f"models where {tool} is slower than fp32 beyond noise: {', '.join(slow) or 'none'}")
    if summary.seconds_over_nncf:
        each = ", ".join(f"{model} {ratio:.2f}" for model, ratio in summary.seconds_over_nncf.items())
        mean = geometric_mean(list(summary.seconds_over_nncf.values()))
        lines.append(f"seconds of edgekit-fast over nncf: {mean:.2f} (geometric mean); {each}")
    return lines


def plain(summary: Summary) -> str:
    """The report for a terminal."""
    parts = []
    for report in summary.models:
        rows = [cells(row) for row in report.rows]
        parts += [title(report), table(HEADERS, rows, right=[1, 2, 3, 5, 7, 8, 9, 10]), *failures(report), ""]
    return "\n".join([*parts, *figures(summary)])


def markdown(summary: Summary) -> str:
    """The report as Markdown."""
    parts = ["# Post-training quantization: edgekit beside other tools", ""]
    for report in summary.models:
        parts += [f"## {report.model}", "", f"{title(report).partition(': ')[2]}.", ""]
        parts += ["| " + " | ".join(HEADERS) + " |", "| " + " | ".join(["---"] * len(HEADERS)) + " |"]
        parts += ["| " + " | ".join(cells(row)) + " |" for row in report.rows]
        parts += ["", *(f"- {line}" for line in failures(report)), ""]
    return "\n".join([*parts, "## Figures", "", *(f"- {line}" for line in figures(summary))]) + "\n"
