"""What the search learned, for the report: where int8 hurts, the ladder, ranges, saturation, what the runtime really runs."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.compiler.findings import LayerSensitivity, RuntimeAudit
from edgekit.compiler.markup import Markup, element, join
from edgekit.compiler.report_table import Cell, table
from edgekit.compiler.report_words import NBSP, NONE, significant
from edgekit.compiler.result import OptimizeResult

SHOWN = 20
BAR_PX, BAR_HEIGHT = 96, 10
QUIET_DB = 60.0
"""A layer above this does nothing that one would see; bars are full there."""
Row = tuple[str, list[Cell]]


def layers(result: OptimizeResult) -> Markup | None:
    """Sensitivity and time of each layer, most sensitive first; the rest behind a fold."""
    found = result.findings.layers
    if not found:
        return None
    head: list[Cell] = [
        ("layer", None), ("SQNR when only it is int8", "number"), ("", None), ("weights", "number"), ("activations", "number"),
        ("fp32 ms", "number"), ("int8 ms", "number"), ("in the mix", None),
    ]  # fmt: skip
    words = "Low means that int8 there costs accuracy. Times are of the layer inside the model on this host, conversions apart."
    return join(_folded(head, [_layer(item) for item in found], "Sensitivity and time by layer"), _quiet(words))


def _layer(item: LayerSensitivity) -> Row:
    cells: list[Cell] = [
        (f"{item.layer} ({item.op_type})", None),
        (f"{item.enable_one_db:.1f}{NBSP}dB", "number"),
        (_bar(min(1.0, max(0.0, item.enable_one_db / QUIET_DB)), f"{item.enable_one_db:.1f} dB"), None),
        (_decibels(item.weights_only_db), "number"),
        (_decibels(item.activations_only_db), "number"),
        (_ms(item.float_ms), "number"),
        (_ms(item.int8_ms), "number"),
        ("int8" if item.is_int8 else "fp32", None),
    ]
    return "", cells


def ladder(result: OptimizeResult) -> Markup | None:
    """What each refinement brought, kept or not."""
    steps = result.findings.ladder
    if not steps:
        return None
    head: list[Cell] = [
        ("step", None),
        ("before", "number"),
        ("after", "number"),
        ("kept", None),
        ("why", "why"),
        ("s", "number"),
    ]
    rows: list[Row] = [
        (
            "",
            [
                (step.name, None),
                (_decibels(step.before_db), "number"),
                (_decibels(step.score_db), "number"),
                ("\u2713 kept" if step.is_kept else "\u2717 not kept", None),
                (step.reason, "why"),
                (significant(step.seconds, 2), "number"),
            ],
        )
        for step in steps
    ]
    words = "SQNR at the output on calibration samples that the step was not made from; a step must gain 0.05 dB to stay."
    return join(table(head, rows, label="The ladder, step by step"), _quiet(words))


def ranges(result: OptimizeResult) -> Markup | None:
    """Chosen against seen ranges of activations, worst first."""
    found = result.findings.ranges
    if not found:
        return None
    head: list[Cell] = [
        ("activation", None), ("seen", "number"), ("chosen", "number"), ("by", None), ("SQNR", "number"), ("clipped", "number"),
    ]  # fmt: skip
    rows: list[Row] = [
        (
            "",
            [
                (item.tensor, None),
                (f"{significant(item.seen_low)} \u2026 {significant(item.seen_high)}", "number"),
                (f"{significant(item.low)} \u2026 {significant(item.high)}", "number"),
                (item.method, None),
                (_decibels(item.sqnr_db), "number"),
                (f"{item.clipped:.2%}".replace("%", f"{NBSP}%"), "number"),
            ],
        )
        for item in found
    ]
    return _folded(head, rows, "Ranges of activations")


def saturation(result: OptimizeResult) -> Markup | None:
    """Overflows without a dot-product instruction, by layer."""
    found = result.findings.saturation
    if not found:
        return None
    bad = [item for item in found if item.overflowing]
    if not bad:
        return _quiet(f"No pair of products leaves int16 on calibration data in any of {len(found)} layers.")
    head: list[Cell] = [
        ("layer", None),
        ("pairs that overflow", "number"),
        ("share", "number"),
        ("largest", "number"),
        ("cure", None),
    ]
    rows: list[Row] = [
        (
            "",
            [
                (f"{item.layer} ({item.op_type})", None),
                (f"{item.overflowing:,} of {item.pairs:,}", "number"),
                (f"{1e6 * item.overflowing / max(1, item.pairs):.1f} ppm", "number"),
                (f"{item.worst:,}", "number"),
                ("7-bit weights" if item.cure == "7-bit" else item.cure, None),
            ],
        )
        for item in sorted(bad, key=lambda item: -item.overflowing / max(1, item.pairs))
    ]
    words = (
        "On x86-64 without VNNI two products are summed in 16 bits: 32,767 fits, what is larger is cut off and costs accuracy."
    )
    return join(_folded(head, rows, "Saturation by layer"), _quiet(words))


def audits(result: OptimizeResult) -> Markup | None:
    """Operators of the runtime's own graph by precision, and what was found in it."""
    parts = [_audit(name, audit) for name, audit in result.findings.audits.items()]
    return join(*parts) if parts else None


def _audit(name: str, audit: RuntimeAudit) -> Markup:
    spent: dict[tuple[str, str], list[float]] = {}
    for kernel in audit.kernels:
        spent.setdefault((kernel.op_type, kernel.precision), []).append(kernel.ms or 0.0)
    total = max(audit.total_ms or 0.0, 1e-9)
    head: list[Cell] = [
        ("operator", None),
        ("precision", None),
        ("nodes", "number"),
        ("ms", "number"),
        ("share", "number"),
        ("", None),
    ]
    rows: list[Row] = [
        (
            "",
            [
                (kind, None),
                (precision, None),
                (str(len(values)), "number"),
                (significant(sum(values)), "number"),
                (f"{sum(values) / total * 100:.0f}{NBSP}%", "number"),
                (_bar(sum(values) / total, f"{sum(values) / total:.0%}"), None),
            ],
        )
        for (kind, precision), values in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]
    items = [element("li", f"{finding.text}. {finding.repair}".strip()) for finding in audit.findings]
    found = element("ul", *items) if items else _quiet("Nothing found: every quantized layer runs in integers.")
    return join(element("h3", name), _folded(head, rows, f"What runs of {name}"), found)


def _folded(head: list[Cell], rows: Sequence[Row], label: str) -> Markup:
    """The first rows, and the others behind a fold."""
    first = table(head, rows[:SHOWN], label=label)
    if len(rows) <= SHOWN:
        return first
    rest = table(head, rows[SHOWN:], label=f"{label}, the rest")
    return join(first, element("details", element("summary", f"{len(rows) - SHOWN} more"), rest))


def _bar(share: float, words: str) -> Markup:
    width = max(1.0, BAR_PX * share)
    inner = element("rect", x=0, y=0, width=width, height=BAR_HEIGHT, fill="currentColor", opacity="0.55")
    box = f"0 0 {BAR_PX} {BAR_HEIGHT}"
    return element(
        "svg", inner, width=BAR_PX, height=BAR_HEIGHT, viewBox=box, role="img", aria_label=words
    )  # fmt: skip


def _decibels(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}{NBSP}dB"


def _ms(value: float | None) -> str:
    return NONE if value is None else significant(value)


def _quiet(words: str) -> Markup:
    return element("p", words, class_="quiet")
