r"""The model card as Markdown (CommonMark with tables), for repositories and model hubs.

>>> cell("a|b")
'a\\|b'
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import assert_never

from edgekit.bundle.provenance.card import NONE, Bars, Block, Card, Diagram, Fields, Note, Points, Table, range_text
from edgekit.bundle.provenance.intent import NOT_STATED

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def render_markdown(card: Card) -> bytes:
    """The card, UTF-8."""
    parts = [f"# {plain(card.title)}", plain(card.lede)]
    parts.append("\n".join(f"- **{plain(item.title)}**: {plain(item.value)} ({plain(item.text)})" for item in card.figures))
    for section in card.sections:
        parts.append(f"## {plain(section.title)}")
        parts += [_block(block) for block in section.blocks]
    parts.append(f"---\n\n{plain(card.footer)}")
    return ("\n\n".join(parts) + "\n").encode()


def plain(text: str) -> str:
    """Text that no Markdown reader takes for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def cell(text: str) -> str:
    """Text for a table's cell."""
    return plain(text) or " "


def _table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    rule = ["---:" if index in right else "---" for index in range(len(headers))]
    lines = [[cell(text) for text in headers], rule, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(block: Block) -> str:
    match block:
        case Points(texts):
            return plain(texts[0]) if len(texts) == 1 else "\n".join(f"- {plain(text)}" for text in texts) or f"*{NOT_STATED}*"
        case Note(text):
            return plain(text)
        case Fields(rows):
            return _table(("", ""), rows)
        case Table():
            return _table(block.headers, block.rows, block.right)
        case Bars():
            return _recalls(block)
        case Diagram(measured):
            bins = tuple(
                (f"{each.low:.2f} to {each.high:.2f}", str(each.count), f"{each.confidence:.3f}", f"{each.accuracy:.3f}")
                for each in measured.bins
                if each.count
            )
            return _table(("probability", "samples", "mean probability", "accuracy"), bins, (1, 2, 3))
        case _:
            assert_never(block)


def _recalls(block: Bars) -> str:
    rows = tuple(
        (item.name, f"{item.recall:.4f}", range_text(item.low, item.high) or NONE, str(item.samples or "not recorded"))
        for item in block.recalls
    )
    return _table(("class", "recall", "95 % interval", "samples"), rows, (1, 2, 3))
