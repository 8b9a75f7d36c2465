"""The model card as one page: no scripts, nothing loaded from elsewhere, light and dark, readable at 390 px and on paper."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import assert_never

from edgekit.bundle.provenance.card import Bars, Block, Card, Diagram, Fields, Figure, Note, Points, Table, range_text
from edgekit.bundle.provenance.facts import ClassRecall
from edgekit.bundle.provenance.intent import NOT_STATED
from edgekit.bundle.provenance.markup import Markup, element, join
from edgekit.bundle.provenance.reliability import Bin, Reliability

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CODE = re.compile(r"\A(?:sha256:)?[0-9a-f]{64}\b")
_SIDE, _LEFT, _TOP, _HEIGHT = 320, 40, 10, 250


def render_html(card: Card) -> bytes:
    """The page, UTF-8."""
    style = Markup(files("edgekit.bundle.provenance").joinpath("card.css").read_text(encoding="utf-8"))
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", f"{card.title}: model card"),
        element("style", style),
    )
    header = element(
        "header",
        element("p", "Model card", class_="context"),
        element("h1", card.title),
        element("p", card.lede, class_="lede"),
        element("div", *(_figure(item) for item in card.figures), class_="figures"),
    )
    sections = [
        element("section", element("h2", section.title), *(_block(block) for block in section.blocks))
        for section in card.sections
    ]
    body = element("body", element("main", header, *sections, element("footer", element("p", card.footer))))
    return (Markup("<!doctype html>\n") + element("html", head, body, lang="en") + "\n").encode()


def _figure(item: Figure) -> Markup:
    parts = (("title", item.title), ("value", item.value), ("text", item.text))
    return element("div", *(element("p", value, class_=f"figure-{name}") for name, value in parts), class_="figure")


def _block(block: Block) -> Markup:
    match block:
        case Points(texts):
            return _points(texts)
        case Note(text):
            return element("p", text, class_="note")
        case Fields(rows):
            return element("dl", *(join(element("dt", name), element("dd", _value(value))) for name, value in rows))
        case Table():
            return _table(block)
        case Bars():
            return _bars(block)
        case Diagram(measured):
            return _diagram(measured)
        case _:
            assert_never(block)


def _points(texts: tuple[str, ...]) -> Markup:
    if not texts:
        return element("p", NOT_STATED, class_="missing")
    return element("p", texts[0]) if len(texts) == 1 else element("ul", *(element("li", text) for text in texts))


def _value(value: str) -> Markup:
    """Digests in a fixed width, what is missing quietly."""
    if value.startswith("not "):
        return element("span", value, class_="missing")
    if found := _CODE.match(value):
        return join(element("code", found.group()), value[found.end() :])
    return join(value)


def _table(block: Table) -> Markup:
    def row(tag: str, texts: tuple[str, ...]) -> Markup:
        cells = (
            element(tag, _value(text), class_="number" if place in block.right else None) for place, text in enumerate(texts)
        )
        return element("tr", *cells)

    body = element("tbody", *(row("td", texts) for texts in block.rows))
    return element("div", element("table", element("thead", row("th", block.headers)), body), class_="scroll", tabindex=0)


def _bars(block: Bars) -> Markup:
    rows = join(*(_bar(item, block.mean) for item in block.recalls))
    has_interval = any(item.low is not None for item in block.recalls)
    lines = (
        " Lines are 95 % intervals."
        if has_interval
        else " How many samples a class has was not recorded, so there is no interval."
    )
    mean = f" The dashed line is their mean, {block.mean:.4f}." if block.mean is not None else ""
    caption = f"Recall by class: the share of a class's samples that were answered rightly.{mean}{lines}"
    return element("figure", element("div", rows, class_="bars"), element("figcaption", caption))


def _bar(item: ClassRecall, mean: float | None) -> Markup:
    def at(value: float) -> str:
        return f"{100 * value:.2f}%"

    parts = [
        element("rect", x="0", y=0, width="100%", height=14, class_="track"),
        element("rect", x="0", y=0, width=at(item.recall), height=14, class_="bar"),
    ]
    if mean is not None:
        parts.append(element("line", x1=at(mean), x2=at(mean), y1=-3, y2=17, class_="mean"))
    interval = range_text(item.low, item.high, ".3f")
    if item.low is not None and item.high is not None:
        parts.append(element("line", x1=at(item.low), x2=at(item.high), y1=7, y2=7, class_="interval"))
        parts += [element("line", x1=at(end), x2=at(end), y1=3, y2=11, class_="interval") for end in (item.low, item.high)]
    label = f"{item.name}: recall {item.recall:.4f}" + (f", 95 % {interval}, {item.samples} samples" if interval else "")
    plot = element("svg", element("title", label), *parts, width="100%", height=14, role="img")
    value = element(
        "span", f"{item.recall:.3f}", element("small", f" n={item.samples}") if item.samples else None, class_="figure-of"
    )
    return join(element("span", item.name, class_="class"), plot, value)


def _diagram(measured: Reliability) -> Markup:
    parts = [*_grid(), *(_column(each, measured.samples) for each in measured.bins if each.count)]
    parts.append(element("line", x1=_x(0), y1=_y(0), x2=_x(1), y2=_y(1), class_="diagonal"))
    label = f"Reliability diagram: expected calibration error {measured.error:.4f} on {measured.samples} samples"
    plot = element("svg", element("title", label), *parts, viewBox=f"0 0 {_SIDE} {_SIDE}", role="img", class_="diagram")
    caption = (
        "Accuracy of the answers by their probability; on the diagonal, a probability of 0.9 means right in 9 of 10. "
        "The outlined part is the distance from it. Below: the share of all samples in each bin."
    )
    headers = ("probability", "samples", "mean probability", "accuracy")
    rows = tuple(
        (f"{each.low:.2f} to {each.high:.2f}", str(each.count), f"{each.confidence:.3f}", f"{each.accuracy:.3f}")
        for each in measured.bins
        if each.count
    )
    table = element("details", element("summary", "The figures"), _table(Table(headers=headers, rows=rows, right=(1, 2, 3))))
    return element("figure", plot, element("figcaption", caption), table)


def _x(value: float) -> float:
    return _LEFT + value * (_SIDE - _LEFT - 10)


def _y(value: float) -> float:
    return _TOP + (1 - value) * (_HEIGHT - _TOP)


def _grid() -> list[Markup]:
    found = []
    for step in range(6):
        value = step / 5
        found.append(element("line", x1=_x(0), x2=_x(1), y1=_y(value), y2=_y(value), class_="grid"))
        found.append(element("text", f"{value:g}", x=_LEFT - 6, y=_y(value) + 4, text_anchor="end"))
        found.append(element("text", f"{value:g}", x=_x(value), y=_SIDE - 4, text_anchor="middle"))
    return found


def _column(each: Bin, samples: int) -> Markup:
    """Accuracy, its distance from the mean probability, and below the axis the share of samples."""
    left, width = _x(each.low) + 1, _x(each.high) - _x(each.low) - 2
    top, bottom = max(each.accuracy, each.confidence), min(each.accuracy, each.confidence)
    depth = 40 * each.count / samples
    return join(
        element("rect", x=left, y=_y(each.accuracy), width=width, height=_y(0) - _y(each.accuracy), class_="bar"),
        element("rect", x=left, y=_y(top), width=width, height=_y(bottom) - _y(top), class_="gap"),
        element("rect", x=left, y=_HEIGHT + 6, width=width, height=max(depth, 1.0), class_="share"),
    )
