"""Waterfalls: from one total to another in milliseconds, step by step, the largest savings first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.compiler.markup import Markup, element
from edgekit.compiler.plot_layers import Fall, waterfall
from edgekit.compiler.report_figures import bar_key, figure, short_tick
from edgekit.compiler.report_words import MINUS, NBSP, milliseconds, signed


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a layer or a kind of operator changes; ``words`` stand beside it where there is room, ``title`` on pointing."""

    name: str
    change_ms: float
    words: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Total:
    """Where a waterfall begins or ends."""

    name: str
    ms: float
    title: str


def falls(first: Total, steps: Sequence[Step], last: Total, *, most: int, least_ms: float = 0.0) -> list[Fall]:
    """The rows: the first total, the ``most`` steps that change most, all others as one, the last total.

    Args:
        first: its time plus all changes is the last one's.
        steps: in any order; those that change nothing are left out.
        last: the other end.
        most: steps drawn, savings first.
        least_ms: what changes less is among the others.
    """
    order = sorted((step for step in steps if step.change_ms), key=lambda step: -abs(step.change_ms))
    drawn = [step for step in order[:most] if abs(step.change_ms) >= least_ms]
    rest = order[len(drawn) :]
    if len(rest) == 1:
        drawn, rest = [*drawn, *rest], []
    rows = [_total(first)]
    at = first.ms
    for step in [*sorted(drawn, key=lambda step: step.change_ms), *_together(rest)]:
        kind = "saves" if step.change_ms < 0 else "costs"
        note = f"{signed(step.change_ms)}{NBSP}ms"
        extra = f" ({step.words})" if step.words else ""
        title = f"{step.title}: {note}"
        rows.append(Fall(name=step.name, kind=kind, note=note, extra=extra, title=title, start=at, end=at + step.change_ms))
        at += step.change_ms
    return [*rows, _total(last)]


def _together(rest: Sequence[Step]) -> list[Step]:
    change = sum(step.change_ms for step in rest)
    return [Step(name=f"all others ({len(rest)})", change_ms=change, words="", title=f"{len(rest)} others")] if rest else []


def _total(total: Total) -> Fall:
    return Fall(name=total.name, kind="total", note=milliseconds(total.ms), title=total.title, start=0.0, end=total.ms)


def waterfall_figure(rows: Sequence[Fall], caption: str, *, title: str, label: str) -> Markup:
    """The picture with its key and its sentence.

    Args:
        rows: of :func:`falls`.
        caption: what it is of.
        title: of the axis.
        label: the picture in words.
    """

    def draw(_name: str, width: int) -> Markup:
        return waterfall(rows, title=title, format_tick=short_tick, width=width, label=label)

    keys = {"total": "total", "saves": f"saves time ({MINUS})", "costs": "costs time (+)"}
    kinds = {row.kind for row in rows}
    legend = element("ul", *(bar_key(f"fall {kind}", words) for kind, words in keys.items() if kind in kinds), class_="legend")
    return figure(draw, caption, legend)
