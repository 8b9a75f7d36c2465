"""Output of the command line: data on stdout, everything else on stderr.

Colour only on a terminal and without ``NO_COLOR``; tables with right-aligned numbers; progress as one rewritten line with an
ETA on a terminal and as a line a stage elsewhere.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, TextIO

from edgekit.schema.base import encode_json

Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
_CODES: dict[Style, str] = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_REDRAW_SECONDS = 0.1


def is_colored(stream: TextIO) -> bool:
    """Whether the stream is a terminal that wants colour."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, *styles: Style, stream: TextIO | None = None) -> str:
    """The text with ANSI styles, or unchanged where colour is off."""
    if not styles or not is_colored(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[s] for s in styles)}m{text}\x1b[0m"


def out(text: str = "") -> None:
    """Write a line of data to stdout."""
    sys.stdout.write(text + "\n")


def out_json(record: Any) -> None:
    """Write a record to stdout as JSON."""
    sys.stdout.write(encode_json(record).decode())


def note(text: str = "", *styles: Style) -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(paint(text, *styles, stream=sys.stderr) + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """Write a warning to stderr."""
    note(f"warning: {text}", "yellow")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A plain table; columns in ``right`` are right-aligned. The widest column gives way on a narrow terminal.

    >>> print(table(["name", "ms"], [["fp32", "1.25"], ["int8", "0.5"]], right=[1]))
    name    ms
    fp32  1.25
    int8   0.5
    """
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    limit = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 10_000
    excess = sum(widths) + 2 * (len(widths) - 1) - limit
    if excess > 0:
        widest = widths.index(max(widths))
        widths[widest] = max(12, widths[widest] - excess)

    def line(values: Sequence[str], *, is_header: bool = False) -> str:
        parts = []
        for i, value in enumerate(values):
            text = value if len(value) <= widths[i] else value[: widths[i] - 1] + "…"
            parts.append(text.rjust(widths[i]) if i in right else text.ljust(widths[i]))
        text = "  ".join(parts).rstrip()
        return paint(text, "bold") if is_header else text

    return "\n".join([line(headers, is_header=True), *(line(row) for row in cells)])


def format_bytes(count: float) -> str:
    """Bytes for people, decimal units: ``1.23 MB``."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``0.8 s``, ``42 s``, ``3 min 05 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


class Progress:
    """Progress of long work on stderr: a bar with ETA on a terminal, one line a stage elsewhere."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._is_live = sys.stderr.isatty() and not is_quiet
        self._started = time.monotonic()
        self._stage = ""
        self._drawn = 0.0

    def update(self, stage: str, done: float = 0.0) -> None:
        """Show a stage with its fraction done, 0..1, of the whole work."""
        if self._is_quiet:
            return
        now = time.monotonic()
        if not self._is_live:
            if stage != self._stage:
                self._stage = stage
                note(f"[{format_seconds(now - self._started):>6}] {stage}")
            return
        if stage == self._stage and now - self._drawn < _REDRAW_SECONDS:
            return
        self._stage, self._drawn = stage, now
        spent = now - self._started
        eta = f"  ETA {format_seconds(spent / done - spent)}" if 0.02 < done < 1 else ""
        filled = round(20 * min(max(done, 0.0), 1.0))
        text = f"{'█' * filled}{'░' * (20 - filled)} {done:4.0%}  {stage}{eta}"
        columns = shutil.get_terminal_size((100, 24)).columns
        sys.stderr.write("\r\x1b[K" + text[: columns - 1])
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove the bar, so that a line can be written."""
        if self._is_live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
