"""Plots with one row a name: latency bars and dumbbells. The same rules as in ``plot``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekit.compiler.markup import Markup, element
from edgekit.compiler.plot import BOLD_PX, CHARACTER_PX, Limit, Scale, Shape, draw, nice_step, nice_ticks, shape, shorten, span

NARROW_PX = 520
"""Below this width a row's name stands above its bar."""
CLIP = 4.0
"""The axis ends at this many times the longest p90; a longer p99 is cut there, and says so."""
Format = Callable[[float, float], str]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Latency of one candidate in ms; ``note`` stands at the end of its row."""

    name: str
    p50: float
    p90: float
    p99: float
    shape: Shape
    kind: str
    note: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One class: the value before and after; ``note`` is the change, ``kind`` one of ``worse``, ``better``, ``same``."""

    name: str
    before: float
    after: float
    kind: str
    note: str
    title: str


@dataclass(frozen=True)
class Frame:
    """Where the rows of a plot are."""

    width: int
    count: int
    name_px: float
    note_px: float
    has_sign: bool

    @property
    def is_narrow(self) -> bool:
        """Whether names stand above their bars."""
        return self.width < NARROW_PX

    @property
    def row_px(self) -> float:
        """Height of a row."""
        return 44.0 if self.is_narrow else 28.0

    @property
    def left(self) -> float:
        """Where bars begin."""
        return 10.0 if self.is_narrow else self.name_px + (24 if self.has_sign else 14)

    @property
    def right(self) -> float:
        """Where bars end at the latest."""
        return self.width - (14.0 if self.is_narrow else self.note_px + 14)

    @property
    def bottom(self) -> float:
        """The lower end of the last row."""
        return 22.0 + self.count * self.row_px

    def middle(self, index: int) -> float:
        """The vertical middle of a row's bar."""
        return 22.0 + index * self.row_px + (30.0 if self.is_narrow else 14.0)

    def sign(self, index: int) -> tuple[float, float]:
        """Where a row's symbol stands: before its name on a phone, else before its bar."""
        return (13.0, self.middle(index) - 18) if self.is_narrow else (self.name_px + 12, self.middle(index))

    def texts(self, index: int, name: str, note: str, kind: str) -> list[Markup]:
        """Name and note of a row."""
        at = self.middle(index) + (-14 if self.is_narrow else 4)
        room = int((self.width - 40 if self.is_narrow else self.name_px - 8) / CHARACTER_PX)
        shown = shorten(name, max(room - (len(note) if self.is_narrow else 0), 8))
        start = (26 if self.has_sign else 2) if self.is_narrow else self.name_px
        return [
            element("text", shown, x=start, y=at, class_=f"name {kind}", text_anchor="start" if self.is_narrow else "end"),
            element("text", note, x=self.width - 8, y=at, class_=f"note {kind}", text_anchor="end"),
        ]


def frame_of(width: int, names: Sequence[str], notes: Sequence[str], *, has_sign: bool) -> Frame:
    """Room for names and notes, and what is left for bars; ``has_sign``: a symbol stands before each bar."""
    longest = max((len(name) for name in names), default=0)
    note = max((len(note) for note in notes), default=0)
    name_px = min(longest * CHARACTER_PX + 12, width * 0.3)
    return Frame(width, len(names), name_px, note * BOLD_PX + 8, has_sign)


def axis(frame: Frame, scale: Scale, title: str, format_tick: Format) -> list[Markup]:
    """Grid lines, ticks and the title."""
    count = 4 if frame.is_narrow else 6
    step = nice_step(scale.high - scale.low, count)
    parts = []
    for value in nice_ticks(scale.low, scale.high, count):
        at = scale(value)
        parts.append(element("line", x1=at, x2=at, y1=22, y2=frame.bottom, class_="grid"))
        parts.append(element("text", format_tick(value, step), x=at, y=frame.bottom + 16, class_="tick", text_anchor="middle"))
    parts.append(element("text", title, x=scale.end, y=frame.bottom + 36, class_="axis-title", text_anchor="end"))
    return parts


