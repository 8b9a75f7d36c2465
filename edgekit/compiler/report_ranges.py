"""The section about ranges: chosen within seen ranges of activations, the worst drawn, all of them in the folded table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekit.compiler.findings import TensorRange
from edgekit.compiler.markup import Markup, element, join
from edgekit.compiler.plot_layers import Range, range_bars
from edgekit.compiler.report_figures import SHOWN, bar_key, figure, key, short_tick
from edgekit.compiler.report_table import Cell, Row, fold, names
from edgekit.compiler.report_words import about, counted, decibels, interval, percent, unknown_last
from edgekit.compiler.result import OptimizeResult


def ranges(result: OptimizeResult) -> Markup | None:
    """Chosen against seen ranges of activations, worst SQNR first."""
    found = sorted(result.findings.ranges, key=lambda item: unknown_last(item.sqnr_db))
    if not found:
        return None
    rows = [_range(item) for item in found if _is_range(item)][:SHOWN]
    cut = sum(item.clipped > 0 for item in found)
    caption = (
        f"The pale bar is what calibration saw, from its least to its largest value; the dark one is what 8 bits were given. "
        f"{cut} of {len(found)} ranges clip values. At the right how the range was found, and the SQNR of this tensor alone."
    )
    if len(found) > len(rows):
        caption += f" Drawn are the {len(rows)} worst."
    label = f"Chosen within seen ranges of the {len(rows)} worst of {len(found)} activations; the table below has all."

    def draw(_name: str, width: int) -> Markup:
        title = "place in the seen range, %"
        return range_bars(rows, title=title, format_tick=_percent_tick, width=width, label=label)

    entries = [bar_key("range seen-key", "seen"), bar_key("range", "chosen"), key("zero-key", "the value 0")]
    picture = figure(draw, caption + about(result), element("ul", *entries, class_="legend")) if rows else None
    return join(picture, fold(f"As a table: {counted(found, 'range')}", _range_table(found)))


def _is_range(item: TensorRange) -> bool:
    ends = (item.seen_low, item.seen_high, item.low, item.high)
    return all(math.isfinite(value) for value in ends) and item.seen_high > item.seen_low


def _range(item: TensorRange) -> Range:
    width = item.seen_high - item.seen_low
    low, high, zero = ((value - item.seen_low) / width for value in (item.low, item.high, 0.0))
    seen, chosen = interval(item.seen_low, item.seen_high), interval(item.low, item.high)
    return Range(
        name=item.tensor, kind="clips" if item.clipped > 0 else "whole", low=low, high=high, zero=zero,
        note=f"{item.method}, {decibels(item.sqnr_db)}", extra=f", clips {percent(item.clipped)}" if item.clipped > 0 else "",
        title=f"{item.tensor}: seen {seen}, chosen {chosen} by {item.method}, {percent(item.clipped)} clipped",
    )  # fmt: skip


def _range_table(found: Sequence[TensorRange]) -> Markup:
    head: list[Cell] = [
        ("activation", None), ("seen", "number"), ("chosen", "number"), ("by", "number"), ("SQNR", "number"),
        ("clipped", "number"),
    ]  # fmt: skip
    rows: list[Row] = []
    for item in found:
        seen, chosen = interval(item.seen_low, item.seen_high), interval(item.low, item.high)
        texts = [seen, chosen, item.method, decibels(item.sqnr_db), percent(item.clipped)]
        rows.append(("", [(item.tensor, None), *((text, "number") for text in texts)]))
    return names(head, rows, "Ranges of activations")


def _percent_tick(value: float, step: float) -> str:
    return short_tick(100 * value, 100 * step)
