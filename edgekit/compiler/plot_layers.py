"""Plots with a row a layer, tensor or operator: sensitivity, waterfall, ranges and lengths. The same rules as in ``plot``.

Values that lie beyond an axis are cut at its end and end in an arrow; what is not finite is not given to these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.compiler.markup import Markup, element
from edgekit.compiler.plot import Scale, draw
from edgekit.compiler.plot_rows import Format, Frame, axis, frame_of

WIDE_PX = 900
"""From this width on a row's ``extra`` words stand behind its note."""
TOP = 22.0
AIR = 1.04
LEAST_PX = 1.5
"""Of a bar: what is not 0 can be seen."""
FURTHEST_RANGE = 1.0
"""Chosen ranges are drawn up to this many widths of the seen one beyond its ends."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every row has; ``extra`` is shown after the note where there is room, ``title`` on pointing at it."""

    name: str
    kind: str
    note: str
    title: str
    extra: str = ""


@dataclass(frozen=True, kw_only=True)
class Hurt(Row):
    """SQNR in dB with only this layer in int8; of its weights alone, its inputs alone, and of everything but it."""

    value: float
    weights: float | None = None
    activations: float | None = None
    others: float | None = None

    @property
    def marks(self) -> tuple[float, ...]:
        """Those that were measured."""
        return tuple(value for value in (self.weights, self.activations, self.others) if value is not None)


@dataclass(frozen=True, kw_only=True)
class Fall(Row):
    """A step of a waterfall from ``start`` to ``end``; ``kind`` is ``total``, ``saves``, ``costs`` or ``same``."""

    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Range(Row):
    """A chosen range as shares of the seen one, which is 0..1; ``zero`` is where the value 0 lies."""

    low: float
    high: float
    zero: float


@dataclass(frozen=True, kw_only=True)
class Length(Row):
    """A bar from 0."""

    value: float


def hurt_bars(rows: Sequence[Hurt], *, title: str, format_tick: Format, width: int, label: str) -> Markup:
    """A bar to the SQNR of the layer alone, and a mark for each of its parts; the axis follows the bars, not the marks."""
    frame = _rows(rows, width)
    scale = _scale(frame, *_hurt_ends(rows))
    parts = axis(frame, scale, title, format_tick)
    parts.append(_upright(scale(0.0), frame))
    for index, row in enumerate(rows):
        y = frame.middle(index)
        lanes = {"weights": (row.weights, -5.0), "activations": (row.activations, 5.0), "others": (row.others, 0.0)}
        signs = [_sign(name, value, y + shift, scale) for name, (value, shift) in lanes.items() if value is not None]
        bar = _bar((0.0, row.value), y, 5, scale, "length")
        parts.append(_group(row, "hurt", bar, *signs))
    return draw(width, frame.bottom + 44, label, [*parts, *_texts(frame, rows, width)])


def is_beyond(rows: Sequence[Hurt]) -> bool:
    """Whether :func:`hurt_bars` draws an arrow for a mark beyond its axis."""
    low, high = _with_air(*_hurt_ends(rows))
    return any(not low <= value <= high for row in rows for value in row.marks)


def _hurt_ends(rows: Sequence[Hurt]) -> tuple[float, float]:
    """All bars, and those marks that are not far beyond the longest bar."""
    longest = max([1.0, *(row.value for row in rows)])
    furthest = max((value for row in rows for value in row.marks), default=0.0)
    return min([0.0, *(row.value for row in rows)]), max(longest, min(furthest, 1.5 * longest))


def waterfall(rows: Sequence[Fall], *, title: str, format_tick: Format, width: int, label: str) -> Markup:
    """Bars that hang where the one before ended; savings point left, costs point right and are hollow."""
    frame = _rows(rows, width)
    scale = _scale(frame, 0.0, max((max(row.start, row.end) for row in rows), default=1.0))
    totals = [index for index, row in enumerate(rows) if row.kind == "total"]
    parts = [*axis(frame, scale, title, format_tick), _upright(scale(0.0), frame, totals)]
    for index, row in enumerate(rows):
        y = frame.middle(index)
        if index + 1 < len(rows):
            at = scale(row.end)
            parts.append(element("line", x1=at, x2=at, y1=y, y2=frame.middle(index + 1), class_="step"))
        bar = (
            _bar((0.0, row.end), y, 8, scale, "length") if row.kind == "total" else _arrow(scale(row.start), scale(row.end), y)
        )
        parts.append(_group(row, "fall", bar))
    return draw(width, frame.bottom + 44, label, [*parts, *_texts(frame, rows, width)])


