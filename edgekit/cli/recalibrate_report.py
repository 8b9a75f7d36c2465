"""What a recalibration found, as one HTML file and as Markdown: no script, nothing from elsewhere, no sample of the field.

>>> bar_line([0.1, 0.5, 0.4])
'▂█▇'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.compiler.markup import Markup, element, join
from edgekit.dataset.field import FieldCheck
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.evaluation.rivals import Rivalry
from edgekit.schema.recalibration import Answer, StageNote, StreamShift

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
MAX_STREAMS = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT = 640, 150
_MARKS = {"better": "✓", "not worse": "≈", "worse": "✗", "cannot tell": "?", "refused": "✗", "ok": "✓", "warning": "!"}
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #16191d; --quiet: #59616b; --line: #dde1e6; --raised: #f5f6f8;
  --field: #0060a0; --old: #b84a00; --good: #00684e; --bad: #b84a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #eceff2; --quiet: #a3acb7; --line: #343a43;
  --raised: #1c2026; --field: #62bdf2; --old: #f59a4d; --good: #4fcfa6; --bad: #f59a4d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 20px 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.3rem); line-height: 1.2; margin: 0 0 .6rem; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.3rem; } figure { margin: 1.2rem 0; } figcaption, .quiet { color: var(--quiet); }
.badge { display: inline-block; padding: .25rem .8rem; border: 1.5px solid; border-radius: 99px; font-weight: 620; }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; } table.matrix td { text-align: right; padding: .1rem .45rem; }
table.matrix td.hit { font-weight: 650; } table.matrix th { font-weight: 400; color: var(--quiet); padding: .1rem .45rem; }
.pair { display: flex; flex-wrap: wrap; gap: 2rem; } svg { display: block; max-width: 100%; height: auto; }
.field { fill: var(--field); } .old { fill: none; stroke: var(--old); stroke-width: 2; }
.axis { stroke: var(--quiet); } .zero { stroke: var(--quiet); stroke-dasharray: 3 3; }
.gain { stroke: var(--field); stroke-width: 3; } .dot { fill: var(--field); }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
"""


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything that the report tells."""

    title: str
    answer: Answer
    why: str
    outcome: str
    """What became of it: published where, or not."""
    serving: str
    release: str = ""
    checks: tuple[FieldCheck, ...] = ()
    shifts: tuple[StreamShift, ...] = ()
    rivals: tuple[Rivalry, ...] = ()
    stages: tuple[StageNote, ...] = ()
    notes: tuple[str, ...] = ()


def write_report(folder: Path, story: Story) -> Path:
    """Write both forms, for their owner's eyes; the HTML file's path."""
    write_durably(folder / MARKDOWN_FILE, render_markdown(story).encode(), mode=PRIVATE_FILE)
    write_durably(folder / HTML_FILE, render_html(story).encode(), mode=PRIVATE_FILE)
    return folder / HTML_FILE


def bar_line(values: Sequence[float]) -> str:
    """Shares as one line of blocks."""
    top = max(values, default=0.0) or 1.0
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, round(value / top * (len(_BLOCKS) - 1)))] for value in values)


def interval(rival: Rivalry) -> str:
    """The gain's interval for people."""
    return "unknown" if rival.low is None or rival.high is None else f"{rival.low:+.4f} … {rival.high:+.4f}"


# --- Markdown ---------------------------------------------------------------------------------------------------------------


