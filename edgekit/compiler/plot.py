"""Plots as inline SVG: pure functions from numbers to markup, without colours (classes of ``report.css`` have them).

Every plot is drawn for a width in CSS pixels; the page holds a wide and a narrow one, so that text keeps its size on a phone.

    >>> nice_ticks(0.0, 0.23, 5)
    (0.0, 0.05, 0.1, 0.15, 0.2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from edgekit.compiler.markup import Markup, element

Shape = Literal["star", "circle", "square", "triangle", "cross"]
Interval = tuple[float, float] | None
Box = tuple[float, float, float, float]
CHARACTER_PX = 6.4
"""Width of a character of a 12 px label, on the wide side for system fonts."""
BOLD_PX = 7.4
"""The same for the chosen one, which is bold."""
LABEL_PX = 13.0
NARROW_PX = 500
"""Below this width only the chosen one, the baseline and the front are labelled."""
CROWD = 14
"""The same with more points than this."""


SAME = 1e-9
"""Values that differ by less than this share of the largest are drawn as equal."""
SMALLEST = 1e-20
"""Values nearer to 0 are drawn as 0."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One candidate in a scatter plot; ``kind`` is its CSS class."""

    name: str
    x: float
    y: float
    shape: Shape
    kind: str
    title: str
    x_interval: Interval = None
    y_interval: Interval = None
    is_on_front: bool = False
    rank: int = 9
    """Who is labelled first where room is short: 0 before 1."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A budget limit: values beyond it (``is_upper``: above, else below) are not allowed."""

    value: float
    is_upper: bool
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Title, how a tick is written, limits, and whether small is good."""

    title: str
    format_tick: Callable[[float, float], str]
    is_lower_better: bool
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Scale:
    """Linear, from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_step(span: float, count: int) -> float:
    """The step of 1, 2 or 5 times a power of ten that makes about ``count`` ticks."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999) * power


def nice_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Round values inside ``low`` .. ``high``."""
    step = nice_step(high - low, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(1 - math.floor(math.log10(step)), 0)
    return tuple(round(index * step, decimals) for index in range(first, last + 1))


def span(values: Sequence[float], *, limits: Sequence[Limit] = (), is_from_zero: bool = False) -> tuple[float, float]:
    """The range of an axis: the values with some air, and those limits that do not squash them.

    Args:
        values: finite; may be empty or all equal.
        limits: taken in where the range grows to four times its width at most.
        is_from_zero: begin at 0 where the smallest value is less than half the largest.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    width = high - low
    if width <= SAME * largest or largest < SMALLEST:
        width = max(largest * 0.1, width) if largest >= SMALLEST else 1.0
        low, high = low - width / 2, high + width / 2
    for limit in limits:
        if max(high, limit.value) - min(low, limit.value) <= 4 * width:
            low, high = min(low, limit.value), max(high, limit.value)
    air = 0.08 * (high - low)
    if is_from_zero and 0 <= (min(values) if values else 0.0) <= high / 2:
        return 0.0, high + air
    return low - air, high + air


def find_front(points: Sequence[tuple[float, float]], *, is_y_lower_better: bool) -> frozenset[int]:
    """Indices of points that no other one beats: x small, y good; equal points are on the front together."""
    sign = 1.0 if is_y_lower_better else -1.0
    front: set[int] = set()
    best = math.inf
    order = sorted(range(len(points)), key=lambda index: (points[index][0], sign * points[index][1]))
    last: tuple[float, float] | None = None
    for index in order:
        y = sign * points[index][1]
        if y < best or points[index] == last:
            front.add(index)
            best, last = y, points[index]
    return frozenset(front)


def scatter(points: Sequence[Point], x_axis: Axis, y_axis: Axis, *, width: int, height: int, label: str) -> Markup:
    """Candidates as symbols with error bars, the front as a staircase, limits as shaded areas."""
    xs = [value for point in points for value in (point.x, *(point.x_interval or ()))]
    ys = [value for point in points for value in (point.y, *(point.y_interval or ()))]
    left, right, top, bottom = 52.0, width - 14.0, 34.0, height - 44.0
    x = Scale(*span(xs, limits=x_axis.limits, is_from_zero=True), left, right)
    y = Scale(*span(ys, limits=y_axis.limits), bottom, top)
    symbols = [_around(x(point.x), y(point.y)) for point in points]
    limits, limit_words, taken = _limits(x, y, x_axis, y_axis, symbols)
    parts = [*_grid(x, y, x_axis, y_axis), *limits]
    parts += [_front(points, x, y, is_lower=y_axis.is_lower_better), *(_error_bars(point, x, y) for point in points)]
    parts += [_symbol(point, x, y) for point in sorted(points, key=lambda item: -item.rank)]
    parts += [*limit_words, *_labels(points, x, y, [*taken, *symbols])]
    return draw(width, height, label, parts)


def draw(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """The picture, with its words for those who cannot see it."""
    return element("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", width=width, height=height, role="img", aria_label=label)


def _grid(x: Scale, y: Scale, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    """Grid lines, ticks and axis titles."""
    parts = []
    y_ticks = nice_ticks(y.low, y.high, 5)
    for value in y_ticks:
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        shown = y_axis.format_tick(value, nice_step(y.high - y.low, 5))
        parts.append(element("text", shown, x=x.start - 8, y=y(value) + 4, class_="tick", text_anchor="end"))
    count = 6 if x.end > 500 else 4
    for value in nice_ticks(x.low, x.high, count):
        parts.append(element("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="axis"))
        shown = x_axis.format_tick(value, nice_step(x.high - x.low, count))
        parts.append(element("text", shown, x=x(value), y=y.start + 18, class_="tick", text_anchor="middle"))
    parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(element("text", y_axis.title, x=2, y=14, class_="axis-title"))
    parts.append(element("text", x_axis.title, x=x.end, y=y.start + 37, class_="axis-title", text_anchor="end"))
    return parts


def _limits(
    x: Scale, y: Scale, x_axis: Axis, y_axis: Axis, symbols: Sequence[Box]
) -> tuple[list[Markup], list[Markup], list[Box]]:
    """Shaded areas, which lie under all else, their words, which stand above it, and the room that the words take."""
    placed = [_x_limit(limit, x, y) for limit in x_axis.limits]
    placed += [_y_limit(limit, x, y, symbols) for limit in y_axis.limits]
    return [mark for marks, _, _ in placed for mark in marks], [words for _, words, _ in placed], [box for _, _, box in placed]


def _x_limit(limit: Limit, x: Scale, y: Scale) -> tuple[list[Markup], Markup, Box]:
    """A limit of the horizontal axis; one that lies outside is named at the edge that it lies beyond."""
    at = x(min(max(limit.value, x.low), x.high))
    start, end = (at, x.end) if limit.is_upper else (x.start, at)
    parts = [element("rect", x=start, y=y.end, width=end - start, height=y.start - y.end, class_="beyond")]
    words = f"{limit.label} \u2192" if limit.value > x.high else f"\u2190 {limit.label}" if limit.value < x.low else limit.label
    if x.low <= limit.value <= x.high:
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="limit"))
    is_left = at > (x.start + x.end) / 2
    edge = at + (-6 if is_left else 6)
    return parts, *_limit_words(words, edge, y.end + 12, is_end=is_left)


def _y_limit(limit: Limit, x: Scale, y: Scale, symbols: Sequence[Box]) -> tuple[list[Markup], Markup, Box]:
    """The same for the vertical axis, whose pixels grow downwards; the words stand at the end where fewer symbols are."""
    at = y(min(max(limit.value, y.low), y.high))
    start, end = (y.end, at) if limit.is_upper else (at, y.start)
    parts = [element("rect", x=x.start, y=start, width=x.end - x.start, height=end - start, class_="beyond")]
    words = f"{limit.label} \u2191" if limit.value > y.high else f"{limit.label} \u2193" if limit.value < y.low else limit.label
    if y.low <= limit.value <= y.high:
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="limit"))
    line = min(max(at + (-6 if limit.is_upper else 15), y.end + 28), y.start - 6)
    places = [_limit_words(words, x.end - 4, line, is_end=True), _limit_words(words, x.start + 4, line, is_end=False)]
    return parts, *min(places, key=lambda place: sum(_overlaps(place[1], symbol) for symbol in symbols))


def _limit_words(words: str, x: float, y: float, *, is_end: bool) -> tuple[Markup, Box]:
    width = len(words) * CHARACTER_PX
    box = (x - width, y - 10, x, y + 3) if is_end else (x, y - 10, x + width, y + 3)
    return element("text", words, x=x, y=y, class_="limit-label", text_anchor="end" if is_end else "start"), box


def _front(points: Sequence[Point], x: Scale, y: Scale, *, is_lower: bool) -> Markup:
    """The staircase; what lies on its bad side is dominated."""
    corners = sorted({(point.x, point.y) for point in points if point.is_on_front})
    if not corners:
        return Markup("")
    worst = y.high if is_lower else y.low
    path = [f"M{x(corners[0][0]):.1f} {y(worst):.1f}"]
    path += [
        f"V{y(value):.1f}H{x(corners[index + 1][0] if index + 1 < len(corners) else x.high):.1f}"
        for index, (_, value) in enumerate(corners)
    ]
    return element("path", d="".join(path), class_="front")


def _error_bars(point: Point, x: Scale, y: Scale) -> Markup:
    parts = []
    if point.y_interval is not None:
        at = x(point.x)
        parts.append(element("line", x1=at, x2=at, y1=y(point.y_interval[0]), y2=y(point.y_interval[1])))
    if point.x_interval is not None:
        at = y(point.y)
        parts.append(element("line", x1=x(point.x_interval[0]), x2=x(point.x_interval[1]), y1=at, y2=at))
    muted = "" if point.is_on_front or point.rank == 0 else " muted"
    return element("g", *parts, class_=f"error {point.kind}{muted}") if parts else Markup("")


def _symbol(point: Point, x: Scale, y: Scale) -> Markup:
    muted = "" if point.is_on_front or point.rank == 0 else " muted"
    return element(
        "g", element("title", point.title), shape(point.shape, x(point.x), y(point.y)), class_=f"mark {point.kind}{muted}"
    )


def shape(kind: Shape, x: float, y: float) -> Markup:
    """A symbol of about 12 px around a place."""
    match kind:
        case "circle":
            return element("circle", cx=x, cy=y, r=5.5)
        case "square":
            return element("rect", x=x - 5, y=y - 5, width=10, height=10)
        case "triangle":
            return element("path", d=f"M{x:.1f} {y - 6.5:.1f}l6.5 11.5h-13z")
        case "star":
            tips = [(9.5 if index % 2 == 0 else 4.0, math.pi * (index / 5 - 0.5)) for index in range(10)]
            corners = " ".join(
                f"{x + radius * math.cos(angle):.1f},{y + radius * math.sin(angle):.1f}" for radius, angle in tips
            )
            return element("polygon", points=corners)
        case "cross":
            return element("path", d=f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10", class_="stroke")
        case _:
            assert_never(kind)


def _labels(points: Sequence[Point], x: Scale, y: Scale, taken: list[Box]) -> list[Markup]:
    """Names beside the symbols, important ones first; those without room are left to the table and the tooltip."""
    parts = []
    most = 2 if x.end < NARROW_PX or len(points) > CROWD else 9
    for point in sorted((item for item in points if item.rank <= most), key=lambda item: item.rank):
        name = shorten(point.name, 26)
        for box, anchor in _places(x(point.x), y(point.y), len(name) * (CHARACTER_PX if point.rank else BOLD_PX)):
            is_inside = box[0] >= x.start and box[2] <= x.end and box[1] >= y.end and box[3] <= y.start
            if is_inside and not any(_overlaps(box, other) for other in taken):
                taken.append(box)
                at = box[0] if anchor == "start" else box[2]
                if abs(box[1] + LABEL_PX / 2 - y(point.y)) > 1.5 * LABEL_PX:
                    ends = {"x1": x(point.x), "y1": y(point.y), "x2": at, "y2": (box[1] + box[3]) / 2}
                    parts.append(element("line", class_="leader", **ends))
                parts.append(element("text", name, x=at, y=box[3] - 3, class_=f"name {point.kind}", text_anchor=anchor))
                break
    return parts


def _around(x: float, y: float) -> Box:
    return x - 6, y - 6, x + 6, y + 6


def _places(x: float, y: float, width: float) -> list[tuple[Box, str]]:
    """Where a label may go: right and left of the symbol, then a line or two above and below."""
    places: list[tuple[Box, str]] = []
    for shift in (0.0, -LABEL_PX, LABEL_PX, -2 * LABEL_PX, 2 * LABEL_PX, 3 * LABEL_PX, 4 * LABEL_PX):
        top = y + shift - LABEL_PX / 2
        places.append(((x + 12, top, x + 12 + width, top + LABEL_PX), "start"))
        places.append(((x - 12 - width, top, x - 12, top + LABEL_PX), "end"))
    return places


def _overlaps(left: Box, right: Box) -> bool:
    return left[0] < right[2] and right[0] < left[2] and left[1] < right[3] and right[1] < left[3]


def shorten(name: str, length: int) -> str:
    """A name cut in its middle, so that its end still tells it from its brothers."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"
