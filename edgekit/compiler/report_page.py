"""The page of a report: verdict first, then figures and candidates."""

from __future__ import annotations

from html import escape

from edgekit.compiler.result import OptimizeResult


def render_page(result: OptimizeResult) -> str:
    """The whole page as one self-contained HTML text."""
    rows = "".join(
        f"<tr><td>{escape(item.name)}<td>{escape(item.verdict.status)}<td>{escape(item.verdict.reason)}</tr>"
        for item in result.candidates
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>edgekit optimize</title>'
        f"<h1>{escape(result.verdict)}</h1><table>{rows}</table></html>\n"
    )