def render_markdown(story: Story) -> str:
    """The report as Markdown."""
    lines = [f"# {story.title}", "", f"**{story.answer}**: {story.why}", "", story.outcome, ""]
    if story.rivals:
        lines += [
            "| data | metric | samples | serves now | new | gain | 95 % interval | verdict |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {each.name} | {each.metric} | {each.samples} | {each.current:.4f} | {each.candidate:.4f} "
                f"| {each.gain:+.4f} | {interval(each)} | {each.verdict}{f' ({each.reason})' if each.reason else ''} |"
                for each in story.rivals
            ), "",
        ]  # fmt: skip
    if story.checks:
        lines += ["## Samples", "", *(f"- {_MARKS[each.verdict]} {each.name}: {each.text}" for each in story.checks), ""]
    if story.shifts:
        lines += ["## Field against baseline", "", "| stream | PSI | baseline | field |", "|---|---|---|---|"]
        lines += [
            f"| {each.name} | {each.psi:.3f} | {bar_line(each.reference)} | {bar_line(each.field)} |"
            for each in story.shifts[:MAX_STREAMS]
        ]
        lines.append("")
    for rival in story.rivals:
        if rival.classes:
            lines += [f"## By class: {rival.name}", "", "| class | samples | serves now | new |", "|---|---|---|---|"]
            lines += [
                f"| {each.name} | {each.samples} | {_share(each.current)} | {_share(each.candidate)} |"
                for each in rival.classes
            ]
            lines.append("")
    lines += ["## Stages", "", *(f"- {each.name}: {each.text} ({each.seconds:.1f} s)" for each in story.stages), ""]
    if story.notes:
        lines += ["## Notes", "", *(f"- {text}" for text in story.notes), ""]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# --- HTML -------------------------------------------------------------------------------------------------------------------


