"""Small pictures as SVG, drawn on the server: a sparkline in a table, a histogram.

Classes, no styles: the page's policy forbids them. Only numbers go into the markup, so there is nothing to escape.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

_SPARK_WIDTH, _SPARK_HEIGHT = 96, 24
_BAR_WIDTH, _BAR_GAP, _PLOT_HEIGHT = 22, 3, 120


def sparkline(values: Sequence[float | None]) -> Markup:
    """The last values as a line, oldest left; empty when there are fewer than two."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return Markup()
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    step = _SPARK_WIDTH / (len(values) - 1)
    points = " ".join(
        f"{i * step:.1f},{_SPARK_HEIGHT - 3 - (value - low) / span * (_SPARK_HEIGHT - 6):.1f}"
        for i, value in enumerate(values)
        if value is not None
    )
    label = f"median latency of the last {len(known)} windows, {low:.2f} to {high:.2f} ms"
    return Markup(
        f'<svg class="spark" viewBox="0 0 {_SPARK_WIDTH} {_SPARK_HEIGHT}" role="img" aria-label="{label}">'
        f'<polyline points="{points}"/></svg>'
    )


def histogram(buckets: Sequence[tuple[float, float, int]]) -> Markup:
    """Counts by latency bucket; the gaps between used buckets are drawn as empty bars.

    Args:
        buckets: lower and upper bound in ms, and count, in order.
    """
    if not buckets:
        return Markup()
    ratio = buckets[0][1] / buckets[0][0]
    filled: list[tuple[float, float, int]] = []
    for low, high, count in buckets:
        while filled and filled[-1][1] < low * 0.999 and len(filled) < 200:
            filled.append((filled[-1][1], filled[-1][1] * ratio, 0))
        filled.append((low, high, count))
    tallest = max(count for _low, _high, count in filled)
    total = sum(count for _low, _high, count in filled)
    width = len(filled) * (_BAR_WIDTH + _BAR_GAP) + 10
    parts = []
    for i, (low, high, count) in enumerate(filled):
        x = 5 + i * (_BAR_WIDTH + _BAR_GAP)
        height = max(count / tallest * _PLOT_HEIGHT, 1.0 if count else 0.0)
        title = f"{low:.2f} to {high:.2f} ms: {count} ({count / total:.1%})"
        bar = f'x="{x}" y="{_PLOT_HEIGHT + 6 - height:.1f}" width="{_BAR_WIDTH}" height="{height:.1f}"'
        parts.append(f"<rect {bar}><title>{title}</title></rect>")
        if i % max(1, len(filled) // 8) == 0:
            parts.append(f'<text x="{x}" y="{_PLOT_HEIGHT + 22}">{low:.2g}</text>')
    label = f"{total} requests, {filled[0][0]:.2f} to {filled[-1][1]:.2f} ms"
    view = f"0 0 {width} {_PLOT_HEIGHT + 28}"
    return Markup(f'<svg class="bars" viewBox="{view}" role="img" aria-label="{label}">{"".join(parts)}</svg>')
