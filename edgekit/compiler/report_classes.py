"""Quality by class: the dumbbell plot, the table and the worst regressions in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekit.compiler.markup import Markup, element
from edgekit.compiler.plot_rows import Pair, after_mark, dumbbell
from edgekit.compiler.report_figures import figure, listing, tick
from edgekit.compiler.report_table import Cell, fold, names
from edgekit.compiler.report_words import NBSP, difference, quality
from edgekit.compiler.result import OptimizeResult

MAX_CLASSES = 24
"""More classes than this: only those that changed most are drawn."""


def classes(result: OptimizeResult) -> Markup | None:
    """Quality by class before and after; None where there are no classes or nothing to compare."""
    rows = class_changes(result)
    if not rows:
        return None
    drawn = sorted(rows, key=lambda row: abs(row[2] - row[1]), reverse=True)[:MAX_CLASSES]
    kept = [row for row in rows if row in drawn]
    pairs = []
    for name, before, after in kept:
        kind = "same" if abs(after - before) < 5e-5 else "worse" if after < before else "better"
        shown = difference("top1", after - before, is_bare=True)
        hint = f"{name}: {before * 100:.2f} % to {after * 100:.2f} %"
        pairs.append(Pair(name=name, before=before * 100, after=after * 100, kind=kind, note=shown, title=hint))
    samples = result.chosen.evaluation.samples / len(rows) if result.chosen.evaluation else 0
    weight = f" On average {samples:,.0f} samples a class: one answer is {100 / samples:.2f} points." if samples else ""
    rest = f" Drawn are the {len(drawn)} classes that changed most, of {len(rows)}." if len(rows) > len(drawn) else ""
    caption = f"{worst_classes(rows)}{weight} Worst change first; at the right the change in points.{rest}"
    legend = element(
        "ul",
        element("li", _key(element("circle", cx=10, cy=10, r=5, class_="before"), "same"), result.baseline.name),
        *(
            element("li", _key(after_mark(kind, 10.0, 10.0), kind), f"{result.chosen.name}, {kind}")
            for kind in ("worse", "better", "same")
        ),
        class_="legend",
    )
    title, label = "right answers in the class, %", f"Accuracy by class, {len(drawn)} classes; the table follows."

    def draw(_name: str, width: int) -> Markup:
        return dumbbell(pairs, title=title, format_tick=tick, width=width, label=label)

    return figure(draw, caption, legend)


def _key(mark: Markup, kind: str) -> Markup:
    return element(
        "svg",
        element("g", mark, class_=f"pair {kind}"),
        viewBox="0 0 20 20",
        width=16,
        height=16,
        class_="icon",
        aria_hidden="true",
    )


def class_changes(result: OptimizeResult) -> list[tuple[str, float, float]]:
    """Class, baseline's share and the chosen one's, worst change first."""
    before = result.baseline.evaluation.per_class if result.baseline.evaluation else {}
    after = result.chosen.evaluation.per_class if result.chosen.evaluation else {}
    if result.chosen.name == result.baseline.name:
        return []
    known = class_names(result)
    rows = [
        (known.get(key, f"class {key}" if key.isdigit() else key), before[key], after[key])
        for key in before
        if key in after and math.isfinite(before[key]) and math.isfinite(after[key])
    ]
    return sorted(rows, key=lambda row: row[2] - row[1])


def class_names(result: OptimizeResult) -> dict[str, str]:
    """Index, as text, to name, where names are known."""
    known = result.chosen.contract.labels or next((data.class_names for data in result.data if data.class_names), ())
    return {str(index): name for index, name in enumerate(known)}


def worst_classes(rows: Sequence[tuple[str, float, float]]) -> str:
    """The classes that lose most, in words."""
    worse = [row for row in rows if row[1] - row[2] > 5e-5][:3]
    if not worse:
        return "No class is worse than before."
    parts = [f"{name} ({before * 100:.1f} to {after * 100:.1f}{NBSP}%)" for name, before, after in worse]
    return f"Worst: {listing(parts)}."


def class_table(result: OptimizeResult) -> Markup | None:
    """The same figures as a table, folded away."""
    rows = class_changes(result)
    if not rows:
        return None
    head: list[Cell] = [
        ("class", None),
        (result.baseline.name, "number"),
        (result.chosen.name, "number"),
        ("change, points", "number"),
    ]
    cells: list[tuple[str, list[Cell]]] = [
        (
            "",
            [
                (name, None),
                (quality("top1", before), "number"),
                (quality("top1", after), "number"),
                (difference("top1", after - before, is_bare=True), "number"),
            ],
        )
        for name, before, after in rows
    ]
    return fold(f"As a table: {len(rows)} classes", names(head, cells, "Quality by class"))