def render_html(story: Story) -> str:
    """The report as one page."""
    is_good = story.answer in {"better", "not worse"}
    badge = element("p", f"{_MARKS[story.answer]} {story.answer}", class_=f"badge {'good' if is_good else 'bad'}")
    body = join(
        element("h1", story.title),
        badge,
        element("p", story.why),
        element("p", story.outcome, class_="quiet"),
        _comparison(story) if story.rivals else None,
        _checks(story) if story.checks else None,
        _streams(story) if any(each.reference for each in story.shifts) else None,
        *(_classes(each) for each in story.rivals if each.classes),
        _stages(story),
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = element("title", story.title)
    return f'<!doctype html>\n<html lang="en"><head>{head}{title}<style>{_STYLE}</style></head>\n<body>{body}</body></html>\n'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Markup:
    def cells(tag: str, values: Sequence[str]) -> Markup:
        return element("tr", *(element(tag, text, class_="n" if at in right else None) for at, text in enumerate(values)))

    whole = element("table", element("thead", cells("th", heads)), element("tbody", *(cells("td", row) for row in rows)))
    return element("div", whole, class_="wide")


def _comparison(story: Story) -> Markup:
    rows = [
        [
            each.name, each.metric, str(each.samples), f"{each.current:.4f}", f"{each.candidate:.4f}", f"{each.gain:+.4f}",
            interval(each), f"{_MARKS[each.verdict]} {each.verdict}{f' ({each.reason})' if each.reason else ''}",
        ]
        for each in story.rivals
    ]  # fmt: skip
    heads = ("data", "metric", "samples", "serves now", "new", "gain", "95 % interval", "verdict")
    caption = (
        f"Both models answered the same samples. To the right of the dashed line the new model is better; a loss of up to "
        f"{story.rivals[0].margin:g} counts as not worse."
    )
    drawn = element("figure", _gains(story.rivals), element("figcaption", caption))
    return join(
        element("h2", f"Against {story.serving}, which serves"),
        _table(heads, rows, right=(2, 3, 4, 5)),
        drawn,
    )


def _gains(rivals: Sequence[Rivalry]) -> Markup:
    """Intervals of the gains on one scale."""
    reach = max(
        [0.01, *(abs(end) for each in rivals for end in (each.low, each.high, each.gain, -each.margin) if end is not None)]
    )
    left, height = 170, 34

    def place(value: float) -> float:
        return left + (value + reach) / (2 * reach) * (_WIDTH - left - 20)

    marks: list[Markup] = [element("line", x1=place(0), x2=place(0), y1=4.0, y2=float(height * len(rivals) + 8), class_="zero")]
    for row, each in enumerate(rivals):
        y = 20.0 + row * height
        marks.append(element("text", each.name, x=0, y=y + 4))
        if each.low is not None and each.high is not None:
            marks.append(element("line", x1=place(each.low), x2=place(each.high), y1=y, y2=y, class_="gain"))
        marks.append(element("circle", element("title", f"{each.gain:+.4f}"), cx=place(each.gain), cy=y, r=5, class_="dot"))
    bottom = float(height * len(rivals) + 22)
    marks += [
        element("text", f"{value:+.2f}", x=place(value), y=bottom, text_anchor="middle") for value in (-reach, 0.0, reach)
    ]
    label = "; ".join(f"{each.name}: gain {each.gain:+.4f}, {interval(each)}" for each in rivals)
    return element("svg", *marks, viewBox=f"0 0 {_WIDTH} {round(bottom) + 8}", role="img", aria_label=label)


def _checks(story: Story) -> Markup:
    rows = [[each.name, f"{_MARKS[each.verdict]} {each.verdict}", each.text] for each in story.checks]
    return join(element("h2", "The field samples"), _table(("check", "verdict", "found"), rows))


def _streams(story: Story) -> Markup:
    shown = [each for each in story.shifts if each.reference][:MAX_STREAMS]
    figures = [element("figure", _histogram(each), element("figcaption", f"{each.name}: PSI {each.psi:.3f}")) for each in shown]
    text = "Bars: field samples. Line: the baseline that the release was judged on. Bins hold equal shares of the baseline."
    return join(element("h2", "What the field looks like"), element("p", text, class_="quiet"), *figures)


def _histogram(shift: StreamShift) -> Markup:
    count = len(shift.field)
    top = max(*shift.field, *shift.reference) or 1.0
    width = _WIDTH / max(1, count)
    base = float(_HEIGHT - 22)

    def height(value: float) -> float:
        return value / top * (base - 6)

    bars = [
        element(
            "rect", x=at * width + 1, y=base - height(value), width=max(1.0, width - 2), height=height(value), class_="field"
        )
        for at, value in enumerate(shift.field)
    ]
    steps = [
        f"{at * width:.1f},{base - height(v):.1f} {(at + 1) * width:.1f},{base - height(v):.1f}"
        for at, v in enumerate(shift.reference)
    ]
    line = element("polyline", points=" ".join(steps), class_="old")
    axis = element("line", x1=0, x2=_WIDTH, y1=base, y2=base, class_="axis")
    ends = (
        element("text", f"≤ {shift.edges[0]:.3g}", x=0, y=float(_HEIGHT - 6)),
        element("text", f"> {shift.edges[-1]:.3g}", x=_WIDTH, y=float(_HEIGHT - 6), text_anchor="end"),
    )
    label = f"{shift.name}: histogram of the field over the baseline's bins, PSI {shift.psi:.3f}"
    return element("svg", *bars, line, axis, *ends, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def _classes(rival: Rivalry) -> Markup:
    rows = [[each.name, str(each.samples), _share(each.current), _share(each.candidate)] for each in rival.classes]
    tables = [_matrix("serves now", rival, rival.confusion_current), _matrix("new", rival, rival.confusion_candidate)]
    return join(
        element("h2", f"By class: {rival.name}"),
        _table(("class", "samples", "serves now", "new"), rows, right=(1, 2, 3)),
        element("div", *(each for each in tables if each is not None), class_="pair") if len(rival.classes) <= 20 else None,
    )


def _matrix(title: str, rival: Rivalry, counts: tuple[tuple[int, ...], ...]) -> Markup | None:
    if not counts:
        return None
    rows = [
        element(
            "tr",
            element("th", rival.classes[row].name, scope="row"),
            *(element("td", str(cell), class_="hit" if row == at else None) for at, cell in enumerate(cells)),
        )
        for row, cells in enumerate(counts)
    ]
    caption = element("figcaption", f"{title}: rows are the labels, columns the answers in the same order")
    return element("figure", element("div", element("table", *rows, class_="matrix"), class_="wide"), caption)


def _stages(story: Story) -> Markup:
    rows = [[each.name, each.text, f"{each.seconds:.1f}"] for each in story.stages]
    notes = element("ul", *(element("li", text) for text in story.notes)) if story.notes else None
    return join(element("h2", "How it was made"), _table(("stage", "result", "s"), rows, right=(2,)), notes)