def bars(
    rows: Sequence[Bar],
    *,
    title: str,
    format_tick: Format,
    limits: Sequence[Limit] = (),
    band: tuple[float, float] | None = None,
    width: int,
    label: str,
) -> Markup:
    """Solid to p50, lighter to p90, a whisker to p99; from zero, since lengths are compared.

    Args:
        rows: in the order of drawing.
        title: of the axis.
        format_tick: from a tick's value and the step to its words.
        limits: upper limits; one beyond the axis is named at its end.
        band: values inside are as good as equal: the noise floor around the baseline.
        width: in CSS pixels.
        label: the picture in words.
    """
    frame = frame_of(width, [row.name for row in rows], [row.note for row in rows], has_sign=True)
    longest = max((row.p90 for row in rows), default=1.0) or 1.0
    high = min(max((row.p99 for row in rows), default=1.0), CLIP * longest)
    scale = Scale(0.0, span([0.0, high], limits=limits)[1], frame.left, frame.right)
    parts = axis(frame, scale, title, format_tick)
    if band is not None:
        parts.append(_band(frame, scale(max(band[0], 0.0)), scale(min(band[1], scale.high))))
    for index, row in enumerate(rows):
        parts += frame.texts(index, row.name, row.note, row.kind)
        parts.append(_bar(row, scale, frame.middle(index), frame.sign(index)))
    for limit in limits:
        is_beyond = limit.value > scale.high
        at = scale(min(limit.value, scale.high))
        if not is_beyond:
            parts.append(element("line", x1=at, x2=at, y1=16, y2=frame.bottom, class_="limit"))
        words = f"{limit.label} \u2192" if is_beyond else limit.label
        anchor = "end" if at > (scale.start + scale.end) / 2 else "start"
        parts.append(element("text", words, x=at, y=12, class_="limit-label", text_anchor=anchor))
    return draw(width, frame.bottom + 44, label, parts)


def _band(frame: Frame, start: float, end: float) -> Markup:
    """From top to bottom; on a phone only beside the bars, since names and notes stand between them."""
    places = (
        [(frame.middle(index) - 10, 20.0) for index in range(frame.count)] if frame.is_narrow else [(22.0, frame.bottom - 22)]
    )
    wide = max(end - start, 1.5)
    return element(
        "path", d="".join(f"M{start:.1f} {y:g}h{wide:.1f}v{high:g}h-{wide:.1f}z" for y, high in places), class_="band"
    )


def _bar(row: Bar, scale: Scale, y: float, sign: tuple[float, float]) -> Markup:
    def rect(start: float, end: float, half: float, class_: str) -> Markup:
        return element("rect", x=scale(start), y=y - half, width=scale(end) - scale(start), height=2 * half, class_=class_)

    is_cut = row.p99 > scale.high
    last = scale(min(row.p99, scale.high))
    end = f"M{last - 6:.1f} {y - 4:.1f}l5 4l-5 4" if is_cut else f"M{last:.1f} {y - 5:.1f}v10"
    whisker = element("path", d=f"M{scale(row.p50):.1f} {y:.1f}H{last:.1f}{end}", class_="whisker")
    tail = rect(row.p50, max(row.p90, row.p50), 4, "p90")
    solid = rect(0.0, row.p50, 7, "p50")
    return element(
        "g", element("title", row.title), whisker, tail, solid, shape(row.shape, *sign),
        class_=f"bar {row.kind}",
    )  # fmt: skip


def dumbbell(rows: Sequence[Pair], *, title: str, format_tick: Format, width: int, label: str) -> Markup:
    """A hollow ring for before, a filled symbol for after (triangle down: worse, up: better), a line between."""
    frame = frame_of(width, [row.name for row in rows], [row.note for row in rows], has_sign=False)
    low, high = span([value for row in rows for value in (row.before, row.after)])
    scale = Scale(low, high, frame.left, frame.right)
    parts = axis(frame, scale, title, format_tick)
    for index, row in enumerate(rows):
        y = frame.middle(index)
        before, after = scale(row.before), scale(row.after)
        parts += frame.texts(index, row.name, row.note, row.kind)
        parts.append(
            element(
                "g",
                element("title", row.title),
                element("line", x1=before, x2=after, y1=y, y2=y),
                element("circle", cx=before, cy=y, r=5, class_="before"),
                after_mark(row.kind, after, y),
                class_=f"pair {row.kind}",
            )
        )
    return draw(width, frame.bottom + 44, label, parts)


def after_mark(kind: str, x: float, y: float) -> Markup:
    """The filled symbol of the value after."""
    match kind:
        case "worse":
            return element("path", d=f"M{x:.1f} {y + 6:.1f}l6 -10.5h-12z", class_="after")
        case "better":
            return element("path", d=f"M{x:.1f} {y - 6:.1f}l6 10.5h-12z", class_="after")
        case _:
            return element("circle", cx=x, cy=y, r=3, class_="after")
