"""Small pictures as SVG, drawn on the server: a sparkline in a table, a bar of parts.

Classes, no styles: the page's policy forbids them. Only numbers and names from the program go into the markup, so there is
nothing to escape. Charts with axes are drawn in the browser, from the table beside them.

>>> str(parts([(3, "good"), (1, "bad")])).count("<rect")
2
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

_SPARK_WIDTH, _SPARK_HEIGHT = 84, 20
_MIN_PART = 0.6
"""Of 100: what is there can be seen."""


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


def parts(counts: Sequence[tuple[float, str]], *, total: float = 0.0, size: str = "") -> Markup:
    """A bar of parts side by side; the text beside it says what they are.

    Args:
        counts: how much, and the name of a fill: ``good``, ``warn``, ``bad``, ``idle``, ``pending``, ``back``, ``0`` to ``4``.
        total: what the whole bar stands for; the sum by default.
        size: ``tall``, ``thin`` or nothing.
    """
    whole = max(total, sum(count for count, _name in counts))
    if whole <= 0:
        return Markup(f'<svg class="parts {size}" aria-hidden="true"></svg>')
    shares = [(max(100 * count / whole, _MIN_PART) if count > 0 else 0.0, name) for count, name in counts]
    shrink = min(1.0, 100 / max(_MIN_PART, sum(share for share, _name in shares)))
    drawn, x = [], 0.0
    for share, name in shares:
        width = share * shrink
        if width > 0:
            drawn.append(f'<rect class="f-{name}" x="{x:.2f}" y="0" width="{width:.2f}" height="10"/>')
        x += width
    view = 'viewBox="0 0 100 10" preserveAspectRatio="none"'
    return Markup(f'<svg class="parts {size}" {view} aria-hidden="true">{"".join(drawn)}</svg>')


def interval(low: float | None, middle: float | None, high: float | None, *, margin: float) -> Markup:
    """A difference with its interval on a scale around zero; the band is what counts as no difference."""
    if low is None or middle is None or high is None:
        return Markup()
    reach = 1.1 * max(abs(low), abs(high), 2 * margin, 1e-9)

    def x(value: float) -> float:
        return 50 + 50 * value / reach

    drawn = (
        f'<rect class="f-idle" x="{x(-margin):.2f}" y="0" width="{x(margin) - x(-margin):.2f}" height="10" opacity="0.4"/>'
        f'<rect class="f-ink" x="49.8" y="0" width="0.4" height="10"/>'
        f'<rect class="f-accent" x="{x(low):.2f}" y="4" width="{max(x(high) - x(low), 0.4):.2f}" height="2"/>'
        f'<rect class="f-accent" x="{x(middle) - 0.5:.2f}" y="1.5" width="1" height="7"/>'
    )
    return Markup(f'<svg class="parts tall" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>')
