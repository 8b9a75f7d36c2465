"""HTML and SVG that cannot be injected into: text is escaped unless it was built here.

>>> element("p", "1 < 2", element("b", "bold"), class_="note")
'<p class="note">1 &lt; 2<b>bold</b></p>'
"""

from __future__ import annotations

import re
from html import escape

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]")
"""Control characters, overrides of the writing direction and lone surrogates: names could deceive by them."""


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: str) -> Markup:
    """Text as it should be read."""
    return value if isinstance(value, Markup) else Markup(escape(_CONTROL.sub("\ufffd", value), quote=True))


def element(tag: str, *children: str | None, **attributes: str | float | None) -> Markup:
    """One element; ``class_`` is ``class``, other underscores become hyphens, None leaves a child or an attribute out."""
    parts = []
    for name, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{text(shown)}"')
    return Markup(f"<{tag}{''.join(parts)}>{join(*children)}</{tag}>")


def join(*children: str | None) -> Markup:
    """Several pieces after each other."""
    return Markup("".join(text(child) for child in children if child is not None))