def range_bars(rows: Sequence[Range], *, title: str, format_tick: Format, width: int, label: str) -> Markup:
    """The seen range as a pale bar from 0 to 1, the chosen one as a dark bar inside or beyond it, a stroke where 0 lies."""
    frame = _rows(rows, width)
    low = max(min([0.0, *(row.low for row in rows)]), -FURTHEST_RANGE)
    high = min(max([1.0, *(row.high for row in rows)]), 1 + FURTHEST_RANGE)
    scale = _scale(frame, low, high)
    parts = axis(frame, scale, title, format_tick)
    for index, row in enumerate(rows):
        y = frame.middle(index)
        start, end = (min(max(value, low), high) for value in (row.low, row.high))
        seen, chosen = _bar((0.0, 1.0), y, 8, scale, "seen"), _bar((start, end), y, 3.5, scale, "length")
        zero = element("line", x1=scale(row.zero), x2=scale(row.zero), y1=y - 8, y2=y + 8, class_="zero")
        ends = f"{_tip(scale(low), y, -1) if row.low < low else ''}{_tip(scale(high), y, 1) if row.high > high else ''}"
        cut = element("path", d=ends, class_="cut") if ends else None
        parts.append(_group(row, "range", seen, chosen, zero if low <= row.zero <= high else None, cut))
    return draw(width, frame.bottom + 44, label, [*parts, *_texts(frame, rows, width)])


def lengths(rows: Sequence[Length], *, title: str, format_tick: Format, width: int, label: str) -> Markup:
    """Plain bars from 0."""
    frame = _rows(rows, width)
    scale = _scale(frame, 0.0, max((row.value for row in rows), default=1.0))
    parts = [*axis(frame, scale, title, format_tick), _upright(scale(0.0), frame)]
    for index, row in enumerate(rows):
        bar = _bar((0.0, row.value), frame.middle(index), 6, scale, "length")
        parts.append(_group(row, "plain", bar))
    return draw(width, frame.bottom + 44, label, [*parts, *_texts(frame, rows, width)])


def mark(name: str, x: float, y: float) -> Markup:
    """The sign of a part of a layer: a ring for weights, a square for activations, a cross for everything else."""
    match name:
        case "weights":
            return element("circle", cx=x, cy=y, r=3.5, class_="part")
        case "activations":
            return element("rect", x=x - 3.2, y=y - 3.2, width=6.4, height=6.4, class_="part")
        case _:
            return element("path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8", class_="part")


def _rows(rows: Sequence[Row], width: int) -> Frame:
    """With a little more room for names than their count of characters asks: fonts differ."""
    return frame_of(width, [f"{row.name}  " for row in rows], [_note(row, width) for row in rows], has_sign=False)


def _note(row: Row, width: int) -> str:
    return f"{row.note}{row.extra}" if width >= WIDE_PX else row.note


def _texts(frame: Frame, rows: Sequence[Row], width: int) -> list[Markup]:
    """Names and notes, to be drawn above all else."""
    return [part for index, row in enumerate(rows) for part in frame.texts(index, row.name, _note(row, width), row.kind)]


def _scale(frame: Frame, low: float, high: float) -> Scale:
    return Scale(*_with_air(low, high), frame.left, frame.right)


def _with_air(low: float, high: float) -> tuple[float, float]:
    """A little air at the end that is not 0."""
    top = high if high > low else low + 1.0
    return low * AIR, low + (top - low) * AIR


def _group(row: Row, class_: str, *parts: Markup | None) -> Markup:
    return element("g", element("title", row.title), *parts, class_=f"{class_} {row.kind}")


def _upright(x: float, frame: Frame, rows: Sequence[int] | None = None) -> Markup:
    """The line that bars stand on; on a phone only beside those ``rows``, since names stand above their bars."""
    if not frame.is_narrow:
        return element("path", d=f"M{x:.1f} {TOP}V{frame.bottom:g}", class_="axis")
    strokes = "".join(f"M{x:.1f} {frame.middle(index) - 9:g}v18" for index in (range(frame.count) if rows is None else rows))
    return element("path", d=strokes, class_="axis")


def _bar(ends: tuple[float, float], y: float, half: float, scale: Scale, class_: str) -> Markup:
    start, end = ends
    left, right = sorted((scale(start), scale(end)))
    wide = max(right - left, LEAST_PX) if start != end else 0.0
    return element("rect", x=left, y=y - half, width=wide, height=2 * half, class_=class_)


def _arrow(start: float, end: float, y: float) -> Markup:
    """A bar with a pointed end; what is shorter than its point is all point."""
    point = min(6.0, abs(end - start))
    neck = end + point if end < start else end - point
    top, bottom = y - 8, y + 8
    d = f"M{start:.2f} {top:.1f}H{neck:.2f}L{end:.2f} {y:.1f}L{neck:.2f} {bottom:.1f}H{start:.2f}z"
    return element("path", d=d, class_="length")


def _sign(name: str, value: float, y: float, scale: Scale) -> Markup:
    """A mark in its place, or at the edge with an arrow."""
    if scale.low <= value <= scale.high:
        return mark(name, scale(value), y)
    is_right = value > scale.high
    at = scale.end - 9 if is_right else scale.start + 9
    return element(
        "g", mark(name, at, y), element("path", d=_tip(at + (9 if is_right else -9), y, 1 if is_right else -1), class_="cut")
    )


def _tip(x: float, y: float, side: int) -> str:
    """An arrow's tip at ``x``, to the right (1) or the left (-1)."""
    return f"M{x - 4 * side:.1f} {y - 3.5:.1f}l{4 * side} 3.5l{-4 * side} 3.5"
